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
    """A column sum in the backward.

    - share: a pair's share of the sum;
    - symbol: the mean of `value` over the queries of a key, weighted by share, which the sweep computes;
    - by: the factor of the mean times the derivative of the share in a pair's cotangent;
    - normed: the mean is divided by the sum of the shares, which differs from 1 only by rounding."""

    symbol: sympy.Symbol
    share: sympy.Expr
    value: sympy.Expr
    by: sympy.Expr
    normed: bool

    def to(self, wrt: sympy.Expr) -> sympy.Expr:
        """The cotangent that the score, or an element read, receives through the sum."""
        return self.by * self.symbol * derivative(self.share, wrt)


def column(number: int, cotangent: sympy.Expr, share: sympy.Expr) -> Column:
    """A column sum, given each pair's cotangent of its log."""
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
    """The element reads in the shares, in a fixed order."""
    return sorted(set().union(*(c.share.atoms(Read) for c in columns)), key=str)
