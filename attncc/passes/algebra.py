"""Algebraic tests of pair expressions: whether one is zero, and whether one is another times a factor per row.

A condition is treated as a symbol that is 0 or 1, which turns functions with cases into polynomials in such symbols:
relu(x) = [x > 0] x. Evaluation at a few random points rejects most candidates before any algebra. If algebra cannot
decide, the answer is no; this may cost a derivation a faster form, never its correctness.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import sympy
from sympy.core.relational import Relational

from attncc.ir import vocabulary as voc
from attncc.ir.levels import Level, level, level_of_name, varies_by_key
from attncc.ir.vocabulary import Read
from attncc.passes.numeric import evaluate

_POINTS = 12
_CLOSE = 1e-9


def is_zero(expr: sympy.Expr) -> bool:
    """Whether a pair expression is 0 for every pair and row."""
    values = _values(expr)
    if values is not None and np.abs(values).max() > _CLOSE * max(_magnitude(expr), 1e-30):
        return False
    cases = _Cases()
    total = cases.settle(sympy.expand(cases.plain(expr), power_exp=True))
    if total == 0:
        return True
    above, _ = sympy.fraction(sympy.together(total))
    return bool(cases.settle(sympy.expand(above, power_exp=True)) == 0)


def row_ratio(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    """The factor k per row with a = k b, where b is not 0; None if there is none, or none is found."""
    if b == 0 or not _proportional(a, b):
        return None
    for short in (True, False):
        cases, names = _Cases(), _RowValues() if short else None
        above, below = (cases.plain(names.shortened(e) if names else e) for e in (a, b))
        ratio = above / below
        for simplify in (lambda e: e, sympy.powsimp, sympy.expand_power_exp, sympy.cancel):
            ratio = cases.settle(simplify(ratio))
            found = cases.spelled(ratio)
            if found is not None and not varies_by_key(found):
                return names.spelled(found) if names else found
    return None


def held_at_zero(ratio: sympy.Expr, weight: sympy.Expr) -> sympy.Expr:
    """`ratio`, a ratio to the weight, but 0 in rows where it would divide by a factor of the weight that is 0. Such a
    factor has one value per row, e.g. relu of a statistic, whose slope is 0 there, too."""
    forms = (weight, sympy.factor_terms(weight), sympy.factor(weight))
    factors = {f.as_base_exp() for form in forms for f in sympy.Mul.make_args(form)}
    under = sympy.factor(sympy.fraction(sympy.together(ratio))[1])
    below = {sympy.expand(f.as_base_exp()[0]) for f in sympy.Mul.make_args(under)}
    zeros = [
        base
        for base, power in factors
        if power.is_positive and not varies_by_key(base) and {sympy.expand(base), sympy.expand(-base)} & below
    ]
    none = sympy.Or(*(sympy.Eq(z, 0) for z in sorted(zeros, key=str)))
    return ratio if none == sympy.false else voc.where(none, sympy.S.Zero, ratio)


class _RowValues:
    """Parts of an expression that are the same for a whole row, as symbols, so that algebra does not expand them."""

    def __init__(self) -> None:
        self._symbols: dict[Any, sympy.Symbol] = {}

    def shortened(self, expr: Any) -> Any:
        """The expression with its largest parts per row replaced by symbols."""
        if not expr.args or isinstance(expr, (*voc.BOOLEANS, Read)):
            return expr
        if varies_by_key(expr) or expr.is_number or isinstance(expr, sympy.exp):
            return expr.func(*(self.shortened(a) for a in expr.args))
        number, part = expr.as_coeff_Mul()
        if number != 1:  # x and -x are one part
            return number * self.shortened(part)
        name = f"row_part_{len(self._symbols) + 1000}"
        return self._symbols.setdefault(expr, sympy.Symbol(name, real=True))

    def spelled(self, expr: sympy.Expr) -> sympy.Expr:
        """The expression with the symbols replaced by the parts again."""
        return expr.xreplace({symbol: part for part, symbol in self._symbols.items()})


class _Cases:
    """Conditions of an expression, as symbols that are 0 or 1."""

    def __init__(self) -> None:
        self._symbols: dict[Any, sympy.Symbol] = {}

    def plain(self, expr: Any) -> Any:
        """The expression with its cases as polynomials."""
        if not expr.args or isinstance(expr, Read):
            return expr
        if isinstance(expr, voc.to_float) and isinstance(expr.args[0], voc.BOOLEANS):
            return self.truth(expr.args[0])
        if isinstance(expr, voc.where):
            holds = self.truth(expr.args[0])
            return holds * self.plain(expr.args[1]) + (1 - holds) * self.plain(expr.args[2])
        args = [self.plain(a) for a in expr.args]
        if isinstance(expr, voc.step):
            return self._positive(args[0])
        if isinstance(expr, voc.relu):
            return self._positive(args[0]) * args[0]
        if isinstance(expr, voc.absolute):
            return voc.sign(_signed(args[0])) * args[0]
        if isinstance(expr, voc.maximum | voc.minimum):
            a, b = args
            first = self._positive(a - b if isinstance(expr, voc.maximum) else b - a)
            return first * a + (1 - first) * b
        return expr.func(*args)

    def truth(self, condition: Any) -> Any:
        """A condition as 0 or 1."""
        if condition in (sympy.true, sympy.false):
            return sympy.Integer(bool(condition))
        if isinstance(condition, sympy.Not):
            return 1 - self.truth(condition.args[0])
        if isinstance(condition, sympy.And):
            return sympy.Mul(*(self.truth(c) for c in condition.args))
        if isinstance(condition, sympy.Or):
            return 1 - sympy.Mul(*(1 - self.truth(c) for c in condition.args))
        if not isinstance(condition, Relational):
            return self._symbol(condition)
        difference: Any = condition.lhs - condition.rhs
        if isinstance(condition, sympy.Gt):
            return self._positive(difference)
        if isinstance(condition, sympy.Lt):
            return self._positive(-difference)
        if isinstance(condition, sympy.Ge):
            return 1 - self._positive(-difference)
        if isinstance(condition, sympy.Le):
            return 1 - self._positive(difference)
        return self._symbol(condition)

    def settle(self, expr: sympy.Expr) -> sympy.Expr:
        """Replace positive powers of conditions, which are 0 or 1, by the conditions."""
        own = set(self._symbols.values())
        return expr.replace(lambda e: e.is_Pow and e.base in own and e.exp.is_positive, lambda e: e.base)

    def spelled(self, expr: sympy.Expr) -> sympy.Expr | None:
        """The expression with its conditions instead of symbols; None if one of them varies within a row."""
        named = {symbol: condition for condition, symbol in self._symbols.items() if symbol in expr.free_symbols}
        if any(varies_by_key(c) for c in named.values()):
            return None
        return expr.xreplace({symbol: voc.to_float(condition) for symbol, condition in named.items()})

    def _positive(self, x: sympy.Expr) -> sympy.Symbol:
        return self._symbol(sympy.Gt(_signed(x), 0, evaluate=False))

    def _symbol(self, condition: Any) -> sympy.Symbol:
        return self._symbols.setdefault(condition, sympy.Dummy("holds", integer=True, nonnegative=True))


def _signed(x: sympy.Expr) -> sympy.Expr:
    """A simpler expression with the sign of x: without the exponentials that all of its terms have in common."""
    common = sympy.factor_terms(sympy.expand(x, power_exp=True))
    return sympy.expand(sympy.Mul(*(f for f in sympy.Mul.make_args(common) if not isinstance(f, sympy.exp))))


def _values(expr: sympy.Expr) -> np.ndarray | None:
    """The expression's values at random pairs (columns) of random rows; None if any of them is not finite.

    A symbol has the same values in every expression.
    """
    stand_ins = {r: sympy.Symbol(f"read {r}", real=True) for r in expr.atoms(Read)}
    levels = {s: level_of_name(s.name) for s in expr.free_symbols} | {s: level(r) for r, s in stand_ins.items()}
    env = {symbol.name: _random(symbol, own) for symbol, own in levels.items()}
    values = np.broadcast_to(np.asarray(evaluate(expr.xreplace(stand_ins), env), np.float64), (_POINTS, _POINTS))
    return values if np.isfinite(values).all() else None


def _random(symbol: sympy.Symbol, own: Level) -> np.ndarray:
    generator = np.random.default_rng(zlib.crc32(symbol.name.encode()))
    shape = {Level.ROW: (_POINTS, 1), Level.COL: (1, _POINTS), Level.PAIR: (_POINTS, _POINTS)}.get(own, (1, 1))
    if symbol.is_integer:
        return generator.integers(1, 9, shape)
    if own == Level.ROW or symbol.is_positive:
        return generator.uniform(0.4, 1.6, shape)
    return generator.normal(0.5, 1.0, shape)


def _magnitude(expr: sympy.Expr) -> float:
    """The largest absolute value of a term of the expression, at the random pairs."""
    largest = 0.0
    for term in sympy.Add.make_args(expr):
        values = _values(term)
        largest = max(largest, float(np.abs(values).max()) if values is not None else 1.0)
    return largest


def _proportional(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether a / b may be the same for all keys of a row. False only if random points prove otherwise."""
    above, below = _values(a), _values(b)
    return above is None or below is None or _same_ratio(above, below)


def _same_ratio(above: np.ndarray, below: np.ndarray) -> bool:
    at = np.abs(below).argmax(1)[:, None]
    unit = np.take_along_axis(below, at, 1)
    ratio = np.divide(np.take_along_axis(above, at, 1), unit, out=np.zeros_like(unit), where=unit != 0)
    return bool(np.allclose(above, ratio * below, rtol=1e-7, atol=1e-9 * np.abs(above).max() + 1e-30))
