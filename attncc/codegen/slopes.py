"""Cotangents of scores as a slope times what waits for dp: the fewer values a pair wait for it, the fewer registers."""

from __future__ import annotations

from typing import Any

import sympy

from attncc.codegen.lower import Lowering
from attncc.codegen.plan import Plan
from attncc.ir import symbols as sym
from attncc.ir.levels import Level
from attncc.passes.differentiate import DELTA, DP
from attncc.passes.fold import S
from attncc.passes.magnitudes import ends_with, over_weight

#: the name of what dp is multiplied by in the cotangent of a score
SLOPE = "slope"


def over_raw(part: Plan, expr: Any) -> Any:
    """A formula over the raw score in terms of q k and the kernel's score."""
    return part.folded.apply(expr.xreplace({sym.RAW_SCORE: part.core["raw_score"].expr}))


def split_slope(dscore: Any) -> tuple[Any, Any] | None:
    """A score's cotangent as its slope and what that is multiplied by, which hangs on dp and delta alone; None where it
    is no such product."""
    late = [f for f in sympy.Mul.make_args(dscore) if {DP, DELTA} & f.free_symbols]
    if not late or any(f.free_symbols - {DP, DELTA} for f in late):
        return None
    return dscore / sympy.Mul(*late), sympy.Mul(*late)


def split_branch_slope(part: Plan, dscore: Any) -> tuple[Any, Any] | None:
    """The same of a branch, whose dp has its factor and so belongs with what a row, or a key, has of its own: the slope
    is the rest, which the score makes."""
    late = [f for f in sympy.Mul.make_args(dscore) if DP in f.free_symbols]
    of_pairs = {S, sym.QK, *map(part.tagged, (S, sym.QK))}
    if not late or any(f.free_symbols & of_pairs for f in late):
        return None
    number, slope = (dscore / sympy.Mul(*late)).as_coeff_Mul()
    return slope, number * sympy.Mul(*late)


def same_slope(part: Plan, dread: Any, dscore: Any) -> bool:
    """Is what is summed for an input of a branch a multiple of the slope of its score?"""
    found, own = split_branch_slope(part, dread), split_branch_slope(part, dscore)
    return found is not None and own is not None and found[0] == own[0]


def slope_of(part: Plan) -> Any:
    """What a part's dp waits for in the cotangent of its score, if that is one value a pair; else None."""
    backward = part.backward
    if over_weight(backward.dqk, backward.weight) is not None:
        return part.folded.apply(backward.weight)
    dscore = over_raw(part, backward.dqk)
    found = split_branch_slope(part, dscore) if part.tag else split_slope(dscore)
    return None if found is None else found[0]


def over_slope(part: Plan, dscore: Any, lowering: Lowering, weight: Any) -> tuple[Any, str | None]:
    """A score's cotangent as a multiple of its slope, which is computed here where it is not the weight, and the name
    of that; the cotangent as it is, and what it is 0 with, or None, where it is no such multiple."""
    found = split_branch_slope(part, dscore) if part.tag else split_slope(dscore)
    if found is None:
        beside = dscore.xreplace({weight: sympy.S.One, DP: sympy.S.One})
        alone = lowering.level_of(beside) != Level.PAIR and ends_with(dscore, weight)
        return dscore, "p" if alone else None
    if lowering.level_of(found[0]) != Level.PAIR:
        return dscore, None
    slope, rest = found
    if slope == weight:
        return dscore, "p"
    name = part.own(SLOPE)
    lowering.assign(name, slope, Level.PAIR)
    return sympy.Symbol(name, real=True) * rest, name
