"""The PyTorch operators behind every variant: `attncc::forward` and `attncc::backward`.

One pair of operators serves all variants: a key names the variant, and the schema carries tensors and numbers. With
them an op works under `torch.compile(fullgraph=True)`, fake tensors, `opcheck` and the dispatcher's other modes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attncc.runtime.engine import Engine
from attncc.runtime.shapes import Bound, bind

_engines: dict[str, Engine] = {}


def register(key: str, engine: Engine) -> str:
    """Give an engine a name in the operators' schema. Equal keys mean equal engines."""
    _engines.setdefault(key, engine)
    return key


def _bound(
    engine: Engine, q: Tensor, k: Tensor, v: Tensor, inputs: list[Tensor], scalars: list[float], scale: float
) -> Bound:
    graph = engine.graph
    numbers = {s.name: int(x) if s.is_int else x for s, x in zip(graph.scalars, scalars, strict=True)}
    named: dict[str, Any] = dict(zip((d.name for d in graph.inputs), (i.detach() for i in inputs), strict=True))
    return bind(graph, q, k, v, scale if graph.has_scale else None, {**named, **numbers})


def _like(x: Tensor, last: int) -> Tensor:
    """As the generated modules lay results out: x's shape but for the last dimension, in x's order of dimensions."""
    b, h, length, _ = x.shape
    if x.transpose(1, 2).is_contiguous() and not x.is_contiguous():
        return x.new_empty((b, length, h, last)).transpose(1, 2)
    return x.new_empty((b, h, length, last))


@torch.library.custom_op("attncc::forward", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, inputs: list[Tensor], scalars: list[float], scale: float, key: str
) -> list[Tensor]:
    """out, then the variant's row statistics and what else its backward needs."""
    engine = _engines[key]
    return list(engine.forward(_bound(engine, q, k, v, inputs, scalars, scale), q, k, v))


@forward_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, inputs: list[Tensor], scalars: list[float], scale: float, key: str
) -> list[Tensor]:
    plan = _engines[key].plan
    rows = [q.new_empty(q.shape[:3], dtype=torch.float32) for _ in plan.stored]
    return [_like(q, v.shape[3]), *rows, *(_like(q, v.shape[3]) for _ in plan.shares)]


@torch.library.custom_op("attncc::backward", mutates_args=())
def backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: list[Tensor],
    scalars: list[float],
    scale: float,
    out: Tensor,
    saved: list[Tensor],
    dout: Tensor,
    dlse: Tensor | None,
    wanted: list[bool],
    key: str,
) -> list[Tensor]:
    """dq, dk, dv, then the gradient of each differentiable input."""
    engine = _engines[key]
    bound = _bound(engine, q, k, v, inputs, scalars, scale)
    names = tuple(d.name for d, want in zip(engine.graph.inputs, wanted, strict=True) if want)
    found = engine.backward(bound, q, k, v, out, tuple(saved), dout, dlse, names)
    # a schema's list of tensors has no place for None
    return [q.new_empty(0) if x is None else x for x in found]


@backward_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: list[Tensor],
    scalars: list[float],
    scale: float,
    out: Tensor,
    saved: list[Tensor],
    dout: Tensor,
    dlse: Tensor | None,
    wanted: list[bool],
    key: str,
) -> list[Tensor]:
    grads = []
    for x, decl, want in zip(inputs, _engines[key].graph.inputs, wanted, strict=True):
        if decl.grad:
            grads.append(x.new_empty(x.shape) if want else q.new_empty(0))
    return [_like(q, q.shape[3]), _like(k, k.shape[3]), _like(v, v.shape[3]), *grads]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, tensors, scalars, scale, key = inputs
    plan = _engines[key].plan
    if plan.has_backward is not None:
        ctx.refusal = plan.has_backward
        return
    names = plan.results
    saved = [output[1 + names.index(name)] for name in plan.saved]
    ctx.save_for_backward(q, k, v, output[0], *tensors, *saved)
    ctx.count = len(tensors)
    ctx.wanted = [d.grad and x.requires_grad for d, x in zip(_engines[key].graph.inputs, tensors, strict=True)]
    ctx.numbers = (scalars, scale, key)
    ctx.refusal = None
    ctx.lse_index = names.index("lse") + 1 if "lse" in names else None


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    if ctx.refusal is not None:
        raise ctx.refusal
    q, k, v, out, *rest = ctx.saved_tensors
    tensors, saved = rest[: ctx.count], rest[ctx.count :]
    scalars, scale, key = ctx.numbers
    dout = grads[0] if grads[0] is not None else torch.zeros_like(out)
    dlse = grads[ctx.lse_index] if ctx.lse_index is not None else None
    dq, dk, dv, *found = backward_op(q, k, v, tensors, scalars, scale, out, saved, dout, dlse, ctx.wanted, key)
    results = iter(found)
    gradients = [next(results) if d.grad else None for d in _engines[key].graph.inputs]
    inputs = [g if want else None for g, want in zip(gradients, ctx.wanted, strict=True)]
    # the structure of the arguments again, in which an empty list is one and a list of numbers is a leaf
    return dq, dk, dv, inputs, None if scalars else [], None, None


forward_op.register_autograd(_backward, setup_context=_setup)


class EagerAttention(torch.autograd.Function):
    """The same pair without the dispatcher, which costs tens of microseconds a call."""

    @staticmethod
    def forward(
        ctx: Any, engine: Engine, call: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor
    ) -> Any:
        """out and the stored rows. `call` is (scale, names of `inputs`, the rest of the call's inputs)."""
        scale, names, others = call
        named = {**dict(zip(names, inputs, strict=True)), **others}
        if q.is_cuda:
            results, bound = engine.infer(q, k, v, scale, named, then_backward=True)
        else:
            bound = bind(engine.graph, q, k, v, scale, named)
            results = engine.forward(bound, q, k, v, then_backward=True)
        plan = engine.plan
        if plan.has_backward is None:
            rows = plan.results
            saved = [results[1 + rows.index(name)] for name in plan.saved]
            ctx.save_for_backward(q, k, v, results[0], *bound.tensors.values(), *saved)
            ctx.lse_index = rows.index("lse") + 1 if "lse" in rows else None
            ctx.mark_non_differentiable(*(r for i, r in enumerate(results) if i not in (0, ctx.lse_index)))
        ctx.engine, ctx.numbers, ctx.names = engine, (bound.sizes, bound.scale, bound.scalars), names
        ctx.bound_names = tuple(bound.tensors)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Gradients by the derived backward."""
        engine: Engine = ctx.engine
        if engine.plan.has_backward is not None:
            raise engine.plan.has_backward
        q, k, v, out, *rest = ctx.saved_tensors
        count = len(ctx.bound_names)
        sizes, scale, scalars = ctx.numbers
        bound = Bound(sizes, scale, dict(zip(ctx.bound_names, rest[:count], strict=True)), scalars)
        dlse = grads[ctx.lse_index] if ctx.lse_index is not None else None
        if grads[0] is None and dlse is None:
            return (None,) * (5 + len(ctx.names))
        dout = grads[0] if grads[0] is not None else torch.zeros_like(out)
        needed = dict(zip(ctx.names, ctx.needs_input_grad[5:], strict=True))
        decls = engine.graph.inputs
        wanted = tuple(d.name for d in decls if d.grad and needed.get(d.name))
        dq, dk, dv, *found = engine.gradients(bound, q, k, v, out, tuple(rest[count:]), dout, dlse, wanted)
        of_inputs = dict(zip((d.name for d in decls if d.grad), found, strict=True))
        return None, None, dq, dk, dv, *(of_inputs.get(name) for name in ctx.names)
