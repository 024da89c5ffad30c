"""The PyTorch operators of all chunk plans: `attncc::linear_forward` and `attncc::linear_backward`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attncc.runtime.linear_engine import LinearEngine

_engines: dict[str, LinearEngine] = {}


def register(key: str, engine: LinearEngine) -> str:
    """Give an engine a name in the operators' schema. Equal keys mean equal engines."""
    _engines.setdefault(key, engine)
    return key


def like(x: Tensor, heads: int, last: int) -> Tensor:
    """As the generated modules lay results out."""
    b, _, length, _ = x.shape
    if x.transpose(1, 2).is_contiguous() and not x.is_contiguous():
        return x.new_empty((b, length, heads, last)).transpose(1, 2)
    return x.new_empty((b, heads, length, last))


@torch.library.custom_op("attncc::linear_forward", mutates_args=())
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: list[Tensor],
    constant: float,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    stepwise: bool,
    chunk: int | None,
    want_last: bool,
    then_backward: bool,
    wanted: list[bool],
    key: str,
) -> list[Tensor]:
    """out, the row totals (empty where there are none), the last state (empty where it is not wanted), and what is kept
    for the backward."""
    call = (q, k, v, rows, constant, initial, cu_seqlens, stepwise, chunk, want_last, then_backward, wanted)
    *found, kept = _engines[key].forward(*call)
    # a schema's list of tensors has no place for None
    return [*(q.new_empty(0, dtype=torch.float32) if x is None else x for x in found), *kept]


@forward_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: list[Tensor],
    constant: float,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    stepwise: bool,
    chunk: int | None,
    want_last: bool,
    then_backward: bool,
    wanted: list[bool],
    key: str,
) -> list[Tensor]:
    engine = _engines[key]
    heads = q.shape[1]
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (sequences, heads, *engine.state_shape(q.shape[3], v.shape[3]))
    total = q.new_empty(q.shape[:3] if engine.plan.total else (0,), dtype=torch.float32)
    last = q.new_empty(state if want_last else (0,), dtype=torch.float32)
    keep = engine.widths(q, v, chunk) if then_backward and not stepwise else ()
    return [like(q, heads, v.shape[3]), total, last, *(q.new_empty((*q.shape[:3], size)) for size in keep)]


@torch.library.custom_op("attncc::linear_backward", mutates_args=())
def backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: list[Tensor],
    constant: float,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int | None,
    out: Tensor | None,
    total: Tensor,
    kept: list[Tensor],
    dout: Tensor,
    dlast: Tensor | None,
    wanted: list[bool],
    want_initial: bool,
    key: str,
) -> list[Tensor]:
    """dq, dk, dv, that of the initial state, then those of the rows; empty where they are not wanted."""
    engine = _engines[key]
    row_totals = total if engine.plan.total else None
    call = (q, k, v, rows, constant, initial, cu_seqlens, chunk, out, row_totals, kept, dout, dlast)
    dq, dk, dv, dinitial, drows = engine.backward(*call, wanted, want_initial)
    return [q.new_empty(0, dtype=torch.float32) if x is None else x for x in (dq, dk, dv, dinitial, *drows)]


@backward_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: list[Tensor],
    constant: float,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int | None,
    out: Tensor | None,
    total: Tensor,
    kept: list[Tensor],
    dout: Tensor,
    dlast: Tensor | None,
    wanted: list[bool],
    want_initial: bool,
    key: str,
) -> list[Tensor]:
    none = q.new_empty(0, dtype=torch.float32)
    first = torch.empty_like(initial, dtype=torch.float32) if want_initial and initial is not None else none
    drows = [torch.empty_like(r) if want else none for r, want in zip(rows, wanted, strict=True)]
    return [*(like(x, x.shape[1], x.shape[3]) for x in (q, k, v)), first, *drows]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, rows, constant, initial, cu_seqlens, _, chunk, want_last, *_, key = inputs
    out, total, _, *kept = output
    needed = out if _engines[key].plan.total else None
    ctx.save_for_backward(q, k, v, initial, cu_seqlens, needed, total, *kept, *rows)
    ctx.rows = len(rows)
    ctx.call = (constant, chunk, want_last, key)
    ctx.wanted = [r.requires_grad for r in rows]
    ctx.want_initial = initial is not None and initial.requires_grad


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    q, k, v, initial, cu_seqlens, out, total, *others = ctx.saved_tensors
    kept, rows = others[: len(others) - ctx.rows], others[len(others) - ctx.rows :]
    constant, chunk, want_last, key = ctx.call
    dout = grads[0] if grads[0] is not None else like(q, q.shape[1], v.shape[3]).zero_()
    dlast = grads[2] if want_last else None
    dq, dk, dv, dinitial, *drows = backward_op(
        *(q, k, v, rows, constant, initial, cu_seqlens, chunk, out, total, kept, dout, dlast),
        *(ctx.wanted, ctx.want_initial, key),
    )
    found = [g if want else None for g, want in zip(drows, ctx.wanted, strict=True)]
    first = dinitial.to(initial.dtype) if ctx.want_initial else None
    of_wanted: list[None] | None = None if found else []  # PyTorch takes an empty list for one of tensors
    return dq, dk, dv, found, None, first, *[None] * 5, of_wanted, None


forward_op.register_autograd(_backward, setup_context=_setup)
