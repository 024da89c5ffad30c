"""What a token has of itself beside what a chunk plan's kernels give it, a weight of its own value: O(N)."""

from __future__ import annotations

import sympy
from torch import Tensor

from attncc.ir import symbols as sym
from attncc.ir.graph import VariantGraph
from attncc.ir.vocabulary import sum_d
from attncc.passes.diagonal import own_product
from attncc.passes.linearize import Linear
from attncc.runtime import linear_own_library as library
from attncc.runtime.linear_engine import LinearEngine
from attncc.runtime.linear_rows import TokenRows
from attncc.runtime.shapes import Bound


class OwnWeight:
    """One plan's weight of a token for itself."""

    def __init__(self, core: VariantGraph, plan: Linear, engine: LinearEngine | None = None, key: str = ""):
        """engine: that of the plan, whose module adds a weight that is a product of q and k; else PyTorch does."""
        assert plan.own is not None
        self._product = self._key_of = None
        product = own_product(plan.own) if engine is not None else None
        if engine is not None and product is not None:
            named = {name: expr for name, expr in zip(("factor", "weight"), product, strict=True) if expr != 1}
            self._product = {name: TokenRows(core, plan, {name: expr}) for name, expr in named.items()}
            self._key_of = library.register(f"{engine.graph.digest}:{key}", engine)
        sums = sorted(plan.own.atoms(sum_d), key=str)
        named = {f"sum_{i}": s for i, s in enumerate(sums)}
        own = plan.own.xreplace({s: sympy.Symbol(name, real=True) for name, s in named.items()})
        self._names = tuple(named)
        self._sums = TokenRows(core, plan, {name: s.args[0] for name, s in named.items()})
        self._weight = TokenRows(core, plan, {"own": own})

    def add(self, out: Tensor, bound: Bound, q: Tensor, k: Tensor, v: Tensor, places: Tensor | None) -> Tensor:
        """out and each token's own part of it."""
        if self._product is not None:
            given = {
                name: rows.tokens(bound, q.device, places=places, spread=name == "weight")[0]
                for name, rows in self._product.items()
            }
            added: Tensor = library.forward_op(out, q, k, v, given.get("factor"), given.get("weight"), self._key_of)
            return added
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
