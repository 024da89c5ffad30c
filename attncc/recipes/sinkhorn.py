"""Doubly stochastic attention (Sinkformers, arXiv:2110.11773): rows and columns of the weights are made to sum to 1 in
turn. Each turn is the lse of one op: nothing of M x N is kept."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from attncc.language import functions as fn
from attncc.language.variant import Input, Variant
from attncc.recipes.ops import of_every_head
from attncc.runtime.op import AttentionOp


def _shifted_by_key(score: Any, b: Any, h: Any, kv_idx: Any, shift: Any) -> Any:
    return score - shift[b, h, kv_idx]


def _weights(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, of_row: Any, of_key: Any) -> Any:
    return fn.exp(score - of_row[b, h, q_idx] - of_key[b, h, kv_idx])


@cache
def _ops() -> tuple[AttentionOp, AttentionOp]:
    turn = Variant(name="sinkhorn_turn", score=_shifted_by_key, inputs={"shift": Input("b", "h", "kv_idx", grad=True)})
    inputs = {"of_row": Input("b", "h", "q_idx", grad=True), "of_key": Input("b", "h", "kv_idx", grad=True)}
    weigh = Variant(name="sinkhorn_weights", normalizer=_weights, inputs=inputs)
    return AttentionOp(turn.graph), AttentionOp(weigh.graph)


def sinkhorn(q: Tensor, k: Tensor, v: Tensor, turns: int = 3) -> Tensor:
    """out (B, H, M, Dv), without a mask: q (B, H, M, D), k and v with as many heads or a divisor of them, and then each
    of a group has columns of its own. `turns` counts the normalizations, of rows first; one is softmax. Differentiable
    through all of them; each keeps one number a row or a column.
    """
    turn, weigh = _ops()
    batch, heads, q_len, _ = q.shape
    k, v = of_every_head(k, heads), of_every_head(v, heads)
    of_row = q.new_zeros((batch, heads, q_len), dtype=torch.float32)
    of_key = q.new_zeros((batch, heads, k.shape[2]), dtype=torch.float32)
    nothing = {n: q.new_ones(1).expand(batch, heads, n, 1) for n in (q_len, k.shape[2])}
    for number in range(turns):
        if number % 2 == 0:
            of_row = turn(q, k, nothing[k.shape[2]], shift=of_key, outputs="lse")
        else:
            of_key = turn(k, q, nothing[q_len], shift=of_row, outputs="lse")
    return weigh(q, k, v, of_row=of_row, of_key=of_key)
