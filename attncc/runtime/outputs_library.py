"""The PyTorch operators of calls with auxiliary outputs: `attncc::forward_outputs` and `attncc::backward_outputs`.

As in `library`, a key names the variant, here together with the requested outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attncc.ir.outputs import Output
from attncc.passes.outputs import named
from attncc.runtime.first_order import first_order
from attncc.runtime.library import _like as like
from attncc.runtime.outputs import OutputsEngine
from attncc.runtime.shapes import Bound, bind

_engines: dict[str, OutputsEngine] = {}


def register(key: str, engine: OutputsEngine) -> str:
    """Give an engine a name in the operators' schema. Equal keys mean equal engines."""
    _engines.setdefault(key, engine)
    return key


def _bound(
    engine: OutputsEngine, q: Tensor, k: Tensor, v: Tensor, inputs: list[Tensor], scalars: list[float], scale: float
) -> Bound:
    graph = engine.graph
    numbers = {s.name: int(x) if s.is_int else x for s, x in zip(graph.scalars, scalars, strict=True)}
    given: dict[str, Any] = dict(zip((d.name for d in graph.inputs), (i.detach() for i in inputs), strict=True))
    return bind(graph, q, k, v, scale, {**given, **numbers})


@torch.library.custom_op("attncc::forward_outputs", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, inputs: list[Tensor], scalars: list[float], scale: float, key: str
) -> list[Tensor]:
    """out, the stored row statistics, the outputs, then what the backward needs besides."""
    engine = _engines[key]
    bound = _bound(engine, q, k, v, inputs, scalars, scale)
    results, outputs, residuals = engine.forward(bound, q, k, v, with_residuals=True)
    return [*results, *outputs, *residuals]


def _empty(output: Output, q: Tensor, k: Tensor, is_int: bool) -> Tensor:
    shape = (*q.shape[:2], *output.domain.shape(q.shape[2], k.shape[2]))
    return q.new_empty(shape, dtype=torch.int64 if is_int else torch.float32)


@forward_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, inputs: list[Tensor], scalars: list[float], scale: float, key: str
) -> list[Tensor]:
    engine = _engines[key]
    rows = [q.new_empty(q.shape[:3], dtype=torch.float32) for _ in engine.core.plan.stored]
    outputs = [_empty(o, q, k, o.type == "int") for o in engine.graph.outputs]
    owner = {e.name: (o, e) for o in engine.placed.outputs for e in named((o,))}
    residuals = [_empty(owner[n][0], q, k, owner[n][1].reduction.is_int) for n in engine.residual_names()]
    return [like(q, v.shape[3]), *rows, *outputs, *residuals]


@torch.library.custom_op("attncc::backward_outputs", mutates_args=())
def backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: list[Tensor],
    scalars: list[float],
    scale: float,
    out: Tensor,
    rows: list[Tensor],
    residuals: list[Tensor],
    dout: Tensor,
    dlse: Tensor | None,
    of_reductions: list[Tensor],
    given: list[bool],
    wanted: list[bool],
    key: str,
) -> list[Tensor]:
    """dq, dk, dv, then the gradient of each differentiable input. `of_reductions`: cotangents of those `given`."""
    engine = _engines[key]
    bound = _bound(engine, q, k, v, inputs, scalars, scale)
    names = tuple(d.name for d, want in zip(engine.graph.inputs, wanted, strict=True) if want)
    stored = dict(zip((name for name, _ in engine.core.plan.stored), rows, strict=True))
    chosen = [name for name, has in zip(engine.light.names, given, strict=True) if has]
    cotangents = dict(zip(chosen, of_reductions, strict=True))
    found = engine.backward(bound, q, k, v, out, stored, residuals, dout, dlse, cotangents, names)
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
    rows: list[Tensor],
    residuals: list[Tensor],
    dout: Tensor,
    dlse: Tensor | None,
    of_reductions: list[Tensor],
    given: list[bool],
    wanted: list[bool],
    key: str,
) -> list[Tensor]:
    gradients = []
    for x, decl, want in zip(inputs, _engines[key].graph.inputs, wanted, strict=True):
        if decl.grad:
            gradients.append(x.new_empty(x.shape) if want else q.new_empty(0))
    return [like(q, q.shape[3]), like(k, k.shape[3]), like(v, v.shape[3]), *gradients]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, tensors, scalars, scale, key = inputs
    engine = _engines[key]
    stored, outputs = len(engine.core.plan.stored), len(engine.graph.outputs)
    residuals = output[1 + stored + outputs :]
    ctx.save_for_backward(q, k, v, output[0], *tensors, *output[1 : 1 + stored], *residuals)
    ctx.counts = (len(tensors), stored)
    ctx.wanted = [d.grad and x.requires_grad for d, x in zip(engine.graph.inputs, tensors, strict=True)]
    ctx.numbers = (scalars, scale, key)


