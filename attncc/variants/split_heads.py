"""Heads of two kinds: the first see everything, the others only the query's own document.

Inputs: doc (B, N) integers, the document of each token. Scalar: full_heads, how many see everything.
"""

import attncc as ac

split_heads = ac.Variant(
    name="split_heads",
    mask=ac.document("doc") | (lambda h, full_heads: h < full_heads),
    inputs={"full_heads": ac.Scalar(1)},
    cites="Embedding-Based Context-Aware Reranker, arXiv:2510.13329",
)
