"""Fastformer: additive attention by pooling, once over queries and once over keys. Two kernels of one query each, O(N).

    global query = pool(q, w_q . q);  p = global query * k;  global key = pool(p, w_k . p);  out = global key * q

Padding is dropped by `keep`; the authors add -10000, which differs where a whole sequence is padding.

Source: Fastformer, arXiv:2108.09084.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attncc.recipes.ops import shipped


def fastformer(q: Tensor, k: Tensor, w_q: Tensor, w_k: Tensor, keep: Tensor | None = None) -> Tensor:
    """(B, H, N, D), of the value that is q, before the output layer and the residual.

    q, k (B, H, N, D); w_q, w_k (H, H * D), which read the concatenated heads; keep (B, N), 0 for padding.
    """
    query = _pooled(q, w_q, keep)
    products = query * k
    return _pooled(products, w_k, keep) * q


def _pooled(x: Tensor, weights: Tensor, keep: Tensor | None) -> Tensor:
    """(B, H, 1, D): the softmax-weighted sum of x over its length."""
    batch, _, length, dim = x.shape
    energy = torch.einsum("bnc,hc->bhn", x.transpose(1, 2).flatten(2).to(weights.dtype), weights) * dim**-0.5
    kept = x.new_ones(batch, 1, length, dtype=torch.int32) if keep is None else keep[:, None].int()
    out: Tensor = shipped("pooling")(x[:, :, :1], x, x, energy=energy, keep=kept)
    return out
