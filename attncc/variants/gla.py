"""Gated linear attention: each channel of the state decays on its own, as tokens choose; causal.

Inputs: g (B, H, N, Dqk), the log of what each token leaves of each channel, such as logsigmoid(...) / 16; it receives a
gradient. In linear time: a LinearOp, with a state in and out. All pairs at once overflow where the decay of a whole
sequence exceeds e^88: plan="parallel" is for short ones.
"""

import attncc as ac


def gated_dot(q_vec, k_vec, scale, b, h, q_idx, kv_idx, q_len, kv_len, g):
    """The product of each channel, times what is left of it from the key's token to the query's."""
    between = ac.cumsum(g[b, h, q_idx + kv_len - q_len]) - ac.cumsum(g[b, h, kv_idx])
    return scale * ac.sum_d(q_vec * k_vec * ac.exp(between))


gla = ac.Variant(
    name="gla",
    similarity=gated_dot,
    mask=ac.causal,
    normalizer=ac.identity,
    inputs={"g": ac.Input("b", "h", "kv_idx", "d", grad=True)},
    cites="Gated Linear Attention Transformers, arXiv:2312.06635",
)
