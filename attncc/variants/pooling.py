"""Pooling by energies of the keys: softmax over kept keys, the same for every query. q and k are not read.

Inputs: energy (B, H, N), one head a branch, such as w . (tanh(V x) sigmoid(U x)); it receives a gradient. keep
(B, H, N) integers: 0 drops a key (the masking of the largest), and the others share its weight.
"""

import attncc as ac

pooling = ac.Variant(
    name="pooling",
    similarity=lambda b, h, kv_idx, energy: energy[b, h, kv_idx],
    mask=lambda b, h, kv_idx, keep: keep[b, h, kv_idx] != 0,
    inputs={"energy": ac.Input("b", "h", "kv_idx", grad=True), "keep": ac.Input("b", "h", "kv_idx", dtype="int")},
    cites="Attention-Challenging Multiple Instance Learning, arXiv:2311.07125",
)
