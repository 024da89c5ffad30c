"""Causal attention: every query sees the keys up to its own position.

The last query stands at the last key, so that the same variant is right in prefill and in decode.
"""

import attncc as ac

causal = ac.Variant(
    name="causal",
    mask=ac.causal,
    cites="Attention Is All You Need, arXiv:1706.03762",
)
