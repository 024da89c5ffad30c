"""Multi-token attention: scores, and weights, convolved over neighbours and mixed between heads. Causal.

    scores: hidden ones 0, convolved by pre (H, 1, cq, ck), mixed by pre_mix (H, H), masked, softmax
    weights: convolved by post and mixed by post_mix, hidden ones 0 again; either may be missing

A convolution reaches cq - 1 queries back and (ck - 1) / 2 keys to either side. A block of queries is computed with
those before it that it needs (its halo): (B, H, block + halo, N) scores are there at a time, never M x N. The softmax
and its sum are a generated kernel where no convolution follows; weights that are convolved are plain PyTorch.

Source: Multi-Token Attention, arXiv:2504.00927.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attncc.recipes.ops import by_queries, given_scores


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """Of each head its own, past queries and keys of both sides."""
    cq, ck = kernel.shape[-2:]
    return F.conv2d(F.pad(x, ((ck - 1) // 2, (ck - 1) // 2, cq - 1, 0)), kernel.to(x.dtype), groups=kernel.shape[0])


def _mixed(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("hg,bgmn->bhmn", matrix.to(x.dtype), x)


def multi_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre: Tensor,
    pre_mix: Tensor | None = None,
    post: Tensor | None = None,
    post_mix: Tensor | None = None,
    *,
    scale: float | None = None,
    block: int = 256,
) -> Tensor:
    """(B, H, M, Dv) in q's dtype; scores are float32."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    keys = torch.arange(k.shape[2], device=q.device)
    after = 0 if post is None else post.shape[-2] - 1
    halo = pre.shape[-2] - 1 + after

    def step(start: int, stop: int, first: int, carry: Tensor) -> tuple[Tensor, Tensor]:
        back = min(halo, start)
        rows = q[:, :, start - back : stop].float()
        seen = first + stop - start
        shown = keys <= torch.arange(first - back, seen, device=q.device)[:, None]
        scores = factor * (rows @ k.float().repeat_interleave(group, 1).mT)
        scores = _convolved(torch.where(shown, scores, 0.0), pre)
        scores = scores if pre_mix is None else _mixed(pre_mix, scores)
        if post is None and post_mix is None:
            asked = q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen]
            return given_scores(causal=True)(*asked, scores=scores[:, :, back:, :seen]), carry
        alive = shown.any(-1, keepdim=True)
        weights = torch.where(alive, scores.masked_fill(~shown & alive, -torch.inf), 0.0).softmax(-1) * shown
        weights = weights if post is None else _convolved(weights, post) * shown
        weights = weights if post_mix is None else _mixed(post_mix, weights)
        return (weights[:, :, back:] @ v.float().repeat_interleave(group, 1)).to(q.dtype), carry

    out, _ = by_queries(step, q, k, block, q.new_empty(0))
    return out
