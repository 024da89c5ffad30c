"""Sparsemax: the point of the simplex that is nearest to the scores, max(s - tau, 0). Causal."""

import attncc as ac

sparsemax = ac.Variant(
    name="sparsemax",
    mask=ac.causal,
    normalizer=ac.sparsemax,
    cites="From Softmax to Sparsemax, arXiv:1602.02068",
)
