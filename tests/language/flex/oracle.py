"""FlexAttention by PyTorch itself: `flex_attention` for values, its own eager form under autograd for gradients."""

from __future__ import annotations

import torch
from torch._higher_order_ops.flex_attention import math_attention
from torch.nn.attention.flex_attention import create_block_mask, flex_attention, noop_mask


def _identity(score, b, h, q_idx, kv_idx):
    return score


def values(q, k, v, score_mod=None, mask_mod=None, scale=None):
    """(out, lse) of torch.nn.attention.flex_attention.flex_attention."""
    block_mask = None
    if mask_mod is not None:
        sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        block_mask = create_block_mask(mask_mod, *sizes, device="cpu", BLOCK_SIZE=16)
    gqa = q.shape[1] != k.shape[1]
    detached = (t.detach() for t in (q, k, v))
    with torch.no_grad():
        return flex_attention(
            *detached, score_mod=score_mod, block_mask=block_mask, scale=scale, enable_gqa=gqa, return_lse=True
        )


def differentiable(q, k, v, score_mod=None, mask_mod=None, scale=None):
    """`out` by FlexAttention's eager form, with autograd to everything; on a CPU, flex_attention itself has none."""
    mask = (*(None,) * 12, mask_mod or noop_mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return math_attention(q, k, v, score_mod or _identity, mask, scale, {})[0]
