"""Calls of a chunk plan on a GPU without PyTorch's dispatcher, replayed once their kind is known.

Checks, the choice of a plan and the binding of names happen once per kind. If no input needs a gradient, the factors of
tokens are part of the replay; otherwise PyTorch computes them, and its autograd differentiates them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attncc.runtime.first_order import first_order
from attncc.runtime.launch import ghost
from attncc.runtime.linear_engine import LinearEngine
from attncc.runtime.linear_library import like
from attncc.runtime.recordings import Recordings, keep
from attncc.runtime.replay import key_of
from attncc.runtime.shapes import Bound
from attncc.schedule.problem import Precision


@dataclass(frozen=True)
class Kind:
    """What calls of one kind have in common. Of the caller's tensors `bound` has ghosts.

    constant: what `Calls.constant` says; chunk: tokens a chunk as the caller says; then_backward: somebody may ask for
    gradients.
    """

    bound: Bound
    constant: Any
    stepwise: bool
    chunk: int | None
    want_last: bool
    then_backward: bool


@dataclass(frozen=True)
class Call:
    """One call. `names`: the inputs whose tensors it has, in order; None where it has the factors of tokens."""

    calls: LinearCalls
    key: Any
    kind: Kind
    names: tuple[str, ...] | None


class Calls(ABC):
    """The calls of one plan by kind."""

    def __init__(self) -> None:
        self._kinds: dict[Any, Kind] = {}
        self._forwards, self._backwards = Recordings(), Recordings()

    def known(self, key: Any) -> Kind | None:
        """What calls with this key have in common, if one came before."""
        return self._kinds.get(key)

    def keep(self, key: Any, kind: Kind, inputs: Mapping[str, Tensor]) -> Kind:
        """Remember it. `inputs`: what the caller gave."""
        kept = Kind(
            kind.bound.among({name: ghost(x) for name, x in inputs.items()}),
            *(kind.constant, kind.stepwise, kind.chunk, kind.want_last, kind.then_backward),
        )
        keep(self._kinds, key, kept)
        return kept

    @abstractmethod
    def constant(self, bound: Bound) -> Any:
        """What is the same number for the whole of a call, or several."""

    @abstractmethod
    def precision(self) -> Precision:
        """How float32 operands meet in a matmul."""

    @abstractmethod
    def __call__(
        self, key: Any, kind: Kind, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """out, and the last state or None. `inputs`: the tensors that the caller gave besides, by name."""


class LinearCalls(Calls):
    """Those of weights of degree 1."""

    def __init__(self, engine: LinearEngine):
        super().__init__()
        self.engine = engine

    def constant(self, bound: Bound) -> float:
        """The factor that is one number."""
        return self.engine.rows.constant(bound)

    def precision(self) -> Precision:
        """As the engine has it."""
        return self.engine.precision()

    def __call__(
        self, key: Any, kind: Kind, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """out, and the last state or None. `inputs`: the tensors that the caller gave besides, by name."""
        if any(x.requires_grad for x in inputs.values()) and kind.then_backward:
            rows = self.engine.rows.tokens(kind.bound.among(inputs), q.device)
            found = EagerLinear.apply(Call(self, key, kind, None), q, k, v, first, *rows)
        else:
            call = Call(self, key, kind, tuple(inputs))
            if not kind.then_backward:
                out, _, last, *_ = self.forward(call, q, k, v, first, *inputs.values())
                return out, last
            found = EagerLinear.apply(call, q, k, v, first, *inputs.values())
        return found if kind.want_last else (found, None)

    def forward(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, *tensors: Tensor
    ) -> tuple[Any, ...]:
        """out, the row totals or None, the last state or None, then what is kept, then the factors of tokens."""
        kind, engine = call.kind, self.engine

        def run() -> tuple[Any, ...]:
            rows = list(tensors)
            if call.names is not None:
                bound = kind.bound.among(dict(zip(call.names, tensors, strict=True)))
                rows = engine.rows.tokens(bound, q.device)
            wanted = [call.names is None and x.requires_grad for x in rows]
            of_plan = (None, kind.stepwise, kind.chunk, kind.want_last, kind.then_backward, wanted)
            *found, kept = engine.forward(q, k, v, rows, kind.constant, first, *of_plan)
            return (*found, *kept, *rows)

        given = [q, k, v, *tensors] if first is None else [q, k, v, first, *tensors]
        # inputs are part of the call's key; what PyTorch made of them is not
        made = () if call.names is not None else tensors
        laid = tuple((x.shape, x.stride(), x.dtype, x.data_ptr() % 16) for x in made)
        names = call.names
        defaults = [] if names is None else [x for name, x in kind.bound.tensors.items() if name not in names]
        return self._forwards.run((call.key, laid), run, given, defaults)

    def backward(
        self, call: Call, given: tuple[Any, ...], rows: list[Tensor], wanted: list[bool], want_first: bool
    ) -> tuple[Any, ...]:
        """dq, dk, dv, that of the first state or None, then those of the factors of tokens. `given`: q, k, v, the first
        state, out where there are row totals, these, what is kept, and the gradients of out and of the last state."""
        q, k, v, first, out, total, kept, dout, dlast = given
        kind = call.kind

        def run() -> tuple[Any, ...]:
            of_out = (None, kind.chunk, out, total, kept, dout, dlast)
            dq, dk, dv, dfirst, found = self.engine.backward(
                q, k, v, rows, kind.constant, first, *of_out, wanted, want_first
            )
            return dq, dk, dv, dfirst, *found

        others = {str(i): x for i, x in enumerate((first, out, total, dout, dlast, *rows, *kept))}
        key = (call.key, key_of(q, k, v, None, others), tuple(wanted), want_first)
        return self._backwards.run(key, run, [q, k, v, *(x for x in others.values() if x is not None)])


class EagerLinear(torch.autograd.Function):
    """`attncc::linear_forward` and `attncc::linear_backward` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, *tensors: Tensor) -> Any:
        """out, and with it the last state where it is wanted."""
        out, total, last, *others = call.calls.forward(call, q, k, v, first, *tensors)
        ctx.call = call
        ctx.set_materialize_grads(False)
        needed = None if total is None else out
        ctx.save_for_backward(q, k, v, first, needed, total, *others)
        return (out, last) if call.kind.want_last else out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor | None, dlast: Tensor | None = None) -> tuple[Any, ...]:
        """Gradients by the derived backward."""
        q, k, v, first, out, total, *others = ctx.saved_tensors
        count = len(others) - len(ctx.call.calls.engine.names)
        kept, rows = others[:count], others[count:]
        needed = ctx.needs_input_grad[5:]
        if dout is None and dlast is None:
            return (None,) * (5 + len(needed))
        wanted = [False] * len(rows) if ctx.call.names is not None else list(needed)
        dout = like(q, q.shape[1], v.shape[3]).zero_() if dout is None else dout
        given = (q, k, v, first, out, total, kept, dout, dlast)
        dq, dk, dv, dfirst, *drows = ctx.call.calls.backward(ctx.call, given, rows, wanted, ctx.needs_input_grad[4])
        of_rows = drows if ctx.call.names is None else [None] * len(needed)
        return None, dq, dk, dv, dfirst, *of_rows


__all__ = ["Call", "Calls", "EagerLinear", "Kind", "LinearCalls"]
