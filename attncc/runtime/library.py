"""The PyTorch operators behind every variant: `attncc::forward` and `attncc::backward`.

One pair of operators serves all variants: a key names the variant, and the schema carries tensors and numbers. With
them an op works under `torch.compile(fullgraph=True)`, fake tensors, `opcheck` and the dispatcher's other modes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attncc.runtime.engine import Engine, Kind
from attncc.runtime.first_order import first_order
from attncc.runtime.shapes import bind

_engines: dict[str, Engine] = {}


def register(key: str, engine: Engine) -> str:
    """Give an engine a name in the operators' schema. Equal keys mean equal engines."""
    _engines.setdefault(key, engine)
    return key


def _named(engine: Engine, inputs: list[Tensor], scalars: list[float]) -> dict[str, Any]:
    """A call's inputs by name, from the operator's lists."""
    graph = engine.graph
    numbers = {s.name: int(x) if s.is_int else x for s, x in zip(graph.scalars, scalars, strict=True)}
    return {**dict(zip((d.name for d in graph.inputs), (i.detach() for i in inputs), strict=True)), **numbers}


def _like(x: Tensor, last: int, per_head: int = 1) -> Tensor:
    """As the generated modules lay results out: x's shape but for the last dimension, in x's order of dimensions, with
    `per_head` heads for each of x's."""
    b, h, length, _ = x.shape
    h = h * per_head
    if x.transpose(1, 2).is_contiguous() and not x.is_contiguous():
        return x.new_empty((b, length, h, last)).transpose(1, 2)
    return x.new_empty((b, h, length, last))


@torch.library.custom_op("attncc::forward", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, inputs: list[Tensor], scalars: list[float], scale: float, key: str
) -> list[Tensor]:
    """out, then the variant's row statistics and what else its backward needs."""
    engine = _engines[key]
    return list(engine.run(q, k, v, scale, _named(engine, inputs, scalars)))


@forward_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, inputs: list[Tensor], scalars: list[float], scale: float, key: str
) -> list[Tensor]:
    facts = _engines[key].plan.facts
    rows = [q.new_empty(q.shape[:3], dtype=torch.float32) for _ in facts.stored]
    outs = [_like(q, v.shape[3], v.shape[1] // k.shape[1]) for _ in ("out", *facts.results[len(facts.stored) :])]
    return [outs[0], *rows, *outs[1:]]


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
    scale_given = scale if engine.graph.has_scale else None
    bound = bind(engine.graph, q, k, v, scale_given, _named(engine, inputs, scalars))
    names = tuple(d.name for d, want in zip(engine.graph.inputs, wanted, strict=True) if want)
    found = engine.gradients(bound, q, k, v, out, tuple(saved), dout, dlse, names)
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
    part_of_k = _engines[key].graph.value is not None
    dv = v.new_empty(0, 0, 0, 0) if part_of_k else _like(v, v.shape[3])
    return [_like(q, q.shape[3]), _like(k, k.shape[3]), dv, *grads]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, tensors, scalars, scale, key = inputs
    plan = _engines[key].plan
    facts = plan.facts
    ctx.plan = plan
    if not facts.has_backward:
        return
    names = facts.results
    saved = [output[1 + names.index(name)] for name in facts.saved]
    ctx.save_for_backward(q, k, v, output[0], *tensors, *saved)
    ctx.count = len(tensors)
    ctx.wanted = [d.grad and x.requires_grad for d, x in zip(_engines[key].graph.inputs, tensors, strict=True)]
    ctx.numbers = (scalars, scale, key)
    ctx.lse_index = names.index("lse") + 1 if "lse" in names else None


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    ctx.plan.refuse_gradients()
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
    dv = dv if _engines[key].graph.value is None else None  # that of a part of k is in dk
    return dq, dk, dv, inputs, None if scalars else [], None, None


forward_op.register_autograd(_backward, setup_context=_setup)


class EagerAttention(torch.autograd.Function):
    """The same pair without the dispatcher, which costs tens of microseconds a call."""

    @staticmethod
    def forward(ctx: Any, kind: Kind, only_out: bool, *tensors: Tensor) -> Any:
        """out, and the stored rows unless `only_out`. `tensors`: q, k, v and the inputs of `kind.names`."""
        engine = kind.engine
        results = engine.infer(kind, tensors, then_backward=True)
        ctx.kind = kind
        if engine.plan.facts.has_backward:
            ctx.save_for_backward(*tensors, results[0], *[results[i] for i in engine.saved_at])
        if only_out:
            return results[0]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[r for i, r in enumerate(results) if i not in (0, engine.lse_at)])
        return results

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Gradients by the derived backward."""
        kind: Kind = ctx.kind
        engine, names = kind.engine, kind.names
        engine.plan.refuse_gradients()
        dlse = None if len(grads) == 1 or engine.lse_at is None else grads[engine.lse_at]
        if grads[0] is None and dlse is None:
            return (None,) * (5 + len(names))
        q, k, v, *rest = ctx.saved_tensors
        inputs, out, saved = rest[: len(names)], rest[len(names)], tuple(rest[len(names) + 1 :])
        dout = grads[0] if grads[0] is not None else torch.zeros_like(out)
        needed = dict(zip(names, ctx.needs_input_grad[5:], strict=True))
        wanted = tuple([name for name in engine.graded if needed.get(name)])
        bound = kind.bound.among(dict(zip(names, inputs, strict=True)))
        dq, dk, dv, *found = engine.gradients(bound, q, k, v, out, saved, dout, dlse, wanted)
        of_inputs = dict(zip(engine.graded, found, strict=True))
        dv = dv if engine.graph.value is None else None  # that of a part of k is in dk
        return None, None, dq, dk, dv, *map(of_inputs.get, names)


_apply = super(torch.autograd.Function, EagerAttention).apply


def attend(kind: Kind, only_out: bool, *tensors: Tensor) -> Any:
    """`EagerAttention.apply` of a kind that is replayed.

    Its own `apply` first looks at every argument for what torch.func may have left behind, which has no address and so
    no kind. While torch.func is at work it refuses, with the reason.
    """
    apply = EagerAttention.apply if torch._C._are_functorch_transforms_active() else _apply
    return apply(kind, only_out, *tensors)
