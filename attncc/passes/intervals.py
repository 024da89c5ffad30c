"""Interval arithmetic on index expressions: the range of a value, or of a condition, over a box of pairs.

Sound, not complete: an interval contains every value that occurs, and maybe more. Bounds are expressions again, so that
the same result serves the compiler (with numbers) and the kernel (with the box of its own tile).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sympy

from attncc.ir import vocabulary as voc
from attncc.ir.vocabulary import Read


@dataclass(frozen=True)
class Interval:
    """Every value of an expression lies in [lo, hi], both ends included."""

    lo: sympy.Expr
    hi: sympy.Expr

    @property
    def exact(self) -> bool:
        return self.lo == self.hi


Box = Mapping[sympy.Symbol, Interval]
ReadBounds = Callable[[Read], Interval | None]


def interval(expr: sympy.Expr, box: Box, reads: ReadBounds) -> Interval | None:
    """The interval of an integer expression, or None if it is unknown. Symbols that are not in the box are fixed."""
    if not expr.free_symbols & set(box):
        return Interval(expr, expr)
    if isinstance(expr, sympy.Symbol):
        return box[expr]
    if isinstance(expr, Read):
        return reads(expr)
    if expr.is_Add:
        parts = [interval(a, box, reads) for a in sympy.expand(expr).args] if sympy.expand(expr).is_Add else []
        if not parts or any(p is None for p in parts):
            return None
        return Interval(sympy.Add(*(p.lo for p in parts if p)), sympy.Add(*(p.hi for p in parts if p)))
    if expr.is_Mul:
        fixed = sympy.Mul(*(f for f in expr.args if not f.free_symbols & set(box)))
        rest = expr / fixed
        if rest == expr or not (fixed.is_positive or fixed.is_negative):
            return None
        inner = interval(rest, box, reads)
        if inner is None:
            return None
        lo, hi = fixed * inner.lo, fixed * inner.hi
        return Interval(lo, hi) if fixed.is_positive else Interval(hi, lo)
    if isinstance(expr, voc.floordiv | voc.mod):
        inner = interval(expr.args[0], box, reads)
        divisor = expr.args[1]
        if inner is None or not divisor.is_positive or divisor.free_symbols & set(box):
            return None
        if isinstance(expr, voc.mod):
            return Interval(sympy.S.Zero, divisor - 1)
        return Interval(voc.floordiv(inner.lo, divisor), voc.floordiv(inner.hi, divisor))
    if isinstance(expr, voc.maximum | voc.minimum):
        a, b = (interval(x, box, reads) for x in expr.args)
        if a is None or b is None:
            return None
        return Interval(type(expr)(a.lo, b.lo), type(expr)(a.hi, b.hi))
    if isinstance(expr, voc.bit_and | voc.bit_or | voc.bit_xor):
        return _bitwise(expr, box, reads)
    if isinstance(expr, voc.where):
        a, b = (interval(x, box, reads) for x in expr.args[1:])
        if a is None or b is None:
            return None
        return Interval(voc.minimum(a.lo, b.lo), voc.maximum(a.hi, b.hi))
    if isinstance(expr, voc.absolute):
        inner = interval(expr.args[0], box, reads)
        if inner is None:
            return None
        return Interval(sympy.S.Zero, voc.maximum(-inner.lo, inner.hi))
    return None


def _bitwise(expr: sympy.Expr, box: Box, reads: ReadBounds) -> Interval | None:
    """The interval for nonnegative numbers: `&` is at most either of them, `|` and `^` are at most their sum."""
    if isinstance(expr, voc.bit_and):
        masks = [a for a in expr.args if a.is_Integer and a >= 0]
        if masks:
            return Interval(sympy.S.Zero, masks[0])
    a, b = (interval(x, box, reads) for x in expr.args)
    if a is None or b is None or not all(x.is_nonnegative for x in expr.args):
        return None
    if isinstance(expr, voc.bit_and):
        return Interval(sympy.S.Zero, voc.minimum(a.hi, b.hi))
    lo = voc.maximum(a.lo, b.lo) if isinstance(expr, voc.bit_or) else sympy.S.Zero
    return Interval(lo, a.hi + b.hi)


@dataclass(frozen=True)
class Truth:
    """A condition over a box: if `must`, it holds for all pairs; unless `may`, it holds for none."""

    may: sympy.Basic
    must: sympy.Basic

    @property
    def informative(self) -> bool:
        """Whether it excludes any value."""
        return not (self.may is sympy.true and self.must is sympy.false)


#: returns the truth of a condition that intervals cannot decide
Unknown = Callable[[sympy.Basic], Truth]


def nothing_known(condition: sympy.Basic) -> Truth:
    """It may hold, and it may not."""
    return Truth(sympy.true, sympy.false)


def truth(condition: sympy.Basic, box: Box, reads: ReadBounds, unknown: Unknown = nothing_known) -> Truth:
    """The possible values of a boolean expression over a box."""
    if condition in (sympy.true, sympy.false):
        return Truth(condition, condition)
    if isinstance(condition, sympy.And | sympy.Or):
        parts = [truth(a, box, reads, unknown) for a in condition.args]
        return Truth(condition.func(*(p.may for p in parts)), condition.func(*(p.must for p in parts)))
    if isinstance(condition, sympy.Not):
        inner = truth(condition.args[0], box, reads, unknown)
        return Truth(sympy.Not(inner.must), sympy.Not(inner.may))
    if isinstance(condition, sympy.core.relational.Relational):
        return _relation(condition, box, reads, unknown)
    return unknown(condition)


def _relation(condition: sympy.core.relational.Relational, box: Box, reads: ReadBounds, unknown: Unknown) -> Truth:
    difference = condition.lhs - condition.rhs
    if not condition.free_symbols & set(box):
        return Truth(condition, condition)
    d = interval(difference, box, reads) if difference.is_integer else None
    if d is None:
        return unknown(condition)
    lo, hi = d.lo, d.hi
    table = {
        sympy.StrictLessThan: (lo < 0, hi < 0),
        sympy.LessThan: (lo <= 0, hi <= 0),
        sympy.StrictGreaterThan: (hi > 0, lo > 0),
        sympy.GreaterThan: (hi >= 0, lo >= 0),
        sympy.Equality: (sympy.And(lo <= 0, hi >= 0), sympy.And(sympy.Eq(lo, 0), sympy.Eq(hi, 0))),
        sympy.Unequality: (sympy.Not(sympy.And(sympy.Eq(lo, 0), sympy.Eq(hi, 0))), sympy.Or(lo > 0, hi < 0)),
    }
    may, must = table[type(condition)]
    return Truth(may, must)
