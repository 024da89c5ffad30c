"""Scores times a factor of the key: prompt-aware self-attention rescales what the prompt does not ask for.

Inputs: gain (B, N); it receives a gradient.
"""

import attncc as ac

key_gain = ac.Variant(
    name="key_gain",
    score=lambda score, b, kv_idx, gain: score * gain[b, kv_idx],
    inputs={"gain": ac.Input("b", "kv_idx", grad=True)},
    cites="HD-Painter, arXiv:2312.14091",
)
