"""Bidirectional attention with corrected rotary positions for keys ahead: they are met by vectors of their own.

Rotary distances have a sign, which a causal model never saw negative. Keys ahead are scored by far_q . far_k,
rotated the other way.
Inputs: far_q (B, H, M, Dqk) and far_k (B, Hkv, N, Dqk); they receive gradients.
"""

import attncc as ac


def corrected(q_vec, k_vec, scale, b, h, h_kv, q_idx, kv_idx, q_len, kv_len, far_q, far_k):
    """One of two products, by the sign of the distance."""
    behind = kv_idx <= q_idx + kv_len - q_len
    ahead = ac.dot(far_q[b, h, q_idx], far_k[b, h_kv, kv_idx])
    return scale * ac.where(behind, ac.dot(q_vec, k_vec), ahead)


bico = ac.Variant(
    name="bico",
    similarity=corrected,
    inputs={
        "far_q": ac.Input("b", "h", "q_idx", "d", grad=True),
        "far_k": ac.Input("b", "h_kv", "kv_idx", "d", grad=True),
    },
    cites="Are We Falling in a Middle-Intelligence Trap?, arXiv:2311.07468",
)
