"""Linear attention by feature maps that no kernel makes: features in PyTorch, O(N) memory of their size, one op behind.

Sources: Linear Transformers Are Secretly Fast Weight Programmers, arXiv:2102.11174; Linear Log-Normal Attention,
arXiv:2311.13541; MALA, arXiv:2507.00698; FAST, arXiv:2402.07901.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import attncc as ac
from attncc.recipes.ops import linear, of_features
from attncc.runtime.compile import compile as compile_variant
from attncc.runtime.linear import LinearOp
from attncc.runtime.op import AttentionOp

#: the published fit of the variance of a log-normal product: Linear Log-Normal Attention, its code's a and b
_SLOPE, _SHIFT = 0.14855178144710912, -0.35487039130661086


def dpfp(x: Tensor, nu: int = 1) -> Tensor:
    """Deterministic parameter-free projection: (.., D) to (.., 2 D nu), products of what is apart by up to nu."""
    halves = torch.cat([F.relu(x), F.relu(-x)], -1)
    return torch.cat([halves * halves.roll(i, -1) for i in range(1, nu + 1)], -1)


def fast_weights(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None = None, nu: int = 1, eps: float = 1e-5) -> Tensor:
    """out (B, H, N, Dv), causal: fast weights over DPFP features that sum to 1, with the additive rule, or with the
    delta rule where its rates beta (B, H, N) are given."""

    def features(x: Tensor) -> Tensor:
        y = dpfp(x.float(), nu)
        return (y / (y.sum(-1, keepdim=True) + eps)).to(x.dtype)

    query, key, scale = features(q), features(k), v.shape[-1] ** -0.5
    if beta is None:
        out: Tensor = of_features(True, False)(query, key, v, scale=scale)
        return out
    written: Tensor = linear("delta_net")(query, key, v, beta=beta, scale=scale)
    return written


def lln(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Linear log-normal attention, (B, H, M, Dv): exp of q and k as features, scaled so that the weights' moments are
    softmax's. The scales count as constants; they are those of the whole tensors, so that a token knows of later ones.
    """
    wide_q, wide_k = q.float(), k.float()
    of_q, of_k = wide_q.detach().std(), wide_k.detach().std()
    wanted = ((of_q.square() * of_k.square() - _SHIFT) / (2 * _SLOPE)).sqrt()
    wide_q, wide_k = wide_q * (wanted / of_q), wide_k * (wanted / of_k)
    # what is subtracted cancels in the ratio
    query = (wide_q - wide_q.detach().amax(-1, keepdim=True)).exp()
    key = (wide_k - wide_k.detach().amax((-2, -1), keepdim=True)).exp()
    out: Tensor = of_features(causal, True)(query.to(q.dtype), key.to(k.dtype), v, scale=1.0)
    return out


def lln_diag(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mean of `lln` and of softmax attention within blocks of D tokens: two kernels."""
    near: Tensor = _blocks()(q, k, v, width=q.shape[-1])
    return (lln(q, k, v) + near) / 2


def mala(q: Tensor, k: Tensor, v: Tensor, rotate: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Magnitude-aware linear attention, (B, H, N, Dv): weights (1 + 1/s) f(q).f(k) - s/N with f = elu + 1 and s the
    row's sum of products, so that they sum to 1. `rotate` turns the features behind the sums, as the authors do.
    One kernel, and means of k and v.
    """
    query, key = F.elu(q.float()) + 1, F.elu(k.float()) + 1
    scale = q.shape[-1] ** -0.5
    mean = (query @ key.mean(2, keepdim=True).mT) * scale
    if rotate is not None:
        query, key = rotate(query), rotate(key)
    product = of_features(False, False)(query.to(q.dtype), key.to(k.dtype), v, scale=scale / k.shape[2])
    found = product.float() * (1 + 1 / (mean + 1e-6)) - mean * v.float().mean(2, keepdim=True)
    return found.to(v.dtype)


def fastmax(q: Tensor, k: Tensor, v: Tensor, p: int = 2, limit: float = 1.0, causal: bool = False) -> Tensor:
    """FAST, (B, H, M, Dv): 1 + s, and s^2 / 2 where p is 2, over its sum, with q and k over their longest token's
    length, times `limit`. That length is one of the whole sequence: with `causal`, too, a token knows of later ones.
    """

    def bounded(x: Tensor) -> Tensor:
        wide = x.float()
        longest = wide.norm(dim=-1).amax(-1)[..., None, None]
        return (limit * wide / longest).to(x.dtype)

    out: Tensor = _polynomial(p, causal)(bounded(q), bounded(k), v, scale=1.0)
    return out


@functools.cache
def _blocks() -> AttentionOp:
    """Softmax within blocks of tokens."""
    variant = ac.Variant(
        name="blocks",
        mask=lambda q_idx, kv_idx, width: q_idx // width == kv_idx // width,
        inputs={"width": ac.Scalar(64)},
    )
    return AttentionOp(variant.graph)


@functools.cache
def _polynomial(p: int, causal: bool) -> AttentionOp | LinearOp:
    def line(score, row):
        return (1 + score) / row.sum(1 + score)

    mask = ac.causal if causal else None
    op = compile_variant(ac.Variant(name=f"fast_{p}", mask=mask, normalizer=ac.taylor if p == 2 else line))
    assert isinstance(op, AttentionOp | LinearOp)
    return op
