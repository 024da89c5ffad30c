"""Retention: scores decay with distance, each head at its own rate; no denominator; causal.

Inputs: rates (H,), the logs of the published gamma = 1 - 2^(-5 - h) by default; it receives a gradient. Rotations of q
and k come before the op, the norm of each head behind it. In linear time: a LinearOp, with a state in and out.
"""

import math

import attncc as ac


def published(sizes: dict[str, int]) -> list[float]:
    """log(1 - 2^(-5 - h)) of each head."""
    return [math.log1p(-(2.0 ** (-5.0 - h))) for h in range(sizes["h"])]


retention = ac.Variant(
    name="retention",
    score=ac.decay("rates", default=published),
    mask=ac.causal,
    normalizer=ac.identity,
    cites="Retentive Network, arXiv:2307.08621",
)
