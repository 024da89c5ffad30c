"""Weights with a sign, as in cog: sign(x) times a nonnegative value. There weight * sign(x) = |weight|, so that a
cotangent that is a multiple of the weight and a sign needs only the weight per pair, and neither the sign nor the
magnitude."""

from __future__ import annotations

from typing import Any

import sympy

from attncc.ir import vocabulary as voc
from attncc.ir.levels import Level, level, level_of_name
from attncc.passes.reverse import DELTA, DP

#: the final weight of a pair
WEIGHT = sympy.Symbol("pair_weight", real=True)
#: the slope of a pair, in a factor that depends on the slope's sign
SIDE = sympy.Symbol("pair_slope", real=True)


def over_weight(expr: Any, weight: Any) -> Any:
    """If `expr` is weight * (a + b * sign(x)), where sign(x) is the weight's sign, and dp is the only value per pair in
    a and b: a * WEIGHT + b * |WEIGHT|. Else None."""
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


def over_side(expr: Any, sums: frozenset[Any]) -> tuple[Any, Any] | None:
    """If `expr` is f * (a * sign(x) + b * step(x)), where f is not negative, and dp is the only value per pair in a and
    b: the slope f * sign(x), and a + b * step(SIDE), where SIDE stands for that slope. Else None. `sums`: row sums of
    nonnegative terms."""
    late = [f for f in sympy.Mul.make_args(expr) if {DP, DELTA} & f.free_symbols]
    of_pairs = [e for f in late for e in f.atoms(voc.sign, voc.step) if level(e) == Level.PAIR]
    beside = {s: sympy.Symbol(s.name, nonnegative=True) for s in sums}
    magnitude = expr / sympy.Mul(*late)
    if len({e.args[0] for e in of_pairs}) != 1 or not magnitude.xreplace(beside).is_nonnegative:
        return None
    (x,) = {e.args[0] for e in of_pairs}
    sign, above = sympy.Dummy("sign", real=True), voc.step(SIDE)
    rest = sympy.expand(sympy.Mul(*late).xreplace({voc.sign(x): sign, voc.step(x): sign * above}) / sign)
    if rest.has(sign) or any(level_of_name(s.name) == Level.PAIR for s in rest.free_symbols - {DP, DELTA}):
        return None
    return magnitude * voc.sign(x), rest


def ends_with(expr: Any, weight: Any) -> bool:
    """Whether `expr` is 0 wherever the weight is 0, if everything else in it is finite."""
    at_zero = expr.xreplace({voc.absolute(weight): sympy.S.Zero}).xreplace({weight: sympy.S.Zero})
    return expr.has(weight) and at_zero == 0
