"""Softmax over the keys whose weight is at least `least` of the row's largest. Causal.

Scalar: least, 0.02 by default; 1 keeps the largest alone.
"""

import attncc as ac


def near_the_largest(score, row, least):
    """exp(s) where s >= max s + log(least), over its sum."""
    m = row.max(score)
    p = ac.where(score >= m + ac.log(least), ac.exp(score - m), 0)
    return p / row.sum(p)


min_p = ac.Variant(
    name="min_p",
    mask=ac.causal,
    normalizer=near_the_largest,
    inputs={"least": ac.Scalar(0.02)},
    cites="the rule of min-p sampling, arXiv:2407.01082, on attention weights",
)
