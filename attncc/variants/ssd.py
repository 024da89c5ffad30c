"""Mamba-2's state-space duality: every token's own step size writes it, and lets what lies before it decay; causal.

    state_t = exp(rate dt_t) state_(t-1) + dt_t k_t v_t'        out_t = q_t state_t

Inputs: dt (B, H, N), the step sizes behind their softplus, and rate (H,), the published A, below 0; both receive
gradients. q, k, v are the published C, B and x; C and B of a group of heads are views expanded over them. No scale;
the skip D x is the block's. In linear time: a LinearOp, with a state in and out.
"""

import attncc as ac


def stepped(score, b, h, q_idx, kv_idx, q_len, kv_len, dt, rate):
    """The key's step size, and the decay over the time from the key to the query."""
    time = ac.cumsum(dt[b, h, q_idx + kv_len - q_len]) - ac.cumsum(dt[b, h, kv_idx])
    return score * dt[b, h, kv_idx] * ac.exp(rate[h] * time)


def published(sizes: dict[str, int]) -> list[float]:
    """-1, -2, .. of each head."""
    return [-1.0 - h for h in range(sizes["h"])]


ssd = ac.Variant(
    name="ssd",
    similarity=lambda q_vec, k_vec: ac.dot(q_vec, k_vec),
    score=stepped,
    mask=ac.causal,
    normalizer=ac.identity,
    inputs={"dt": ac.Input("b", "h", "kv_idx", grad=True), "rate": ac.Input("h", grad=True, default=published)},
    cites="Transformers are SSMs, arXiv:2405.21060",
)
