"""Position-invariant inference (PINE, arXiv:2407.01100): documents whose order does not matter.

For each query and head the documents are sorted by how much attention their keys would get without positions, and
placed so that the most important one is the nearest. Rotations are relative: instead of rotating all keys anew for
every query, each document's keys are rotated once from position 0 on, and the query once a document.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from attncc import variants
from attncc.language.variant import Input, Variant
from attncc.recipes.merge import merge
from attncc.runtime.op import AttentionOp


@cache
def _plain() -> AttentionOp:
    return AttentionOp(variants.get("full").graph)


def _not_later(q_idx: Any, kv_idx: Any, now: Any, at: Any) -> Any:
    return at[kv_idx] <= now[q_idx]


@cache
def _earlier() -> AttentionOp:
    inputs = {"now": Input("q_idx", dtype="int"), "at": Input("kv_idx", dtype="int")}
    return AttentionOp(Variant(name="earlier", mask=_not_later, inputs=inputs).graph)


def rotate(x: Tensor, position: Tensor, theta: Tensor) -> Tensor:
    """Rotary positions with the halves of the head dimension as pairs: x (..., D), position broadcast to (...), theta
    (D / 2,) angles a position."""
    a, b = x.chunk(2, -1)
    angle = position.unsqueeze(-1).to(theta) * theta
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def pine(q: Tensor, k: Tensor, v: Tensor, document: Tensor, position: Tensor, theta: Tensor) -> Tensor:
    """out (B, Hq, M, Dv): q (B, Hq, M, D), k and v as yet without positions; for inference, without gradients.

    document (N,): 0, 1, ... for the keys of documents, which lie together, and -1 for others, such as a prompt before
    and tokens after: those keep their index as position, and a query sees them where that is at most its own.
    position (M,): of each query, behind all documents. Memory: (B, Hq, M, documents) beside the tensors.
    """
    with torch.no_grad():
        region = document >= 0
        count = int(document.max()) + 1
        lengths = torch.bincount(document[region], minlength=count)
        end = int(region.nonzero().max()) + 1
        # each document's mean share of the attention to documents, without positions: its keys' one-hot rows as v
        member = torch.nn.functional.one_hot(document[region], count) / lengths
        member = member.to(k.dtype).expand(*k.shape[:2], -1, -1).contiguous()
        importance = _plain()(q, k[:, :, region].contiguous(), member)
        order = importance.argsort(dim=-1, descending=True, stable=True)
        sorted_lengths = lengths[order]
        behind = (sorted_lengths.cumsum(-1) - sorted_lengths).gather(-1, order.argsort(dim=-1))
        results = []
        for d in range(count):
            own = (document == d).nonzero().squeeze(1)
            local = torch.arange(len(own), device=k.device)
            start = end - behind[..., d] - lengths[d]
            q_own, k_own = rotate(q, position - start, theta), rotate(k[:, :, own], local, theta)
            results.append(_plain()(q_own, k_own, v[:, :, own].contiguous(), outputs=("out", "lse")))
        rest = (~region).nonzero().squeeze(1)
        if len(rest):
            q_own, k_own = rotate(q, position, theta), rotate(k[:, :, rest], rest, theta)
            now, at = position.to(torch.int32), rest.to(torch.int32)
            results.append(_earlier()(q_own, k_own, v[:, :, rest].contiguous(), outputs=("out", "lse"), now=now, at=at))
        return merge(*results)[0]
