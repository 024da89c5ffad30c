"""Scores of any function of a query and a key, for those that no formula of sums over the head dimension says, and for
reading weights with gradients: larger networks, relations.

What `sum_d` says of q_vec and k_vec together is one kernel, without such blocks: the variants `additive` and
`l1_distance`, the recipe `neural`. Here a block of queries has its scores made by PyTorch, and made again for the
backward; softmax and the sum of values are a generated kernel. What the function makes for a block is there once:
(B, H, block, N, D) numbers for an additive score. Wise up to some thousands of keys.

Sources: Bahdanau et al., arXiv:1409.0473; Luong et al., arXiv:1508.04025; Neural Attention, arXiv:2502.17206.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attncc.recipes.ops import by_queries, given_scores


def pairwise(
    scores: Callable[[Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    block: int = 64,
    received: bool = False,
) -> Any:
    """(B, H, M, Dv) of scores(q (B, H, rows, D), k (B, H, N, D)) -> (B, H, rows, N), in float32. -inf hides a pair.

    `received`: and (B, H, N), the sum of the weights that each key gets, which has a gradient, too.
    """
    group = q.shape[1] // k.shape[1]

    def step(start: int, stop: int, first: int, carry: Tensor) -> tuple[Tensor, Tensor]:
        rows = q[:, :, start:stop]
        seen = first + stop - start if causal else k.shape[2]
        keys = k[:, :, :seen]
        made = scores(rows.float(), keys.float().repeat_interleave(group, 1))
        out = given_scores(causal)(rows, keys, v[:, :, :seen], scores=made)
        return out, carry + _column_sums(made, causal, k.shape[2]) if received else carry

    sums = q.new_zeros((*q.shape[:2], k.shape[2]), dtype=torch.float32)
    out, sums = by_queries(step, q, k, block, sums, causal=causal)
    return (out, sums) if received else out


def _column_sums(scores: Tensor, causal: bool, kv_len: int) -> Tensor:
    """The weight that each key receives from a block of queries. `causal`: the block's last query is at its last
    key."""
    rows, seen = scores.shape[2:]
    if causal:
        visible = torch.ones(rows, seen, dtype=torch.bool, device=scores.device).tril(seen - rows)
        scores = scores.masked_fill(~visible, -torch.inf)
    dead = scores.isneginf().all(-1, keepdim=True)
    weights = scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
    return torch.nn.functional.pad(weights.sum(2), (0, kv_len - seen))


def additive(v_a: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """v_a . tanh(q + k), with v_a (H, D); q = W_a s and k = U_a h are made before."""
    return lambda q, k: torch.einsum("bhmnd,hd->bhmn", torch.tanh(q.unsqueeze(3) + k.unsqueeze(2)), v_a.float())


def network(w2: Tensor, b2: Tensor, w3: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """w3 . relu(W2 relu(q + k) + b2): q and k are the parts of the first layer; w2 (units, D), b2 and w3 (units)."""

    def scores(q: Tensor, k: Tensor) -> Tensor:
        hidden = torch.relu(q.unsqueeze(3) + k.unsqueeze(2))
        return torch.relu(hidden @ w2.float().mT + b2.float()) @ w3.float()

    return scores
