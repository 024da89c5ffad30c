"""The whole attention of the Differential Transformer (arXiv:2410.05258): two maps, their difference, a norm a head."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from attncc import variants
from attncc.runtime.op import AttentionOp


@cache
def _differential() -> AttentionOp:
    return AttentionOp(variants.get("differential").graph)


def diff_transformer(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, gain: Tensor, lam_init: float) -> Tensor:
    """out (B, H, M, Dv), causal: q (B, 2H, M, D) and k (B, 2Hkv, N, D) with the heads of a pair beside each other, as
    the authors have them, v (B, Hkv, N, Dv). lam (H,), or () for all heads; gain (Dv,), shared by heads, of the root
    mean square norm over each head's output, which is then multiplied by 1 - lam_init. One kernel, and the norm behind.
    """
    heads = q.shape[1] // 2
    q, k = (x.unflatten(1, (-1, 2)).transpose(2, 3).flatten(3) for x in (q, k))
    out = _differential()(q, k, v, lam=lam.float().expand(heads))
    wide = out.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    return (normed * gain * (1 - lam_init)).to(out.dtype)
