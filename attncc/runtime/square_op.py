"""The PyTorch operator of a variant whose weight is a polynomial of degree 2."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attncc.runtime.linear import LinearOp
from attncc.runtime.linear_own import OwnWeight
from attncc.runtime.shapes import Bound
from attncc.runtime.square import SquareCall
from attncc.runtime.square_calls import SquareCalls
from attncc.schedule.device import Device
from attncc.schedule.linear import LinearSizes, PlanName
from attncc.schedule.problem import Precision
from attncc.schedule.square import LARGEST, choose_square


class SquareOp(LinearOp):
    """A LinearOp whose state has the products of two features; see `LinearOp.__call__`."""

    def _set_up(self, precision: Precision | None) -> None:
        self._square = SquareCall(self.graph, self._terms.core, self.linear, precision)
        self.engine, self._rows = self._square.engine, self._square.rows
        if self.linear.own is not None:
            self._own = OwnWeight(self._terms.core, self.linear)
        else:
            self._calls = SquareCalls(self._square, self._terms)

    def _computed(
        self, bound: Bound, q: Tensor, k: Tensor, v: Tensor, stands: Tensor | None, *call: Any
    ) -> tuple[Tensor, Tensor | None]:
        out, last = self._square(bound, q, k, v, stands, *call)
        return out if self._own is None else self._own.add(out, bound, q, k, v, stands), last

    def _fastest(self, sizes: LinearSizes, device: Device) -> PlanName:
        return choose_square(sizes, device, self.linear.causal)

    def _refusal(self, q: Tensor, k: Tensor, v: Tensor, names: tuple[str, ...]) -> str | None:
        if max(q.shape[-1], v.shape[-1]) > LARGEST:
            return f"a state of degree 2 for heads larger than {LARGEST} is too large"
        return super()._refusal(q, k, v, names)
