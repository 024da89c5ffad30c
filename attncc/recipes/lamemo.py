"""Look-ahead memory (LaMemo, arXiv:2204.07341): what memory attended to is brought up to date with newer tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from attncc.language.variant import Scalar, Variant
from attncc.recipes.merge import merge
from attncc.runtime.op import AttentionOp


def _to_the_right(q_idx: Any, kv_idx: Any, first: Any) -> Any:
    """Key kv_idx lies at position first + kv_idx of the memory and what follows it."""
    return kv_idx + first > q_idx


@cache
def _right_context() -> AttentionOp:
    return AttentionOp(Variant(name="right_context", mask=_to_the_right, inputs={"first": Scalar(1)}).graph)


def lamemo(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, first: int, op: AttentionOp | None = None, **inputs: Any
) -> tuple[Tensor, Tensor]:
    """The memory's (out, lse) with its new right context: q (B, Hq, M, Dqk) of the memory's tokens, out and lse what
    they attended to so far (stored, usually detached), k and v of the tokens from position `first` of the memory on.

    `op` computes the new part, with a Scalar `first` and `inputs` of its own, such as relative positions; by default it
    is plain softmax over the keys to the right of each query. The share of each part is differentiable through lse.
    """
    op = _right_context() if op is None else op
    return merge((out, lse), op(q, k, v, outputs=("out", "lse"), first=first, **inputs))
