"""Hymba's heads: attention over a window and meta tokens, and a state-space head beside it, each normalized, averaged.

Its state-space half is Mamba's, here in its dual form, with one decay a head and token. Two kernels.

Source: Hymba, arXiv:2411.13676.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attncc.recipes.ops import linear, shipped


def hymba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state_inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    gains: tuple[Tensor, Tensor],
    reach: int = 1024,
    tokens: int = 128,
) -> Tensor:
    """out (B, N, H * Dv). q (B, H, N, D), k, v with as many heads or fewer, the meta tokens' among them.

    state_inputs: (c, b, x, dt, rate) of the variant `ssd`, with as many heads and values as v has for q; gains: two of
    (H * Dv,), of the root mean square norms of all heads' outputs together. reach, tokens: of `meta_tokens`.
    """
    c, b, x, dt, rate = state_inputs
    attended = shipped("meta_tokens")(q, k, v, reach=reach, tokens=tokens)
    carried = linear("ssd")(c, b, x, dt=dt, rate=rate)
    parts = []
    for branch, gain in zip((attended, carried), gains, strict=True):
        wide = branch.float().transpose(1, 2).flatten(2)
        parts.append(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * gain)
    return ((parts[0] + parts[1]) / 2).to(q.dtype)
