"""The PyTorch operators of all plans of degree 2: `attncc::square_forward` and `attncc::square_backward`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attncc.runtime.linear_library import like
from attncc.runtime.square_engine import SquareEngine

_engines: dict[str, SquareEngine] = {}


def register(key: str, engine: SquareEngine) -> str:
    """Give an engine a name in the operators' schema. Equal keys mean equal engines."""
    _engines.setdefault(key, engine)
    return key


@torch.library.custom_op("attncc::square_forward", mutates_args=())
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    powers: list[float],
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    stepwise: bool,
    chunk: int | None,
    want_last: bool,
    key: str,
) -> list[Tensor]:
    """The sums of weighted values and of weights, float32, and the last state (empty where it is not wanted)."""
    sums, total, last = _engines[key].forward(q, k, v, powers, initial, cu_seqlens, stepwise, chunk, want_last)
    return [sums, total, total.new_empty(0) if last is None else last]


@forward_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    powers: list[float],
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    stepwise: bool,
    chunk: int | None,
    want_last: bool,
    key: str,
) -> list[Tensor]:
    heads = q.shape[1]
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (sequences, heads, *_engines[key].state_shape(q.shape[3], v.shape[3]))
    total = q.new_empty(q.shape[:3], dtype=torch.float32)
    return [like(q, heads, v.shape[3]).float(), total, total.new_empty(state if want_last else (0,))]


@torch.library.custom_op("attncc::square_backward", mutates_args=())
def backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    powers: list[float],
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int | None,
    dsums: Tensor,
    dtotal: Tensor,
    dlast: Tensor | None,
    want_initial: bool,
    key: str,
) -> list[Tensor]:
    """dq, dk, dv and that of the initial state; empty where it is not wanted."""
    call = (q, k, v, powers, initial, cu_seqlens, chunk, dsums, dtotal, dlast, want_initial)
    dq, dk, dv, first = _engines[key].backward(*call)
    return [dq, dk, dv, dtotal.new_empty(0) if first is None else first]


@backward_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    powers: list[float],
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int | None,
    dsums: Tensor,
    dtotal: Tensor,
    dlast: Tensor | None,
    want_initial: bool,
    key: str,
) -> list[Tensor]:
    first = torch.empty_like(initial) if want_initial and initial is not None else dtotal.new_empty(0)
    return [*(like(x, x.shape[1], x.shape[3]) for x in (q, k, v)), first]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, powers, initial, cu_seqlens, _, chunk, want_last, key = inputs
    ctx.save_for_backward(q, k, v, initial, cu_seqlens)
    ctx.call = (powers, chunk, want_last, key)
    ctx.want_initial = initial is not None and initial.requires_grad


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    q, k, v, initial, cu_seqlens = ctx.saved_tensors
    powers, chunk, want_last, key = ctx.call
    dsums, dtotal, dlast = grads
    if dsums is None:
        dsums = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=torch.float32)
    if dtotal is None:
        dtotal = q.new_zeros(q.shape[:3], dtype=torch.float32)
    dq, dk, dv, dinitial = backward_op(
        *(q, k, v, powers, initial, cu_seqlens, chunk, dsums, dtotal, dlast if want_last else None),
        *(ctx.want_initial, key),
    )
    return dq, dk, dv, None, dinitial if ctx.want_initial else None, None, None, None, None, None


forward_op.register_autograd(_backward, setup_context=_setup)
