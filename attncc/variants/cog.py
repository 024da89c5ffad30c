"""Cog attention: sign(s) exp|s| over the row sum of exp|s|; weights may be negative. Causal."""

import attncc as ac

cog = ac.Variant(
    name="cog",
    mask=ac.causal,
    normalizer=ac.cog,
    cites="More Expressive Attention with Negative Weights, arXiv:2411.07176",
)