def _of_outputs(engine: OutputsEngine, grads: tuple[Tensor | None, ...] | list[Tensor | None]) -> dict[str, Tensor]:
    """The cotangents of the outputs that have one, from those of everything that the operator returns."""
    first = 1 + len(engine.core.plan.stored)
    return {
        o.name: g
        for o, g in zip(engine.graph.outputs, grads[first : first + len(engine.graph.outputs)], strict=True)
        if g is not None and o.type != "int"
    }


def _of_lse(engine: OutputsEngine, grads: tuple[Tensor | None, ...] | list[Tensor | None]) -> Tensor | None:
    names = [name for name, _ in engine.core.plan.stored]
    return grads[1 + names.index("lse")] if "lse" in names else None


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    q, k, v, out, *rest = ctx.saved_tensors
    count, stored = ctx.counts
    scalars, scale, key = ctx.numbers
    engine = _engines[key]
    tensors, rows, residuals = rest[:count], rest[count : count + stored], rest[count + stored :]
    dout = grads[0] if grads[0] is not None else torch.zeros_like(out)
    names = tuple(d.name for d, want in zip(engine.graph.inputs, ctx.wanted, strict=True) if want)
    bound = _bound(engine, q, k, v, tensors, scalars, scale)
    of_reductions, direct = engine.unfinish(_of_outputs(engine, grads), residuals, bound, names)
    given = [name in of_reductions for name in engine.light.names]
    cotangents = [of_reductions[name] for name in engine.light.names if name in of_reductions]
    dq, dk, dv, *found = backward_op(
        *(q, k, v, tensors, scalars, scale, out, rows, residuals, dout, _of_lse(engine, grads)),
        *(cotangents, given, ctx.wanted, key),
    )
    results = iter(found)
    gradients = [next(results) if d.grad else None for d in engine.graph.inputs]
    for i, (decl, want) in enumerate(zip(engine.graph.inputs, ctx.wanted, strict=True)):
        gradients[i] = _joined(gradients[i], direct.get(decl.name)) if want else None
    # the structure of the arguments again, in which an empty list is one and a list of numbers is a leaf
    return dq, dk, dv, gradients, None if scalars else [], None, None


def _joined(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


forward_op.register_autograd(_backward, setup_context=_setup)


class EagerOutputs(torch.autograd.Function):
    """The same pair without the dispatcher, which costs tens of microseconds a call."""

    @staticmethod
    def forward(
        ctx: Any, engine: OutputsEngine, bound: Bound, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor
    ) -> Any:
        """out, the stored rows, the outputs. `tensors` are those of `bound`, which autograd must see."""
        results, outputs, residuals = engine.forward(bound, q, k, v, with_residuals=True)
        ctx.save_for_backward(q, k, v, results[0], *tensors, *results[1:], *residuals)
        ctx.engine, ctx.names = engine, tuple(bound.tensors)
        ctx.numbers = (bound.sizes, bound.scale, bound.scalars)
        names = [name for name, _ in engine.core.plan.stored]
        fixed = [row for name, row in zip(names, results[1:], strict=True) if name != "lse"]
        fixed += [y for o, y in zip(engine.graph.outputs, outputs, strict=True) if o.type == "int"]
        ctx.mark_non_differentiable(*fixed)
        ctx.set_materialize_grads(False)
        return (*results, *outputs)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Gradients by the derived backward."""
        engine: OutputsEngine = ctx.engine
        q, k, v, out, *rest = ctx.saved_tensors
        count = len(ctx.names)
        names = [name for name, _ in engine.core.plan.stored]
        rows, residuals = dict(zip(names, rest[count:], strict=False)), rest[count + len(names) :]
        sizes, scale, scalars = ctx.numbers
        bound = Bound(sizes, scale, dict(zip(ctx.names, rest[:count], strict=True)), scalars)
        decls = engine.graph.inputs
        needed = dict(zip(ctx.names, ctx.needs_input_grad[5:], strict=True))
        wanted = tuple(d.name for d in decls if d.grad and needed[d.name])
        of_reductions, direct = engine.unfinish(_of_outputs(engine, grads), residuals, bound, wanted)
        dout = grads[0] if grads[0] is not None else torch.zeros_like(out)
        dq, dk, dv, *found = engine.backward(
            bound, q, k, v, out, rows, residuals, dout, _of_lse(engine, grads), of_reductions, wanted
        )
        of_inputs = dict(zip((d.name for d in decls if d.grad), found, strict=True))
        joined = (_joined(of_inputs.get(name), direct.get(name)) for name in ctx.names)
        return None, None, dq, dk, dv, *joined
