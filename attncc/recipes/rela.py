"""The block of rectified linear attention: the kernel of `rela`, then a norm over all heads with an optional gate.

The norm reads every head of a token, so that it is an operation behind the kernel, O(M H Dv).

Source: Sparse Attention with Linear Units, arXiv:2104.07012.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attncc.recipes.ops import shipped


def rela_block(q: Tensor, k: Tensor, v: Tensor, gain: Tensor, gate: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """(B, M, H * Dv): gain (H * Dv) times the root-mean-square norm; with `gate` (H * Dv) also sigmoid(gate * x)."""
    x = shipped("rela")(q, k, v).transpose(1, 2).flatten(2)
    normed = gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    found: Tensor = normed if gate is None else normed * torch.sigmoid(gate * x)
    return found
