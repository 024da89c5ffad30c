"""Attention with linear biases: each head subtracts its slope times the distance, causal.

Inputs: slopes (H,), the published ones by default; it receives a gradient.
"""

import attncc as ac

alibi = ac.Variant(
    name="alibi",
    score=ac.alibi("slopes"),
    mask=ac.causal,
    cites="Train Short, Test Long, arXiv:2108.12409",
)
