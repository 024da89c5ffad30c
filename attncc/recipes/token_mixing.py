"""Mixing of tokens beside or before attention: matmuls and scans in which nothing depends on pairs of q and k.

Sources: You Need to Pay Better Attention, arXiv:2403.01643; Deconstructing Attention, arXiv:2510.11602; Attention as an
RNN, arXiv:2405.13956; Scratching Visual Transformer's Back with Uniform Attention, arXiv:2210.08457.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attncc.recipes.ops import shipped


def left_multiplied(w: Tensor, x: Tensor, causal: bool = False) -> Tensor:
    """Super attention's values, and the MLP that mixes tokens: a learned (N, N) matrix times x (B, .., N, D)."""
    return (w.tril() if causal else w) @ x


def mixed_with_mean(x: Tensor, gain: Tensor | None = None) -> Tensor:
    """Context broadcasting, (B, N, D): x and the mean of all tokens, halved; or the mean times a gain (D)."""
    mean = x.mean(1, keepdim=True)
    return (x + mean) / 2 if gain is None else x + gain * mean


def keys_alone(s: Tensor, v: Tensor) -> Tensor:
    """(B, H, N, Dv): the causal softmax of scores (B, H, N) that depend on the key alone, by a scan, O(N)."""
    most = s.cummax(-1).values
    # a factor of each key would overflow for long rows; the running maximum is taken out block by block
    top, total, weighed = s.new_full((*s.shape[:-1], 1), -torch.inf), s.new_zeros(()), v.new_zeros(())
    parts = []
    for start in range(0, s.shape[-1], 64):
        block = s[..., start : start + 64]
        peak = torch.maximum(top, most[..., start : start + 64])
        behind = torch.ones(2 * [block.shape[-1]], dtype=torch.bool, device=s.device).tril()
        own = torch.where(behind, block[..., None, :] - peak[..., :, None], -torch.inf).exp()
        kept = torch.exp(top - peak)
        sums = kept * total + own.sum(-1)
        out = kept[..., None] * weighed + own @ v[..., start : start + 64, :]
        parts.append(out / sums[..., None])
        top, total, weighed = peak[..., -1:], sums[..., -1:], out[..., -1:, :]
    return torch.cat(parts, -2)


def one_query(token: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, N, Dv): a learned query (H, D) at every position, causal: the attention that is an RNN.

    The kernel reads one row of q, by a stride of 0; `keys_alone` has the same values by a scan.
    """
    q = token[None, :, None].expand(k.shape[0], -1, k.shape[2], -1)
    out: Tensor = shipped("causal")(q, k, v)
    return out
