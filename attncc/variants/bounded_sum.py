"""Scores as weights, over max(|their sum|, 1), causal: kernels of feature maps whose sums may be negative.

q and k are the features; op(q, k, v, scale=1.0) has no factor beside their product.
"""

import attncc as ac


def over_bounded_sum(score, row):
    """Small sums do not divide."""
    return score / ac.maximum(ac.abs(row.sum(score)), 1)


bounded_sum = ac.Variant(
    name="bounded_sum",
    mask=ac.causal,
    normalizer=over_bounded_sum,
    cites="When Attention Sink Emerges in Language Models, arXiv:2410.10781",
)
