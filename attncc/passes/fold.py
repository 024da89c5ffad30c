"""Strength reduction: scores in units of log2, so that exp becomes exp2 and its constant is merged into the scale.

With score = ln2 * t and every running maximum in the same unit, exp(score - m) is exp2(t - m): the 1/ln2 joins `scale`
in one multiply per pair. If t is a positive factor, constant in the program, times another value, the row maximum is
taken of that value, and the multiply joins the subtraction in one fused multiply-add.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc
from attncc.ir.graph import VariantGraph
from attncc.ir.levels import Level, level
from attncc.ir.vocabulary import attached
from attncc.passes.differentiate import Backward
from attncc.passes.stream import Online

LN2 = sympy.Symbol("ln2", positive=True)
#: the score in the unit of the kernels, without the positive factor `Folded.unit`
S = sympy.Symbol("s", real=True)


class exp2(voc.Op):
    """2 to the power x; only kernels see it."""

    nargs = 1


class with_sign(voc.Op):
    """f * sign(x), of f and x; only kernels see it."""

    nargs = 2


@dataclass(frozen=True)
class Folded:
    """The score of a kernel: score = unit * S, with S computed by `score` and `unit` > 0 the same for the whole
    program."""

    score: sympy.Expr
    unit: sympy.Expr
    log2: bool

    def apply(self, expr: sympy.Basic) -> sympy.Basic:
        """A formula over SCORE in terms of S, with exp as exp2."""
        result = expr.xreplace({sym.SCORE: (LN2 if self.log2 else 1) * self.unit * S})
        return nested(signed(lower_exp(scaled_after(result)), LN2 if self.log2 else sympy.S.One))

    def apply_online(self, expr: sympy.Basic, maxima: tuple[sympy.Symbol, ...]) -> sympy.Basic:
        """The same for a formula over running maxima, which the forward keeps in the score's unit."""
        if not self.log2:
            return nested(signed(lower_exp(scaled_after(expr.xreplace({sym.SCORE: self.unit * S})))))
        units: dict[sympy.Basic, sympy.Basic] = {}
        for m in maxima:
            units[m] = LN2 * m
            new = sympy.Symbol(f"{m.name}_new", real=True)
            units[new] = LN2 * new
        result = expr.xreplace({**units, sym.SCORE: LN2 * self.unit * S})
        return nested(signed(lower_exp(scaled_after(result)), LN2))

    def maximum_of(self, expr: sympy.Expr) -> sympy.Expr:
        """The operand of a running maximum, in the unit of the forward's maxima."""
        operand = self.apply(expr)
        return per_ln2(operand) if self.log2 else operand


def fold(graph: VariantGraph, online: Online, backward: Backward | None = None) -> Folded:
    """Choose the unit of the score."""
    terms = [online.numerator.term, *(r.term for r in online.sums)]
    for sweep in online.before:
        terms += [r.term for r in sweep.sums] + ([sweep.root.term] if sweep.root else [])
    log2 = any(t.has(sympy.exp) for t in terms)
    score = attached(graph["score"].expr.xreplace({sym.RAW_SCORE: graph["raw_score"].expr}))
    score = lower_exp(score)
    if log2:
        score = per_ln2(score)
    unit, rest = _positive_factor(score)
    return Folded(rest, unit, log2)


def _positive_factor(score: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    unit, rest = sympy.S.One, sympy.S.One
    for f in sympy.Mul.make_args(score):
        if level(f) == Level.PROGRAM and f.is_positive:
            unit *= f
        else:
            rest *= f
    return unit, rest


def per_ln2(expr: sympy.Expr) -> sympy.Expr:
    """expr / ln2, with the division pushed to where it costs least."""
    if expr.is_Add:
        return sympy.Add(*(per_ln2(a) for a in expr.args))
    if isinstance(expr, voc.maximum | voc.minimum):
        return type(expr)(*(per_ln2(a) for a in expr.args))
    if isinstance(expr, voc.absolute | voc.relu):
        return type(expr)(per_ln2(expr.args[0]))
    if isinstance(expr, voc.where):
        return voc.where(expr.args[0], per_ln2(expr.args[1]), per_ln2(expr.args[2]))
    if expr.is_Mul and LN2 not in expr.args:
        # A running maximum must have the same unit wherever it is read: a conversion rounds, and the ratio of two equal
        # maxima would not be 1.
        for i, f in enumerate(expr.args):
            if isinstance(f, voc.maximum | voc.minimum | voc.where | voc.absolute | voc.relu) and f.has(LN2):
                return sympy.Mul(*expr.args[:i], per_ln2(f), *expr.args[i + 1 :])
    return expr / LN2


def lower_exp(expr: sympy.Basic) -> sympy.Basic:
    """Every exp as exp2, innermost first."""
    if not expr.has(sympy.exp):
        return expr
    args = [lower_exp(a) for a in expr.args]
    if isinstance(expr, sympy.exp):
        return exp2(per_ln2(sympy.expand(args[0], deep=False, mul=True)))
    if expr.is_Pow and expr.base is sympy.E:
        return exp2(per_ln2(args[1]))
    return expr.func(*args)


def signed(expr: sympy.Basic, unit: sympy.Expr = sympy.S.One) -> sympy.Basic:
    """Every f * sign(x) as f, -f or 0, selected by comparisons of x; or as `with_sign`, if f is a product of a pair's
    exponentials, which are finite. A score is compared in `unit`, which is positive."""
    if not expr.has(voc.sign):
        return expr
    expr = expr.func(*(signed(a, unit) for a in expr.args))
    signs = [f for f in expr.args if isinstance(f, voc.sign)] if expr.is_Mul else []
    if len(signs) != 1:
        return expr
    rest = sympy.Mul(*(f for f in expr.args if f is not signs[0]))
    if not rest.free_symbols or rest.is_Add:
        return expr
    x = signs[0].args[0]
    if S in rest.free_symbols and all(isinstance(f, exp2) for f in sympy.Mul.make_args(rest)):
        return with_sign(rest, _positive_factor(x)[1])
    if S in sympy.Mul.make_args(x):
        x = x / unit  # so that x is the same product as in exponents
    return voc.where(x > 0, rest, voc.where(x < 0, -rest, sympy.S.Zero))


def scaled_after(expr: sympy.Basic) -> sympy.Basic:
    """Every |k * x|, with k > 0 the same for the whole program, as k * |x|, so that k merges with other factors."""
    if not expr.has(voc.absolute):
        return expr
    expr = expr.func(*(scaled_after(a) for a in expr.args))
    if not isinstance(expr, voc.absolute):
        return expr
    factor, rest = _positive_factor(expr.args[0])
    return factor * voc.absolute(rest)


def nested(expr: sympy.Basic) -> sympy.Basic:
    """Every polynomial of the score as c0 + s * (c1 + s * (c2 + ...)): one fused multiply-add per degree."""
    if S not in expr.free_symbols or not expr.args:
        return expr
    if expr.is_Add and expr.is_polynomial(S) and sympy.degree(expr, S) > 1:
        return sympy.horner(expr, wrt=S)
    return expr.func(*(nested(a) for a in expr.args))
