"""Sparse steps between dense ones: masked attention times the mass it had, plus what it missed at the last dense step.

    refresh: rho = exp(lse_masked - lse_full), rest = out_full - rho out_masked;  later: rho' out_masked + rest

One kernel a step, and two at a refresh; for inference.

Source: Re-ttention, arXiv:2505.22918.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attncc.recipes.ops import shipped
from attncc.runtime.op import AttentionOp


def refresh(masked: AttentionOp, q: Tensor, k: Tensor, v: Tensor, **inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(out, rho, rest) of a dense step: rho (B, H, M, 1), float32, and rest (B, H, M, Dv) are for steps to come."""
    full, lse = shipped("full")(q, k, v, outputs=("out", "lse"))
    part, own = masked(q, k, v, outputs=("out", "lse"), **inputs)
    rho = torch.exp(own - lse)[..., None]
    return full, rho, full - rho.to(full.dtype) * part


def rescaled(masked: AttentionOp, q: Tensor, k: Tensor, v: Tensor, rho: Tensor, rest: Tensor, **inputs: Any) -> Tensor:
    """The output of a sparse step; the authors raise rho by 0.04 each."""
    out: Tensor = rho.to(q.dtype) * masked(q, k, v, **inputs) + rest
    return out
