"""Masks that are added, as score + (1 - shown[b, kv_idx]) * -1e9: where the large terms cancel, the score is kept.

Algebra multiplies a sum by a number term by term. What that leaves, score + 1e9 * shown - 1e9, is the same to
mathematics; computed, no digit of the score comes through it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import sympy

from attncc.ir import vocabulary as voc

#: from here on, what float32 rounds of a term is larger than what a score is held to
_LARGE = 1024


def cancelled(expr: Any, graded: Collection[str] = ()) -> Any:
    """`expr`, where large terms of a sum that cancel leave exactly 0. Those that read an input of `graded`, whose
    gradient goes through them, stay as they are."""
    if not expr.args or not any(abs(n) >= _LARGE for n in expr.atoms(sympy.Number)):
        return expr
    if not expr.is_Add:
        return expr.func(*(cancelled(a, graded) for a in expr.args))
    terms = [cancelled(t, graded) for t in expr.args]
    large = [t for t in terms if abs(t.as_coeff_Mul()[0]) >= _LARGE and _switches(t, graded)]
    number = sympy.Add(*(t for t in terms if t.is_Number))
    if not large or (abs(number) < _LARGE and len(large) < 2):
        return sympy.Add(*terms)
    rest = [t for t in terms if t not in large and not t.is_Number]
    total = sympy.Add(*large)
    factor, switch = total.as_coeff_Mul()
    shown = _condition(switch)
    if shown is not None and factor == -number:
        return sympy.Add(voc.where(shown, sympy.S.Zero, number), *rest)
    return sympy.Add(voc.where(sympy.Eq(switch, _whole(-number / factor)), sympy.S.Zero, total + number), *rest)


def _switches(term: Any, graded: Collection[str]) -> bool:
    """Whether the expression is a number times a value of an input or a condition, such as 0 or 1."""
    reads = {str(r.input) for r in term.atoms(voc.Read)}
    counted = any(_condition(a) is not None for a in term.atoms(voc.to_int, voc.to_float))
    return not reads & set(graded) and (bool(reads) or counted)


def _condition(expr: Any) -> Any:
    """The condition that is counted as 1 or 0, or None."""
    while isinstance(expr, voc.to_int | voc.to_float):
        (expr,) = expr.args
    return expr if isinstance(expr, voc.BOOLEANS) else None


def _whole(number: Any) -> Any:
    """A number as an integer, if it is one."""
    return sympy.Integer(int(number)) if number == int(number) else number
