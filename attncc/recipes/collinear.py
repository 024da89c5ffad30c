"""Collinear constrained attention: a key is a length along the query's own direction; the score is a dot product.

    score_mn = sum_l |q_m,l|^2 t_n,l cos((m - n) theta_l) / sqrt(D),  t = relu((t1 + t2) / 2) of each rotary pair

Everything happens to q and t before the op. The released code multiplies (q * R q) (R t), another function; this is the
paper's.

Source: Collinear Constrained Attention, arXiv:2309.08646.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attncc.runtime.op import AttentionOp


def collinear(op: AttentionOp, q: Tensor, t: Tensor, v: Tensor, theta: Tensor) -> Tensor:
    """(B, H, M, Dv). q (B, H, M, D) and t (B, Hkv, N, D) in halves, theta (D / 2): the angle of a position."""
    first, second = q.chunk(2, -1)
    lengths = torch.relu(torch.stack(t.chunk(2, -1)).mean(0))
    out: Tensor = op(
        _turned(first**2 + second**2, theta, t.shape[2] - q.shape[2]), _turned(lengths, theta, 0), v,
        scale=q.shape[-1] ** -0.5,
    )  # fmt: skip
    return out


def _turned(x: Tensor, theta: Tensor, first: int) -> Tensor:
    """(x cos, x sin) at positions from `first` on."""
    angle = torch.arange(first, first + x.shape[2], device=x.device)[:, None] * theta
    return torch.cat([x * angle.cos(), x * angle.sin()], -1).to(x.dtype)
