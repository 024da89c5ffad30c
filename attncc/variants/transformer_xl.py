"""Relative positions of Transformer-XL, causal, with memory as further keys: (q + u) . k + (q + w) . r[distance].

Inputs: content (H, Dqk), which is u; lags (B, H, M, L), the second product for each distance from 0 to L - 1,
a matmul before the op: (q + w) @ r.mT. Both receive gradients. RCMHA convolves q, k and v along the sequence first.
"""

import attncc as ac


def relative(q_vec, k_vec, scale, b, h, q_idx, kv_idx, q_len, kv_len, content, lags):
    """Content by a matmul, position by a look-up."""
    return scale * (ac.dot(q_vec + content[h], k_vec) + lags[b, h, q_idx, q_idx + kv_len - q_len - kv_idx])


transformer_xl = ac.Variant(
    name="transformer_xl",
    similarity=relative,
    mask=ac.causal,
    inputs={"content": ac.Input("h", "d", grad=True), "lags": ac.Input("b", "h", "q_idx", "distance", grad=True)},
    cites="Transformer-XL, arXiv:1901.02860; RCMHA, arXiv:2308.03429",
)
