"""Gradients through column sums, as in a softmax over the queries.

With L = sum_i f(s_i) over the queries of a key, share_i = f(s_i) / L, and E_i the cotangent of log L from pair i,

    dlog L = sum_i E_i        ds_i += dlog L * f'(s_i) / L = dlog L * share_i'

If E_i = -k(key) * y_i * share_i, as when the weight is a function of the share, then with mean = sum_i y_i share_i,
and because the shares of a key sum to 1,

    ds_i = k (y_i - mean) share_i'

In this form, values common to all queries cancel before anything is rounded: the mean of a single value is that value.
A sweep over the queries computes the mean of each key, from the same shares and y_i as the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from attncc.ir import symbols as sym
from attncc.ir.levels import Level, level
from attncc.ir.vocabulary import Read
from attncc.passes.calculus import derivative


@dataclass(frozen=True)
class Column:
    """A column sum in the backward. symbol: the mean over the queries that the sweep makes, of `value`; share: what a
    pair has of the sum; by: what the mean is multiplied by, with the slope of the share, in a pair's cotangent.
    normed: the mean is over the sum of the shares, which is 1 but for what was rounded."""

    symbol: sympy.Symbol
    share: sympy.Expr
    value: sympy.Expr
    by: sympy.Expr
    normed: bool

    def to(self, wrt: sympy.Expr) -> sympy.Expr:
        """The cotangent that passes through the sum to the score, or to an element read."""
        return self.by * self.symbol * derivative(self.share, wrt)


def column(number: int, cotangent: sympy.Expr, share: sympy.Expr) -> Column:
    """A column sum, from the cotangent that each pair has of its log."""
    symbol = sympy.Symbol(f"col_mean_{number}", real=True)
    ratio = sympy.powsimp(sympy.factor_terms(cotangent) / share, combine="exp")
    if sym.SCORE in ratio.free_symbols:
        return Column(symbol, share, cotangent, sympy.S.One, normed=False)
    of_key, of_pair = sympy.S.One, sympy.S.One
    for factor in sympy.Mul.make_args(ratio):
        if level(factor) in (Level.PROGRAM, Level.COL):
            of_key *= factor
        else:
            of_pair *= factor
    return Column(symbol, share, of_pair, of_key, normed=True)


def reads_of_shares(columns: tuple[Column, ...]) -> list[Read]:
    """Element reads that the terms of sums have."""
    return sorted(set().union(*(c.share.atoms(Read) for c in columns)), key=str)
