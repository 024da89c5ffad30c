"""RWKV-6's read: what is before a token without that token's own decay, and itself with a bonus; causal.

    out_t = q_t (state_(t-1) + diag(u) k_t v_t')        state_t = diag(exp(g_t)) state_(t-1) + k_t v_t'

Inputs: g (B, H, N, Dqk), the log of what each token leaves of each channel, and u (H, Dqk); both receive gradients. q
is the published receptance; no scale. In linear time: a LinearOp, with a state in and out.
"""

import attncc as ac


def receptance(q_vec, k_vec, b, h, q_idx, kv_idx, q_len, kv_len, g, u):
    """The product of each channel, times its bonus, or times what is left of it."""
    position = q_idx + kv_len - q_len
    between = ac.cumsum(g[b, h, position]) - g[b, h, position] - ac.cumsum(g[b, h, kv_idx])
    own, past = ac.sum_d(q_vec * k_vec * u[h]), ac.sum_d(q_vec * k_vec * ac.exp(between))
    return ac.where(kv_idx == position, own, past)


rwkv6 = ac.Variant(
    name="rwkv6",
    similarity=receptance,
    mask=ac.causal,
    normalizer=ac.identity,
    inputs={"g": ac.Input("b", "h", "kv_idx", "d", grad=True), "u": ac.Input("h", "d", grad=True)},
    cites="Eagle and Finch, arXiv:2404.05892",
)
