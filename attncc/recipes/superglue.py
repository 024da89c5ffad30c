"""Sinkhorn attention with dustbins: rows and columns of exp(score) are scaled in turn until both have their sums.

Each of the iterations is two calls for an lse alone, of scores plus an offset for each row and column: nothing M x N is
there, and the cost is that of two forward kernels an iteration. The assignment itself is M x N; a sum over it, such as
the values that a query receives, is one more kernel. SuperGlue's own sizes (2048 x 2048, 100 iterations) fit in memory
as a matrix, and there iterating over the matrix reads less; beyond some 16k keypoints this is what is left.

Source: SuperGlue, arXiv:1911.11763. Without dustbins: attncc.recipes.sinkhorn.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

import attncc as ac
from attncc.recipes.ops import of_every_head
from attncc.runtime.op import AttentionOp

_OFFSETS = {"of_row": ac.Input("b", "h", "q_idx", grad=True), "of_column": ac.Input("b", "h", "kv_idx", grad=True)}


def _shifted(score, b, h, q_idx, kv_idx, of_row, of_column):
    """The scores of one step."""
    return score + of_row[b, h, q_idx] + of_column[b, h, kv_idx]


@functools.cache
def _lse() -> AttentionOp:
    return AttentionOp(ac.Variant(name="sinkhorn_step", score=_shifted, inputs=_OFFSETS).graph)


@functools.cache
def _plan() -> AttentionOp:
    """The weights are exp(score) as they are."""
    plain = ac.Variant(name="sinkhorn_plan", score=_shifted, normalizer=lambda score: ac.exp(score), inputs=_OFFSETS)
    return AttentionOp(plain.graph)


def potentials(
    q: Tensor, k: Tensor, dustbin: Tensor, iterations: int = 100, scale: float | None = None
) -> tuple[Tensor, Tensor, float]:
    """(u, w, norm): the log of the assignment is scores + u + w - norm, with a dustbin as last row and last column.

    q (B, H, M, D), k (B, H or a divisor, N, D), dustbin a scalar; u (B, H, M + 1) and w (B, H, N + 1) in float32.
    """
    (b, heads, m, _), n = q.shape, k.shape[2]
    k = of_every_head(k, heads)
    norm = -math.log(m + n)
    mu = torch.full((m + 1,), norm, device=q.device)
    nu = torch.full((n + 1,), norm, device=q.device)
    mu[-1] += math.log(n)
    nu[-1] += math.log(m)
    w = torch.zeros(b, heads, n + 1, device=q.device)
    u = torch.zeros(b, heads, m + 1, device=q.device)
    for _ in range(iterations):
        u = mu - _sums(q, k, w, dustbin, scale)
        w = nu - _sums(k, q, u, dustbin, scale)
    return u, w, norm


def _sums(q: Tensor, k: Tensor, columns: Tensor, dustbin: Tensor, scale: float | None) -> Tensor:
    """(B, H, M + 1): the log of each row's sum, the dustbin's own row last."""
    rows = torch.zeros(*q.shape[:3], device=q.device)
    inside = _lse()(q, k, k, scale=scale, of_row=rows, of_column=columns[..., :-1], outputs="lse")
    inside = torch.logaddexp(inside, (dustbin + columns[..., -1:]).expand_as(inside))
    return torch.cat([inside, dustbin + columns.logsumexp(-1, keepdim=True)], -1)


def transported(
    q: Tensor, k: Tensor, v: Tensor, u: Tensor, w: Tensor, norm: float, scale: float | None = None
) -> Tensor:
    """(B, H, M, Dv): the values that each query receives by its row of the assignment, the dustbin left out."""
    out: Tensor = _plan()(q, k, v, scale=scale, of_row=u[..., :-1] - norm, of_column=w[..., :-1])
    return out


def assignment(
    q: Tensor, k: Tensor, u: Tensor, w: Tensor, norm: float, dustbin: Tensor, scale: float | None = None
) -> Tensor:
    """(B, H, M + 1, N + 1): the log of the assignment, materialized, for those who must have the matrix."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.nn.functional.pad(factor * (q.float() @ of_every_head(k, q.shape[1]).float().mT), (0, 1, 0, 1))
    beside = torch.zeros_like(scores, dtype=torch.bool)
    beside[..., -1, :] = beside[..., -1] = True
    return torch.where(beside, dustbin, scores) + u[..., None] + w[..., None, :] - norm
