"""Monotonic attention in training: the expected alignment, row after row, and soft attention within what was read.

    alpha_i = p_i * (the probability that the reader reaches the key, given alpha_{i-1})
    beta = e^u revcumsum(alpha / cumsum e^u)

A row depends on the row before it: no tile of queries can be computed alone, and there is no online form. The
(B, H, M, N) matrices are materialized, in scans over keys that PyTorch has, M of them; the sum of values is a matmul.
That is wise for the hundreds of tokens of a speech segment.

Source: Efficient Monotonic Multihead Attention, arXiv:2312.04515.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expected_alignment(p: Tensor) -> Tensor:
    """(B, H, M, N) of stopping probabilities alike; without the division whose small denominators lose float32."""
    passed = torch.cat([torch.zeros_like(p[..., :1]), torch.log1p(-p.clamp(max=1 - 1e-7)).cumsum(-1)[..., :-1]], -1)
    before = torch.full_like(p[..., 0, :], -torch.inf)
    before[..., 0] = 0.0  # the reader starts at the first key
    rows = []
    for i in range(p.shape[-2]):
        reached = torch.logcumsumexp(before - passed[..., i, :], -1) + passed[..., i, :]
        before = p[..., i, :].log() + reached
        rows.append(before)
    return torch.stack(rows, -2).exp()


def monotonic(p: Tensor, energy: Tensor, v: Tensor) -> Tensor:
    """(B, H, M, Dv) of stopping probabilities and soft energies (B, H, M, N), with infinite look-back."""
    soft = torch.exp(energy - energy.amax(-1, keepdim=True))
    shares = expected_alignment(p) / soft.cumsum(-1)
    return (soft * shares.flip(-1).cumsum(-1).flip(-1)) @ v
