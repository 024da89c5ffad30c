"""Reversed attention: each key (a child) spreads its message over the queries (its parents), by weights that sum to 1.

Inputs: gate (B, H, N), or with sizes of 1 that broadcast: what each child sends of its value. It receives a gradient.
"""

import attncc as ac


def over_queries(score, col):
    """Softmax over the queries that see a key."""
    p = ac.exp(score - col.max(score))
    return p / col.sum(p)


def gated(weight, v_vec, row, b, h, kv_idx, gate):
    """What a parent receives."""
    return row.sum(weight * gate[b, h, kv_idx] * v_vec)


reversed = ac.Variant(
    name="reversed",
    normalizer=over_queries,
    reduction=gated,
    inputs={"gate": ac.Input("b", "h", "kv_idx", grad=True)},
    cites="Visual Dependency Transformers, arXiv:2304.03282",
)
