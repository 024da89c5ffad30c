"""Packed documents: causal, and only within the query's own document.

Inputs: doc (B, N) integers, the document of each token, equal for tokens that see each other. Sorted ids let whole
tiles be skipped; ids in any order are right as well.
"""

import attncc as ac

document = ac.Variant(
    name="document",
    mask=ac.causal & ac.document("doc"),
    cites="The Llama 3 Herd of Models, arXiv:2407.21783",
)
