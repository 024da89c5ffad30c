"""The PyTorch operators of what a token has of itself: `attncc::own_forward` and `attncc::own_backward`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attncc.runtime.engine import on_device
from attncc.runtime.linear_engine import LinearEngine
from attncc.schedule.device import device_of

_engines: dict[str, LinearEngine] = {}


def register(key: str, engine: LinearEngine) -> str:
    """Give an engine a name in the operators' schema. Equal keys mean equal engines."""
    _engines.setdefault(key, engine)
    return key


def _module(key: str, q: Tensor, v: Tensor) -> Any:
    return _engines[key].module(q.shape[3], v.shape[3], device_of(q.device).is_interpreter)


def _spread(factor: Tensor | None, q: Tensor) -> Tensor | None:
    if factor is None:
        return None
    channels = factor.expand(*factor.shape[:3], q.shape[3])
    return (channels if channels.stride(3) == 1 else channels.contiguous()).expand(q.shape)


@torch.library.custom_op("attncc::own_forward", mutates_args=())
def forward_op(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, factor: Tensor | None, weight: Tensor | None, key: str
) -> Tensor:
    """out + weight (q . factor k) v of each token. factor: (B, H, L, D), sizes of 1 among them; weight: (B, H, L)."""
    with on_device(q.device):
        found: Tensor = _module(key, q, v).own(q, k, v, _spread(factor, q), weight, out)
    return found


@forward_op.register_fake
def _(out: Tensor, q: Tensor, k: Tensor, v: Tensor, factor: Tensor | None, weight: Tensor | None, key: str) -> Tensor:
    return torch.empty_like(out)


@torch.library.custom_op("attncc::own_backward", mutates_args=())
def backward_op(
    q: Tensor, k: Tensor, v: Tensor, factor: Tensor | None, weight: Tensor | None, dout: Tensor, key: str
) -> list[Tensor]:
    """dq, dk, dv, and those of factor and weight, empty where there are none."""
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    with on_device(q.device):
        dq, dk, dv, dfactor, dweight = _module(key, q, v).own_backward(q, k, v, _spread(factor, q), weight, dout)
    group = q.shape[1] // k.shape[1]
    if group > 1:
        dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    if factor is not None:
        one = [i for i, size in enumerate(factor.shape) if size == 1 and dfactor.shape[i] != 1]
        dfactor = (dfactor.sum(one, keepdim=True) if one else dfactor).to(factor.dtype)
    none = q.new_empty(0, dtype=torch.float32)
    dweight = none if dweight is None else dweight
    return [dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), none if dfactor is None else dfactor, dweight]


@backward_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, factor: Tensor | None, weight: Tensor | None, dout: Tensor, key: str
) -> list[Tensor]:
    none = q.new_empty(0, dtype=torch.float32)
    given = [none if x is None else torch.empty_like(x) for x in (factor, weight)]
    return [*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)), *given]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, q, k, v, factor, weight, ctx.key = inputs
    ctx.save_for_backward(q, k, v, factor, weight)


def _backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    q, k, v, factor, weight = ctx.saved_tensors
    dq, dk, dv, dfactor, dweight = backward_op(q, k, v, factor, weight, dout, ctx.key)
    return dout, dq, dk, dv, None if factor is None else dfactor, None if weight is None else dweight, None


forward_op.register_autograd(_backward, setup_context=_setup)
