"""Plain attention: every query sees every key. Vaswani et al. 2017."""

import attncc as ac

full = ac.Variant(
    name="full",
    cites="Attention Is All You Need, arXiv:1706.03762",
)
