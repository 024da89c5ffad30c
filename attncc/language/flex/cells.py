"""An element of a traced tensor: an expression, and the condition under which it is -inf instead.

FlexAttention users hide pairs in a score_mod by a score of -inf. The language has no infinite scores (the mask stage
hides pairs), so the condition is carried beside the expression until it can join the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy

from attncc.ir import vocabulary as voc
from attncc.ir.text import formula
from attncc.language import functions as fn
from attncc.language.values import Value, fail, lift


@dataclass(frozen=True, slots=True)
class Cell:
    """One element: `value`, but minus infinity where `hidden`, a boolean expression, holds."""

    value: Value
    hidden: Any = sympy.false

    def __repr__(self) -> str:
        text = formula(self.value.expr)
        return text if self.hidden is sympy.false else f"{text} (-inf where {formula(self.hidden)})"


def cell(x: Any) -> Cell:
    """A Python number or boolean, or a Value, as a cell."""
    if isinstance(x, Cell):
        return x
    if isinstance(x, float) and x == -math.inf:
        return Cell(Value(sympy.S.Zero), sympy.true)
    return Cell(lift(x))


def plain(function: Callable[..., Value], *operands: Cell) -> Cell:
    """A function of finite numbers."""
    for operand in operands:
        if operand.hidden is not sympy.false:
            fail(
                "minus infinity enters arithmetic here",
                "hide the pair last: torch.where(visible, score, -inf), or in the mask_mod",
            )
    return Cell(function(*(o.value for o in operands)))


def add(a: Cell, b: Cell) -> Cell:
    """a + b: minus infinity where either is."""
    return Cell(number(a.value) + number(b.value), sympy.Or(a.hidden, b.hidden))


def subtract(a: Cell, b: Cell) -> Cell:
    """a - b, for a finite b."""
    left = Cell(a.value)
    return Cell(plain(lambda x, y: number(x) - number(y), left, b).value, a.hidden)


def multiply(a: Cell, b: Cell) -> Cell:
    """a * b; minus infinity times a positive number stays what it is."""
    if a.hidden is sympy.false and b.hidden is not sympy.false:
        a, b = b, a
    if a.hidden is not sympy.false and not number(b.value).expr.is_positive:
        plain(lambda x: x, a)
    return Cell(plain(lambda x, y: number(x) * number(y), Cell(a.value), b).value, a.hidden)


def divide(a: Cell, b: Cell) -> Cell:
    """a / b; minus infinity over a positive number stays what it is."""
    if a.hidden is not sympy.false and not number(b.value).expr.is_positive:
        plain(lambda x: x, a)
    return Cell(plain(lambda x, y: number(x) / number(y), Cell(a.value), b).value, a.hidden)


def where(condition: Cell, a: Cell, b: Cell) -> Cell:
    """a where the condition holds, else b. What is hidden needs no value, so that a choice of -inf is no choice."""
    test = truth(condition)
    if a.hidden is sympy.true:
        return Cell(b.value, sympy.Or(test.expr, b.hidden))
    if b.hidden is sympy.true:
        return Cell(a.value, sympy.Or(sympy.Not(test.expr), a.hidden))
    hidden = sympy.Or(sympy.And(test.expr, a.hidden), sympy.And(sympy.Not(test.expr), b.hidden))
    if a.value.type == b.value.type == "bool":
        both = sympy.Or(sympy.And(test.expr, a.value.expr), sympy.And(sympy.Not(test.expr), b.value.expr))
        return Cell(Value(both), hidden)
    return Cell(fn.where(test, number(a.value), number(b.value)), hidden)


def maximum(a: Cell, b: Cell) -> Cell:
    """The larger; minus infinity where both are."""
    value = fn.maximum(number(a.value), number(b.value))
    if a.hidden is not sympy.false:
        value = fn.where(Value(a.hidden), number(b.value), value)
    if b.hidden is not sympy.false:
        value = fn.where(Value(b.hidden), number(a.value), value)
    return Cell(lift(value), sympy.And(a.hidden, b.hidden))


def minimum(a: Cell, b: Cell) -> Cell:
    """The smaller; minus infinity where either is."""
    return Cell(lift(fn.minimum(number(a.value), number(b.value))), sympy.Or(a.hidden, b.hidden))


def number(value: Value) -> Value:
    """A boolean as 0 or 1, as PyTorch's arithmetic has it; a number as it is."""
    if value.type != "bool":
        return value
    if value.expr in (sympy.true, sympy.false):
        return lift(int(bool(value.expr)))
    return Value(voc.to_int(value.expr))


def truth(operand: Cell) -> Value:
    """Whether it is not 0, as PyTorch's logic has it."""
    value = plain(lambda x: x, operand).value
    return value if value.type == "bool" else value != 0
