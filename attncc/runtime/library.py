"""The PyTorch operators of all variants: `attncc::forward` and `attncc::backward`.

One pair of operators serves all variants: a key names the variant, and the schema has tensors and numbers. This makes
ops work under `torch.compile(fullgraph=True)`, fake tensors, `opcheck` and other dispatcher modes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attncc.ir.graph import VariantGraph
from attncc.runtime.first_order import first_order
from attncc.runtime.kinds import Kind, Kinds
from attncc.runtime.operands import Adjoint, Operands
from attncc.runtime.shapes import bind

_known: dict[str, Kinds] = {}


def register(key: str, kinds: Kinds) -> str:
    """Give an engine's calls a name in the operators' schema. Equal keys mean equal engines."""
    _known.setdefault(key, kinds)
    return key


def _named(graph: VariantGraph, inputs: list[Tensor], scalars: list[float]) -> dict[str, Any]:
    """A call's inputs by name, from the operator's lists."""
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
    kinds = _known[key]
    return list(kinds.run(q, k, v, scale, _named(kinds.graph, inputs, scalars)))


@forward_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, inputs: list[Tensor], scalars: list[float], scale: float, key: str
) -> list[Tensor]:
    facts = _known[key].engine.plan.facts
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
    kinds = _known[key]
    graph = kinds.graph
    bound = bind(graph, q, k, v, scale if graph.has_scale else None, _named(graph, inputs, scalars))
    names = tuple(d.name for d, want in zip(graph.inputs, wanted, strict=True) if want)
    found = kinds.backward(Operands(bound, q, k, v), Adjoint(out, tuple(saved), dout, dlse, names))
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
    for x, decl, want in zip(inputs, _known[key].graph.inputs, wanted, strict=True):
        if decl.grad:
            grads.append(x.new_empty(x.shape) if want else q.new_empty(0))
    part_of_k = _known[key].graph.value is not None
    dv = v.new_empty(0, 0, 0, 0) if part_of_k else _like(v, v.shape[3])
    return [_like(q, q.shape[3]), _like(k, k.shape[3]), dv, *grads]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, tensors, scalars, scale, key = inputs
    plan = _known[key].engine.plan
    facts = plan.facts
    ctx.plan = plan
    if not facts.has_backward:
        return
    names = facts.results
    saved = [output[1 + names.index(name)] for name in facts.saved]
    ctx.save_for_backward(q, k, v, output[0], *tensors, *saved)
    ctx.count = len(tensors)
    ctx.wanted = [d.grad and x.requires_grad for d, x in zip(_known[key].graph.inputs, tensors, strict=True)]
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
    gradients = [next(results) if d.grad else None for d in _known[key].graph.inputs]
    inputs = [g if want else None for g, want in zip(gradients, ctx.wanted, strict=True)]
    # the structure of the arguments again, in which an empty list is one and a list of numbers is a leaf
    dv = dv if _known[key].graph.value is None else None  # that of a part of k is in dk
    return dq, dk, dv, inputs, None if scalars else [], None, None


forward_op.register_autograd(_backward, setup_context=_setup)


class EagerAttention(torch.autograd.Function):
    """The same pair without the dispatcher, which costs tens of microseconds a call."""

    @staticmethod
    def forward(ctx: Any, kind: Kind, only_out: bool, *tensors: Tensor) -> Any:
        """out, and the stored rows unless `only_out`. `tensors`: q, k, v and the inputs of `kind.names`."""
        kinds = kind.kinds
        results = kinds.forward(kind, tensors, then_backward=True)
        ctx.kind = kind
        if kinds.has_backward:
            ctx.save_for_backward(*tensors, results[0], *[results[i] for i in kinds.saved_at])
        if only_out:
            return results[0]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[r for i, r in enumerate(results) if i not in (0, kinds.lse_at)])
        return results

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Gradients by the derived backward."""
        kind: Kind = ctx.kind
        kinds, names = kind.kinds, kind.names
        kinds.engine.plan.refuse_gradients()
        dlse = None if len(grads) == 1 or kinds.lse_at is None else grads[kinds.lse_at]
        if grads[0] is None and dlse is None:
            return (None,) * (5 + len(names))
        q, k, v, *rest = ctx.saved_tensors
        inputs, out, saved = rest[: len(names)], rest[len(names)], tuple(rest[len(names) + 1 :])
        dout = grads[0] if grads[0] is not None else torch.zeros_like(out)
        needed = dict(zip(names, ctx.needs_input_grad[5:], strict=True))
        wanted = tuple([name for name in kinds.graded if needed.get(name)])
        call = Operands(kind.bound.among(dict(zip(names, inputs, strict=True))), q, k, v)
        dq, dk, dv, *found = kinds.backward(call, Adjoint(out, saved, dout, dlse, wanted))
        of_inputs = dict(zip(kinds.graded, found, strict=True))
        dv = dv if kinds.graph.value is None else None  # that of a part of k is in dk
        return None, None, dq, dk, dv, *map(of_inputs.get, names)


_apply = super(torch.autograd.Function, EagerAttention).apply


def attend(kind: Kind, only_out: bool, *tensors: Tensor) -> Any:
    """`EagerAttention.apply` of a kind that is replayed.

    Its own `apply` first looks at every argument for what torch.func may have left behind, which has no address and so
    no kind. While torch.func is at work it refuses, with the reason.
    """
    apply = EagerAttention.apply if torch._C._are_functorch_transforms_active() else _apply
    return apply(kind, only_out, *tensors)
