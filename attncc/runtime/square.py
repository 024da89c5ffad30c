"""A call of a plan of degree 2: features and factors of tokens before its kernels, the output from two sums after
them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attncc.ir import symbols as sym
from attncc.ir.graph import VariantGraph
from attncc.passes.linearize import Linear
from attncc.runtime import square_library as library
from attncc.runtime.closures import closure
from attncc.runtime.linear_rows import TokenRows, numbers
from attncc.runtime.shapes import Bound
from attncc.runtime.square_engine import SquareEngine
from attncc.schedule.problem import Precision


class SquareCall:
    """One plan's calls. All that PyTorch does here has gradients of its own."""

    def __init__(self, graph: VariantGraph, core: VariantGraph, plan: Linear, precision: Precision | None):
        self.plan = plan
        self.engine = SquareEngine(graph, plan, precision)
        self._key = library.register(f"{graph.digest}:{precision}", self.engine)
        self.rows = TokenRows(core, plan)
        assert plan.powers is not None
        self._powers = [closure(p) for p in plan.powers]
        self._maps = [
            None if expr == vector else (closure(expr), vector.name)
            for expr, vector in ((plan.left, sym.Q_VEC), (plan.right, sym.K_VEC))
        ]

    def __call__(
        self,
        bound: Bound,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        places: Tensor | None,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        stepwise: bool,
        chunk: int | None,
        want_last: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """out in q's dtype, and the last state or None. places: where tokens of packed sequences stand."""
        left, right, value, gain = self.operands(bound, q, k, v, places)
        call = (left, right, value, list(self.powers(bound)))
        sums, total, last = library.forward_op(*call, initial, cu_seqlens, stepwise, chunk, want_last, self._key)
        out = sums * self.factor(total, gain).unsqueeze(-1)
        return out.to(q.dtype), last if want_last else None

    @property
    def plain(self) -> bool:
        """Whether the kernels' operands are q, k and v themselves."""
        return not self.rows.names and self._maps == [None, None]

    def powers(self, bound: Bound) -> tuple[float, ...]:
        """The weight's numbers for a call."""
        env = numbers(bound)
        return tuple(float(p(env)) for p in self._powers)

    def factor(self, total: Tensor, gain: Tensor | None) -> Tensor:
        """The factor of the sum of weighted values, float32 (B, H, L)."""
        found, _ = self.rows.weight_and_slope(total, gain)
        return found if isinstance(found, Tensor) else torch.full_like(total, found)

    def slope(self, total: Tensor) -> Tensor:
        """The derivative of its logarithm by the row's total."""
        _, found = self.rows.weight_and_slope(total, None)
        return found if isinstance(found, Tensor) else torch.full_like(total, found)

    def operands(
        self, bound: Bound, q: Tensor, k: Tensor, v: Tensor, places: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Features of degree 1 with their tokens' factors, the values, and each row's own factor of the output."""
        rows = dict(zip(self.rows.names, self.rows.tokens(bound, q.device, places=places), strict=True))
        env = numbers(bound)
        left, right = (self._features(x, side, env) for side, x in enumerate((q, k)))
        if "row" in rows:
            left = left.float() * rows["row"].unsqueeze(-1)
        if "col" in rows:
            group = q.shape[1] // k.shape[1]
            if group > 1 and sym.H in self.plan.col.free_symbols:
                right, v = right.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
                group = 1
            right = right.float() * rows["col"][:, ::group].unsqueeze(-1)
        return left.to(q.dtype), right.to(k.dtype), v, rows.get("gain")

    def _features(self, x: Tensor, side: int, env: dict[str, Any]) -> Tensor:
        """The features of degree 1, without the factors of tokens."""
        found = self._maps[side]
        if found is None:
            return x
        function, name = found
        value = function({**env, name: x.float()})
        return value if isinstance(value, Tensor) else torch.full_like(x, float(value))
