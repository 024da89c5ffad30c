"""Softpick, causal: relu(exp(s) - 1) over the sum of |exp(s) - 1|: weights that are exactly 0, rows below 1, no sink.

Keys below a score of 0 have no weight, but a part in the denominator. Both sides are times exp(-m), m the largest score
or 0, and eps stands beside what is left, as published; there m may be below 0, where no key has a weight.
"""

import attncc as ac


def rectified(score, row):
    """The sign of exp(s) - 1 picks. What is taken out of both sides has no part in gradients."""
    m = ac.detach(ac.maximum(row.max(score), 0))
    p = ac.exp(score - m) - ac.exp(-m)
    return ac.relu(p) / (row.sum(ac.abs(p)) + 1e-6)


softpick = ac.Variant(
    name="softpick",
    mask=ac.causal,
    normalizer=rectified,
    cites="Softpick, arXiv:2504.20966",
)
