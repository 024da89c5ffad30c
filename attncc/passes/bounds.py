"""Bounds on values for any scores, as numbers: for the checks that warn of overflow and division by zero.

Sound, not complete: an extent contains every value that occurs, and maybe more. Scores and float inputs may have any
value; a scalar has its default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from attncc.ir import vocabulary as voc
from attncc.ir.graph import VariantGraph
from attncc.ir.vocabulary import Read

INF = math.inf


@dataclass(frozen=True)
class Extent:
    """Every value lies in [lo, hi]; `positive` says that none is 0 or below, where lo = 0 alone leaves 0 open."""

    lo: float
    hi: float
    positive: bool = False

    def __post_init__(self) -> None:
        if self.lo > 0:
            object.__setattr__(self, "positive", True)


ANY = Extent(-INF, INF)
_FIXED: dict[type, Extent] = {
    voc.tanh: Extent(-1, 1),
    voc.sigmoid: Extent(0, 1, positive=True),
    voc.softplus: Extent(0, INF, positive=True),
    voc.step: Extent(0, 1),
    voc.erf: Extent(-1, 1),
    voc.sin: Extent(-1, 1),
    voc.cos: Extent(-1, 1),
    voc.sign: Extent(-1, 1),
    voc.gelu: Extent(-0.17, INF),
    voc.silu: Extent(-0.28, INF),
}


def extent(expr: Any, known: Mapping[sympy.Symbol, Extent]) -> Extent:
    """The extent of an expression; symbols that are not in `known` may be anything that their assumptions allow."""
    if isinstance(expr, sympy.Number):
        return Extent(float(expr), float(expr))
    if isinstance(expr, sympy.Symbol):
        return known.get(expr, _assumed(expr))
    if isinstance(expr, voc.BOOLEANS):
        return Extent(0, 1)
    if isinstance(expr, Read):
        return ANY
    if type(expr) in _FIXED:
        return _FIXED[type(expr)]
    if expr.is_Add:
        return _sum(expr, known)
    if expr.is_Mul:
        result = Extent(1, 1)
        for factor in expr.args:
            result = _product(result, extent(factor, known))
        return result
    if isinstance(expr, sympy.exp):
        inner = extent(expr.args[0], known)
        return Extent(_exp(inner.lo), _exp(inner.hi), positive=True)
    if expr.is_Pow:
        return _power(expr, known)
    return _function(expr, known)


def numbers(graph: VariantGraph) -> dict[sympy.Symbol, Extent]:
    """The values of a graph's scalars: their defaults."""
    from attncc.ir.symbols import scalar_symbol

    return {scalar_symbol(s.name, s.is_int): Extent(float(s.default), float(s.default)) for s in graph.scalars}


def _assumed(symbol: sympy.Symbol) -> Extent:
    if symbol.is_positive:
        return Extent(1 if symbol.is_integer else 0, INF, positive=True)
    return Extent(0, INF) if symbol.is_nonnegative else ANY


def _sum(expr: Any, known: Mapping[sympy.Symbol, Extent]) -> Extent:
    polynomial = _quadratic(expr)
    if polynomial is not None:
        return polynomial
    parts = [extent(a, known) for a in expr.args]
    lo, hi = sum(p.lo for p in parts), sum(p.hi for p in parts)
    for larger in sorted(expr.atoms(voc.maximum), key=str):
        # -maximum(a, b) is at most -a, and at most -b
        if expr.coeff(larger).is_negative:
            for argument in larger.args:
                hi = min(hi, extent(sympy.expand(expr.xreplace({larger: argument})), known).hi)
    return Extent(lo, hi, positive=lo > 0 or (lo >= 0 and any(p.positive for p in parts)))


