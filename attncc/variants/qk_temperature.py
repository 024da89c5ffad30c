"""A temperature for each query row, from content or position, that multiplies its scores. Causal.

Inputs: tau (B, H, M), with size 1 where it is the same; it receives a gradient.
"""

import attncc as ac

qk_temperature = ac.Variant(
    name="qk_temperature",
    score=lambda score, b, h, q_idx, tau: score * tau[b, h, q_idx],
    mask=ac.causal,
    inputs={"tau": ac.Input("b", "h", "q_idx", grad=True)},
    cites="Selective Attention: Enhancing Transformer through Principled Context Control, arXiv:2411.12892",
)
