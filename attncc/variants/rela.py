"""Rectified linear attention, causal: relu(s) with no denominator; rows may be empty.

The published block normalizes the concatenated heads behind the op: attncc.recipes.rela_block.
"""

import attncc as ac

rela = ac.Variant(
    name="rela",
    mask=ac.causal,
    normalizer=lambda score: ac.relu(score),
    cites="Sparse Attention with Linear Units, arXiv:2104.07012",
)
