"""Parallel context encoding, causal: documents see a shared prefix and themselves; the query's segment sees everything.

Inputs: segment (B, N) integers, 0 for the prefix; query (B,), the segment of the query.
"""

import attncc as ac


def apart(segment, query, b, q_idx, kv_idx, q_len, kv_len):
    """Own segment, prefix, or all."""
    own, other = segment[b, q_idx + kv_len - q_len], segment[b, kv_idx]
    return (own == other) | (other == 0) | (own == query[b])


parallel_context = ac.Variant(
    name="parallel_context",
    mask=ac.causal & apart,
    inputs={"segment": ac.Input("b", "kv_idx", dtype="int"), "query": ac.Input("b", dtype="int")},
    cites="Attention Entropy is a Key Factor for Parallel Context Encoding, arXiv:2412.16545",
)
