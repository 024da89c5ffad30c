"""Hymba's local layers: a causal window, and the first tokens (its meta tokens) always visible.

Scalars: reach, the keys behind the query's own (inclusive); tokens, the number of meta tokens.
"""

import attncc as ac

meta_tokens = ac.Variant(
    name="meta_tokens",
    mask=ac.causal & (ac.window("reach") | (lambda kv_idx, tokens: kv_idx < tokens)),
    inputs={"reach": ac.Scalar(2048), "tokens": ac.Scalar(128)},
    cites="Hymba, arXiv:2411.13676",
)
