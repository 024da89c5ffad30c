"""Normalizers over whole rows of scores in plain PyTorch, in forms that are not attncc's: -inf is a hidden key."""

from __future__ import annotations

import torch
from torch import Tensor


def sorted_sparsemax(z: Tensor) -> Tensor:
    """Rows of z (-inf is hidden, at least one is not) on the simplex; Martins and Astudillo, algorithm 1."""
    ordered = z.sort(-1, descending=True).values
    count = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    total = ordered.where(ordered > -torch.inf, 0.0).cumsum(-1)
    size = (1 + count * ordered > total).sum(-1, keepdim=True)
    tau = (total.gather(-1, size - 1) - 1) / size
    return (z - tau).clamp(min=0)


def sorted_entmax15(z: Tensor) -> Tensor:
    """Peters, Niculae and Martins, algorithm 2: tau from the mean and the spread of the largest entries."""
    z = z / 2
    ordered = z.sort(-1, descending=True).values
    known = ordered > -torch.inf
    finite = ordered.where(known, 0.0)
    count = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    mean = finite.cumsum(-1) / count
    spread = count * (finite.square().cumsum(-1) / count - mean.square())
    inside = ((1 - spread) / count).clamp(min=1e-300)
    candidates = mean - inside.sqrt()
    size = ((candidates <= ordered) & known & (spread <= 1)).sum(-1, keepdim=True)
    return (z - candidates.gather(-1, size - 1)).clamp(min=0).square()


def near_the_largest(s: Tensor, share: float = 0.02) -> Tensor:
    m = s.amax(-1, keepdim=True)
    p = torch.where(s >= m + torch.tensor(share, dtype=s.dtype).log(), (s - m).exp(), 0.0)
    return p / p.sum(-1, keepdim=True)


def over_threshold(s: Tensor, theta: Tensor, dense: Tensor) -> Tensor:
    """Softmax over the scores above theta; rows where `dense` holds keep all. A row that keeps none is 0."""
    kept = (s > theta) | (dense & (s > -torch.inf))
    empty = ~kept.any(-1, keepdim=True)
    return s.masked_fill(~kept & ~empty, -torch.inf).softmax(-1).masked_fill(empty, 0.0)
