"""Weighted grouped queries: a group's key and value heads are summed with learned weights, before grouped attention.

Pooled keys and values are (B, G, N, D), as projections of G heads would be; after training the weights fold into those.

Source: Weighted Grouped Query Attention, arXiv:2407.10855.
"""

from __future__ import annotations

from torch import Tensor

from attncc.runtime.op import AttentionOp


def weighted_groups(
    op: AttentionOp, q: Tensor, k: Tensor, v: Tensor, key_weights: Tensor, value_weights: Tensor, groups: int
) -> Tensor:
    """Grouped attention over sums of heads. k, v (B, H, N, ..); weights (H, 1, 1), (H, 1, D) or (H, N, 1)."""
    pooled = ((x * w).unflatten(1, (groups, -1)).sum(2) for x, w in ((k, key_weights), (v, value_weights)))
    out: Tensor = op(q, *pooled)
    return out
