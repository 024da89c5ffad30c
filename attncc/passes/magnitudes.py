"""Weights with a sign, as cog's: sign(x) times what is not negative. Then weight * sign(x) is |weight|, and a cotangent
that is a multiple of the weight by a sign needs nothing of a pair but its weight: no sign, no magnitude beside."""

from __future__ import annotations

from typing import Any

import sympy

from attncc.ir import vocabulary as voc
from attncc.ir.levels import Level, level_of_name
from attncc.passes.reverse import DELTA, DP

#: the final weight of a pair
WEIGHT = sympy.Symbol("pair_weight", real=True)


def over_weight(expr: Any, weight: Any) -> Any:
    """`expr`, which is weight * (a + b * sign(x)), as a * WEIGHT + b * |WEIGHT|, where x is what gives the weight its
    sign, and a and b are made of nothing that a pair has but dp; None where it is no such multiple."""
    of_weight = sympy.Mul.make_args(weight)
    signs = [f for f in of_weight if isinstance(f, voc.sign)]
    if len(signs) != 1 or not all(f.is_nonnegative for f in of_weight if f is not signs[0]):
        return None
    rest = list(sympy.Mul.make_args(expr))
    for factor in of_weight:
        if factor not in rest:
            return None
        rest.remove(factor)
    stand_in = sympy.Dummy("sign", real=True)
    quotient = sympy.expand(sympy.Mul(*rest).xreplace({signs[0]: stand_in}))
    by_sign = quotient.coeff(stand_in)
    alone = sympy.expand(quotient - by_sign * stand_in)
    if alone.has(stand_in) or any(
        level_of_name(s.name) == Level.PAIR for s in quotient.free_symbols - {stand_in, DP, DELTA}
    ):
        return None
    return by_sign * voc.absolute(WEIGHT) + alone * WEIGHT


def ends_with(expr: Any, weight: Any) -> bool:
    """Is `expr` 0 where the weight is, whatever else (all of it finite) it is made of?"""
    at_zero = expr.xreplace({voc.absolute(weight): sympy.S.Zero}).xreplace({weight: sympy.S.Zero})
    return expr.has(weight) and at_zero == 0
