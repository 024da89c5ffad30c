"""Queries of an object: the first half see its foreground, the others its background; who would see nothing sees all.

Inputs: foreground (B, N) integers, 1 for pixels of the object, a batch entry an object.
"""

import attncc as ac


def halves(foreground, b, q_idx, kv_idx, q_len):
    """Which half a query is of."""
    inside, first = foreground[b, kv_idx] != 0, q_idx < q_len // 2
    return (inside & first) | (~inside & ~first)


object_queries = ac.Variant(
    name="object_queries",
    mask=halves,
    dead_rows="open",
    inputs={"foreground": ac.Input("b", "kv_idx", dtype="int")},
    cites="Cutie, arXiv:2310.12982",
)
