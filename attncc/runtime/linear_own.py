"""A token's own part in PyTorch, for chunk plans whose kernels do not compute it: O(N), a weight per token."""

from __future__ import annotations

import sympy
from torch import Tensor

from attncc.ir import symbols as sym
from attncc.ir.graph import VariantGraph
from attncc.ir.vocabulary import sum_d
from attncc.passes.linearize import Linear
from attncc.runtime.linear_rows import TokenRows
from attncc.runtime.shapes import Bound


class OwnWeight:
    """One plan's weight of a token for itself."""

    def __init__(self, core: VariantGraph, plan: Linear):
        assert plan.own is not None
        sums = sorted(plan.own.atoms(sum_d), key=str)
        named = {f"sum_{i}": s for i, s in enumerate(sums)}
        own = plan.own.xreplace({s: sympy.Symbol(name, real=True) for name, s in named.items()})
        self._names = tuple(named)
        self._sums = TokenRows(core, plan, {name: s.args[0] for name, s in named.items()})
        self._weight = TokenRows(core, plan, {"own": own})

    def add(self, out: Tensor, bound: Bound, q: Tensor, k: Tensor, v: Tensor, places: Tensor | None) -> Tensor:
        """out and each token's own part of it."""
        group = q.shape[1] // k.shape[1]
        vectors = {sym.Q_VEC.name: q.float(), sym.K_VEC.name: _heads(k, group).float()}
        products = self._sums.tokens(bound, q.device, vectors, places)
        found = {name: x.sum(-1) for name, x in zip(self._names, products, strict=True)}
        (weight,) = self._weight.tokens(bound, q.device, found, places)
        return (out.float() + weight.unsqueeze(-1) * _heads(v, group).float()).to(out.dtype)

    def beyond(self, with_state: bool, placed: bool) -> str | None:
        """As `TokenRows.beyond` says of these factors."""
        return self._weight.beyond(with_state, placed) or self._sums.beyond(with_state, placed)


def _heads(x: Tensor, group: int) -> Tensor:
    """Those of keys for each query head, in dimension 1."""
    return x if group == 1 else x.repeat_interleave(group, 1)
