"""Selective attention: what head 0 asks to forget is taken from the scores of all later queries, in every head. Causal.

    S_ij = relu(score_ij of head 0), but 0 at j = i and j = 0;  F_ij = sum_{r < i} S_rj;  softmax(score - F)

The sum over earlier queries is a carry of one number a key from block to block; within a block F is (B, 1, block, N)
and a dense bias of the kernel. With one block of all queries F is materialized whole, which is wise below a few
thousand tokens; the default takes B * 512 * N floats.

Source: Selective Attention Improves Transformer, arXiv:2410.02703.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attncc.recipes.ops import by_queries, causal_bias


def selective(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, block: int = 512) -> Tensor:
    """(B, H, M, Dv) in q's dtype; the carry is float32."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    keys = torch.arange(k.shape[2], device=q.device)

    def step(start: int, stop: int, first: int, carry: Tensor) -> tuple[Tensor, Tensor]:
        rows = q[:, :, start:stop]
        seen = first + stop - start
        at = torch.arange(first, seen, device=q.device)[:, None]
        scores = factor * (rows[:, :1].float() @ k[:, :1].float().mT)
        asked = torch.where((keys < at) & (keys > 0), scores.relu(), 0.0)
        forgotten = carry + asked.cumsum(2) - asked
        out = causal_bias()(rows, k[:, :, :seen], v[:, :, :seen], scale=scale, bias=-forgotten[..., :seen])
        return out, carry + asked.sum(2, keepdim=True)

    none = torch.zeros(q.shape[0], 1, 1, k.shape[2], device=q.device)
    out, _ = by_queries(step, q, k, block, none)
    return out
