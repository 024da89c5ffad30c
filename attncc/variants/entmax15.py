"""1.5-entmax: sparse weights max(s/2 - tau, 0)^2, with tau such that they sum to 1. Causal."""

import attncc as ac

entmax15 = ac.Variant(
    name="entmax15",
    mask=ac.causal,
    normalizer=ac.entmax15,
    cites="Sparse Sequence-to-Sequence Models, arXiv:1905.05702; Adaptively Sparse Transformers, arXiv:1909.00015",
)
