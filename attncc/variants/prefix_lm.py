"""Prefix language model: the first `prefix[b]` tokens see each other, the rest is causal.

Inputs: prefix (B,) integers.
"""

import attncc as ac

prefix_lm = ac.Variant(
    name="prefix_lm",
    mask=ac.causal | ac.prefix("prefix"),
    cites="T5, arXiv:1910.10683; UniLM, arXiv:1905.03197",
)
