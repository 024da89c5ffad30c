"""Scalable softmax, causal: scores times gain log n, where n counts the keys that a query sees.

Inputs: gain (H,); it receives a gradient.
"""

import attncc as ac


def by_length(score, h, q_idx, q_len, kv_len, gain):
    """Attention that does not fade as the context grows."""
    seen = ac.maximum(q_idx + kv_len - q_len + 1, 1)
    return score * gain[h] * ac.log(seen)


ssmax = ac.Variant(
    name="ssmax",
    score=by_length,
    mask=ac.causal,
    inputs={"gain": ac.Input("h", grad=True)},
    cites="Scalable-Softmax, arXiv:2501.19399",
)
