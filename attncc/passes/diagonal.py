"""Split a causal weight into two parts: the pairs with earlier tokens, and the pair of a token with itself.

A formula distinguishes them by a condition on positions, `where(kv_idx == q_idx, own, past)`, or by a mask that hides
the token itself. A state carries the past; the token's own part is one value per token, of any form:

    out_i = sum_{j < i} past_ij v_j + own_i v_i

The past may read the state before the token's own decay step: exp(D_{i-1} - D_j) instead of exp(D_i - D_j).
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Not, Or

from attncc.ir import symbols as sym
from attncc.ir.vocabulary import sum_d, where

#: how far the key is behind the query, for keys before it
_BEHIND = sympy.Symbol("behind", integer=True, positive=True)


@dataclass(frozen=True)
class Parts:
    """past: the weight of a pair whose key is before the query; own: that of a token with itself."""

    past: sympy.Expr
    own: sympy.Expr


def positions(weight: sympy.Expr) -> list[sympy.Expr]:
    """The conditions in a weight that depend on both q_idx and kv_idx."""
    return [w.args[0] for w in weight.atoms(where) if {sym.Q_IDX, sym.KV_IDX} <= w.args[0].free_symbols]


def apart(weight: sympy.Expr) -> Parts | sympy.Expr:
    """Both parts of a weight; or a condition that does not separate the token itself from all tokens before it."""
    settled: dict[int, dict[sympy.Expr, sympy.Expr]] = {0: {}, 1: {}}
    for condition in positions(weight):
        for i, behind in enumerate((sympy.S.Zero, _BEHIND)):
            truth = _settled(condition, behind)
            if truth not in (sympy.true, sympy.false):
                return condition
            settled[i][condition] = truth

    def at(i: int) -> sympy.Expr:
        return weight.replace(
            lambda e: isinstance(e, where) and e.args[0] in settled[i],
            lambda e: e.args[1] if settled[i][e.args[0]] is sympy.true else e.args[2],
        )

    return Parts(past=at(1), own=at(0))


def own_product(own: sympy.Expr | None) -> tuple[sympy.Expr, sympy.Expr] | None:
    """(factor, weight) if a token's own weight is weight * sum_d(factor * q_vec * k_vec), else None. Factors that are
    the same for all channels are in `weight`."""
    sums = set() if own is None else own.atoms(sum_d)
    if own is None or len(sums) != 1:
        return None
    (product,) = sums
    weight = own.coeff(product)
    factor = product.args[0] / (sym.Q_VEC * sym.K_VEC)
    if sympy.expand(own - weight * product) != 0 or {sym.Q_VEC, sym.K_VEC} & (
        weight.free_symbols | factor.free_symbols
    ):
        return None
    alike, factor = factor.as_independent(sym.COMPONENT, as_Add=False)
    return factor, weight * alike


def _settled(condition: sympy.Expr, behind: sympy.Expr) -> sympy.Expr:
    """A condition on positions, with q_idx = kv_idx + `behind`."""
    if isinstance(condition, And | Or | Not):
        return condition.func(*(_settled(a, behind) for a in condition.args))
    if not isinstance(condition, Relational):
        return condition
    # queries and keys are the same tokens
    difference = (condition.lhs - condition.rhs).subs(sym.Q_LEN, sym.KV_LEN).subs(sym.Q_IDX, sym.KV_IDX + behind)
    return condition.func(sympy.expand(difference), 0)
