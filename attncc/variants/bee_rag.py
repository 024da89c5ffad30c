"""Balanced entropy for retrieval: a term of each document on the scores of its tokens, causal.

Inputs: doc (B, N) integers, the document of each token; beta (B, documents), which receives a gradient; a document
beyond beta's size has 0.
"""

import attncc as ac

bee_rag = ac.Variant(
    name="bee_rag",
    score=lambda score, b, kv_idx, beta, doc: score + beta[b, doc[b, kv_idx]],
    mask=ac.causal,
    inputs={"beta": ac.Input("b", "documents", grad=True), "doc": ac.Input("b", "kv_idx", dtype="int")},
    cites="BEE-RAG, arXiv:2508.05100",
)
