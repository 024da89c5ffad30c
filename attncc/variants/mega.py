"""Mega's gated attention, causal: a Laplace function of q . k / n + bias, n the keys that a query sees; no denominator.

    weight = (1 + erf((s - sqrt(1/2)) / (sigma sqrt(2)))) / 2,  sigma = 1 / sqrt(4 pi)

Inputs: table (H, L), a bias for each distance from 0 to L - 1; it receives a gradient. The moving average before the
op and the gates behind it are the block's. The other function, relu(s)^2, is relu2's.
"""

import math

import attncc as ac


def mean_and_bias(q_vec, k_vec, h, q_idx, kv_idx, q_len, kv_len, table):
    """The product over the row's length."""
    position = q_idx + kv_len - q_len
    return ac.dot(q_vec, k_vec) / ac.maximum(position + 1, 1) + table[h, position - kv_idx]


mega = ac.Variant(
    name="mega",
    similarity=mean_and_bias,
    mask=ac.causal,
    normalizer=lambda score: 0.5 * (1 + ac.erf((score - math.sqrt(0.5)) * math.sqrt(2 * math.pi))),
    inputs={"table": ac.Input("h", "distance", grad=True)},
    cites="Mega, arXiv:2209.10655",
)
