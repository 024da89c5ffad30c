"""What a token has of itself in a chunk plan, and the read before its own step: PyTorch around the kernels, O(N).

A state that is read before the token's own step and k v' is the state of the token before. So the kernels of a plan
without that serve: they are given k, v and the decay of the token before, copies shifted by one, and what the last
token of a sequence leaves is added to the last state. Autograd takes gradients through all of it.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor

from attncc.ir import symbols as sym
from attncc.ir.graph import VariantGraph
from attncc.ir.vocabulary import sum_d
from attncc.passes.diagonal import own_product
from attncc.passes.linearize import Linear
from attncc.runtime import linear_own_library as library
from attncc.runtime.closures import closure
from attncc.runtime.linear_engine import LinearEngine
from attncc.runtime.linear_rows import TokenRows
from attncc.runtime.shapes import Bound

#: factors of tokens that belong to the key, and move with it
_OF_KEYS = ("col", "beta", "step")


class OwnWeight:
    """One plan's weight of a token for itself, and its shift by one token where it reads late."""

    def __init__(self, core: VariantGraph, plan: Linear, engine: LinearEngine | None = None, key: str = ""):
        """engine: that of the plan, whose module adds a weight that is a product of q and k; else PyTorch does."""
        self._plan = plan
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
        self._weight = None if own == 0 else TokenRows(core, plan, {"own": own})
        self._key = None if plan.right == sym.K_VEC else closure(plan.right)

    def add(self, out: Tensor, bound: Bound, q: Tensor, k: Tensor, v: Tensor, places: Tensor | None) -> Tensor:
        """out and each token's own part of it."""
        if self._weight is None:
            return out
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
        own = None if self._weight is None else self._weight.beyond(with_state, placed)
        return own or self._sums.beyond(with_state, placed)

    def before(
        self, k: Tensor, v: Tensor, names: tuple[str, ...], rows: list[Tensor], cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """k, v and the factors of keys as those of the token before; 0 for the first of a sequence."""
        moved = [_shifted(x, cu_seqlens) if n in _OF_KEYS else x for n, x in zip(names, rows, strict=True)]
        return _shifted(k, cu_seqlens), _shifted(v, cu_seqlens), moved

    def behind(
        self,
        state: Tensor,
        k: Tensor,
        v: Tensor,
        names: tuple[str, ...],
        rows: list[Tensor],
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """The state behind the last token of each sequence, from the one before it."""
        if k.shape[2] == 0:
            return state
        given = {n: _last(x, cu_seqlens) for n, x in zip(names, rows, strict=True) if n in _OF_KEYS}
        group = state.shape[1] // k.shape[1]
        key, value = (_heads(_last(x, cu_seqlens), group).float() for x in (k, v))
        if self._key is not None:
            key = self._key({sym.K_VEC.name: key})
        if "col" in given:
            key = key * given["col"].unsqueeze(-1)
        if self._plan.bias is not None:
            key = torch.cat([key, given["beta"].unsqueeze(-1)], -1)
        kept = state
        if "step" in given:
            step = given["step"].float()
            kept = state * (step if self._plan.decay == "channel" else step.unsqueeze(-1)).exp().unsqueeze(-1)
        found = kept + key.unsqueeze(-1) * value.unsqueeze(-2)
        if cu_seqlens is None:
            return found
        return torch.where((cu_seqlens.diff() > 0).reshape(-1, 1, 1, 1), found, state)


def _heads(x: Tensor, group: int) -> Tensor:
    """Those of keys for each query head, in dimension 1."""
    return x if group == 1 else x.repeat_interleave(group, 1)


def _shifted(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Dimension 2 by one token: what is first gets 0."""
    moved = torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], 2)
    if cu_seqlens is None:
        return moved
    inside: Any = torch.ones(x.shape[2] + 1, dtype=torch.bool, device=x.device)
    inside = inside.index_fill(0, cu_seqlens[:-1].long(), False)[:-1]
    return torch.where(inside.reshape(-1, *(1 for _ in x.shape[3:])), moved, 0)


def _last(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(sequences, H, ..): that of each sequence's last token."""
    if cu_seqlens is None:
        return x[:, :, -1]
    return x[0].index_select(1, (cu_seqlens[1:].long() - 1).clamp_min(0)).transpose(0, 1)
