"""Calls of a plan of degree 2 on a GPU without PyTorch's dispatcher, replayed once their kind is known.

The replay covers the kernels' operands to the output, and back from its gradient. If operands are not q, k and v
themselves, PyTorch computes them before, and its autograd differentiates them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attncc.runtime.first_order import first_order
from attncc.runtime.linear_calls import Calls, Kind
from attncc.runtime.linear_terms import TokenTerms
from attncc.runtime.replay import key_of
from attncc.runtime.shapes import Bound
from attncc.runtime.square import SquareCall
from attncc.schedule.problem import Precision


@dataclass(frozen=True)
class Call:
    """One call. `kind.constant`: the weight's numbers."""

    calls: SquareCalls
    key: Any
    kind: Kind


class SquareCalls(Calls):
    """The calls of one plan by kind."""

    def __init__(self, square: SquareCall, terms: TokenTerms):
        super().__init__()
        self._square, self._terms = square, terms

    def constant(self, bound: Bound) -> tuple[float, ...]:
        """The weight's numbers."""
        return self._square.powers(bound)

    def precision(self) -> Precision:
        """As the engine has it."""
        return self._square.engine.precision()

    def __call__(
        self, key: Any, kind: Kind, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """out, and the last state or None. `inputs`: the tensors that the caller gave besides, by name."""
        gain = None
        if not self._square.plain:
            bound = self._terms.join(kind.bound.among(inputs), q, k)
            q, k, v, gain = self._square.operands(bound, q, k, v, None)
        call = Call(self, key, kind)
        if not kind.then_backward:
            out, _, _, last = self.forward(call, q, k, v, first, gain)
            return out, last
        found = EagerSquare.apply(call, q, k, v, first, gain)
        return found if kind.want_last else (found, None)

    def forward(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, gain: Tensor | None
    ) -> tuple[Any, ...]:
        """out, the sums of weighted values if a backward wants them, those of weights, and the last state or None."""
        kind, square = call.kind, self._square

        def run() -> tuple[Any, ...]:
            of_plan = (kind.constant, first, None, kind.stepwise, kind.chunk, kind.want_last)
            sums, total, last = square.engine.forward(q, k, v, *of_plan)
            # in one step: no float32 of the output in between
            out = torch.empty_like(sums, dtype=q.dtype)
            torch.mul(sums, square.factor(total, gain).unsqueeze(-1), out=out)
            return out, sums if kind.then_backward else None, total, last

        others = {str(i): x for i, x in enumerate((first, gain))}
        key = (call.key, key_of(q, k, v, None, others))
        return self._forwards.run(key, run, [q, k, v, *(x for x in others.values() if x is not None)])

    def backward(self, call: Call, given: tuple[Any, ...], gain: Tensor | None, want_first: bool) -> tuple[Any, ...]:
        """dq, dk, dv, those of the first state and of the gain or None. `given`: q, k, v, the first state, both sums,
        and the gradients of out and of the last state."""
        q, k, v, first, sums, total, dout, dlast = given
        kind, square = call.kind, self._square

        def run() -> tuple[Any, ...]:
            of_out = dout if dout.stride(-1) == 1 else dout.contiguous()
            weight, dgain = square.factor(total, gain), None
            if square.plan.total or gain is not None:
                delta = square.engine.delta(q, sums, of_out)
                share = delta * square.slope(total)
                dgain = None if gain is None else delta * square.factor(total, None)
            else:
                share = torch.zeros_like(total)
            if of_out.dtype == torch.float16:  # a token's own size is kept apart, so that the rest fits
                size = torch.maximum(of_out.abs().amax(-1).float(), share.abs()).clamp_min(1e-30)
                of_out, weight, share = (of_out / size.unsqueeze(-1)).to(q.dtype), weight * size, share / size
            of_plan = (kind.constant, first, None, kind.chunk)
            found = square.engine.gradients(q, k, v, *of_plan, of_out, weight, share, dlast, want_first)
            return (*found, dgain)

        others = {str(i): x for i, x in enumerate((first, sums, total, dout, dlast, gain))}
        key = (call.key, key_of(q, k, v, None, others), want_first)
        return self._backwards.run(key, run, [q, k, v, *(x for x in others.values() if x is not None)])


class EagerSquare(torch.autograd.Function):
    """From the kernels' operands to the output."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, gain: Tensor | None
    ) -> Any:
        """out, and with it the last state where it is wanted."""
        out, sums, total, last = call.calls.forward(call, q, k, v, first, gain)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, first, sums, total, gain)
        return (out, last) if call.kind.want_last else out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor | None, dlast: Tensor | None = None) -> tuple[Any, ...]:
        """Gradients by the derived backward."""
        q, k, v, first, sums, total, gain = ctx.saved_tensors
        if dout is None and dlast is None:
            return (None,) * 6
        dout = torch.zeros_like(sums, dtype=q.dtype) if dout is None else dout
        given = (q, k, v, first, sums, total, dout, dlast)
        dq, dk, dv, dfirst, dgain = ctx.call.calls.backward(ctx.call, given, gain, ctx.needs_input_grad[4])
        return None, dq, dk, dv, dfirst, dgain


__all__ = ["Call", "EagerSquare", "SquareCalls"]
