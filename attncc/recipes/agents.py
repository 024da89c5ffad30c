"""Agent attention (arXiv:2312.08874): a few agents gather from all keys, and all queries read from the agents."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from attncc import variants
from attncc.runtime.op import AttentionOp


@cache
def _biased() -> AttentionOp:
    return AttentionOp(variants.get("dense_bias").graph)


def agents(q: Tensor, k: Tensor, v: Tensor, agent: Tensor, gather: Tensor, spread: Tensor) -> Tensor:
    """out (B, H, M, Dv): agent (B, H, A, D), biases gather (B, H, A, N) and spread (B, H, M, A), with sizes of 1 where
    they are the same; all are differentiable. Its depthwise convolution of v is added outside. Linear in M + N.
    """
    op = _biased()
    return op(q, agent, op(agent, k, v, bias=gather), bias=spread)
