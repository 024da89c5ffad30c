"""Normalize the reduction stage to the IR's form, out = row.sum(f * v_vec): one sum, however many the formula has.

A factor that is constant in a row is moved into the sum, where the passes can handle it. With several branches, f is a
sum of their weights, each with its own factor.
"""

from __future__ import annotations

import sympy

from attncc.errors import SpecError
from attncc.ir import symbols as sym
from attncc.ir.graph import Stage
from attncc.ir.text import formula

_REMEDY = "write row.sum(weight * v_vec), or row.sum(weight * factor * v_vec)"


def canonical(result: sympy.Expr, sums: list[Stage], weights: tuple[sympy.Symbol, ...]) -> sympy.Expr:
    """The operand of the one row.sum that a traced reduction comes to. Raises SpecError where it comes to none."""
    vectors = {sym.row_symbol("sum", i): stage.expr for i, stage in enumerate(sums)}
    used = [v for v in vectors if v in result.free_symbols]
    if not used or any(not vectors[v].has(sym.V_VEC) for v in used):
        raise SpecError("the reduction must be one row.sum(... * v_vec)", remedy=_REMEDY)
    inside = sorted(s.name for s in result.free_symbols & {sym.V_VEC, sym.KV_IDX, *weights})
    if inside:
        raise SpecError(f"'{inside[0]}' is used outside of a row.sum(...)", remedy=_REMEDY)
    factors = {v: result.diff(v) for v in used}
    remainder = sympy.expand(result - sympy.Add(*(f * v for v, f in factors.items())))
    if remainder != 0 or any(f.free_symbols & set(vectors) for f in factors.values()):
        raise SpecError(
            f"'{formula(result)}' is not linear in row.sum(...)",
            remedy="the result is a sum of row.sum(... * v_vec), each times a factor of the row",
        )
    if len(used) == 1 and factors[used[0]] == 1:
        return vectors[used[0]]
    return sym.V_VEC * sympy.Add(*(factors[v] * vectors[v].coeff(sym.V_VEC) for v in used))


def by_branch(operand: sympy.Expr, weights: tuple[sympy.Symbol, ...]) -> sympy.Expr:
    """The operand of the sum as v_vec * (factor * weight[0] + factor * weight[1] + ...), factors free of weights."""
    factor = operand.coeff(sym.V_VEC)
    factors = [factor.diff(w) for w in weights]
    linear = sympy.expand(factor - sympy.Add(*(f * w for f, w in zip(factors, weights, strict=True)))) == 0
    if not linear or any(f.free_symbols & set(weights) for f in factors):
        raise SpecError(
            f"v is weighed by '{formula(factor)}', which is no sum of the branches' weights",
            remedy="write row.sum((weight[0] - factor * weight[1]) * v_vec)",
        )
    for f, w in zip(factors, weights, strict=True):
        if f == 0:
            raise SpecError(f"the reduction does not use {w}", remedy="use it, or declare fewer branches")
    return sym.V_VEC * sympy.Add(*(f * w for f, w in zip(factors, weights, strict=True)))