def _quadratic(expr: Any) -> Extent | None:
    """a x^2 + b x + c of one unbounded x: its least (or largest) value."""
    generators = [s for s in expr.free_symbols if extent(s, {}) == ANY]
    if len(generators) != 1 or expr.atoms(sympy.Function) or not expr.is_polynomial(generators[0]):
        return None
    try:
        a, b, c = (float(x) for x in sympy.Poly(expr, generators[0]).all_coeffs())
    except (ValueError, TypeError):
        return None
    vertex = c - b * b / (4 * a)
    return Extent(vertex, INF) if a > 0 else Extent(-INF, vertex)


def _product(a: Extent, b: Extent) -> Extent:
    ends = [_times(x, y) for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
    return Extent(min(ends), max(ends), positive=a.positive and b.positive)


def _times(x: float, y: float) -> float:
    return 0.0 if x == 0 or y == 0 else x * y  # 0 * inf is a bound that is never reached


def _power(expr: Any, known: Mapping[sympy.Symbol, Extent]) -> Extent:
    base, power = extent(expr.base, known), expr.exp
    if power.is_Integer and power > 0 and power % 2 == 0:
        ends = (abs(base.lo), abs(base.hi))
        least = 0.0 if base.lo <= 0 <= base.hi else min(ends)
        return Extent(_raised(least, int(power)), _raised(max(ends), int(power)), positive=base.positive)
    if power.is_Integer and power > 0:
        return Extent(_raised(base.lo, int(power)), _raised(base.hi, int(power)), positive=base.positive)
    if base.positive:
        lo = 0.0
        hi = INF if base.lo == 0 or power.is_negative is not True else base.lo ** float(power)
        return Extent(lo, hi, positive=True)
    return ANY


def _raised(x: float, power: int) -> float:
    try:
        return x**power
    except OverflowError:
        return INF if x > 0 or power % 2 == 0 else -INF


def _function(expr: Any, known: Mapping[sympy.Symbol, Extent]) -> Extent:
    args = [extent(a, known) for a in expr.args]
    if isinstance(expr, voc.maximum):
        a, b = args
        return Extent(max(a.lo, b.lo), max(a.hi, b.hi), positive=a.positive or b.positive)
    if isinstance(expr, voc.minimum):
        a, b = args
        return Extent(min(a.lo, b.lo), min(a.hi, b.hi), positive=a.positive and b.positive)
    if isinstance(expr, voc.where):
        _, a, b = args
        if expr.args[0] == sympy.Gt(expr.args[1], 0):  # the value is chosen only where it is positive
            a = Extent(max(a.lo, 0), max(a.hi, 0), positive=True)
        return Extent(min(a.lo, b.lo), max(a.hi, b.hi), positive=a.positive and b.positive)
    if isinstance(expr, voc.relu):
        return Extent(max(args[0].lo, 0), max(args[0].hi, 0), positive=args[0].positive)
    if isinstance(expr, voc.absolute):
        largest = max(abs(args[0].lo), abs(args[0].hi))
        return Extent(max(args[0].lo, -args[0].hi, 0), largest, positive=args[0].positive)
    if isinstance(expr, voc.to_float | voc.detach):
        return args[0]
    if isinstance(expr, voc.mod) and args[1].lo > 0:
        return Extent(0, args[1].hi - 1)
    if isinstance(expr, voc.floordiv) and args[1].lo > 0:
        return Extent(min(args[0].lo, 0), max(args[0].hi, 0))  # division by at least 1 moves towards 0
    if isinstance(expr, voc.bit_and | voc.bit_or | voc.bit_xor):
        return _bitwise(expr, *args)
    if isinstance(expr, sympy.log):
        return Extent(
            math.log(args[0].lo) if args[0].lo > 0 else -INF, math.log(args[0].hi) if 0 < args[0].hi < INF else INF
        )
    return ANY


def _bitwise(expr: Any, a: Extent, b: Extent) -> Extent:
    least = [x.hi for x in (a, b) if x.lo >= 0]
    if isinstance(expr, voc.bit_and):
        return Extent(0, min(least)) if least else ANY
    return Extent(0, a.hi + b.hi) if len(least) == 2 else ANY


def _exp(x: float) -> float:
    return 0.0 if x == -INF else INF if x > 700 else math.exp(x)
