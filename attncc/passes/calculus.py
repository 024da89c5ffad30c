"""Derivatives of the IR's expressions, in forms that stay finite wherever they have a limit."""

from __future__ import annotations

from typing import Any

import sympy

from attncc.ir.vocabulary import where


def derivative(expr: sympy.Expr, wrt: sympy.Expr) -> sympy.Expr:
    """The derivative by a symbol or by an element read."""
    if isinstance(wrt, sympy.Symbol):
        return _joined(expr.diff(wrt))
    stand_in = sympy.Dummy("read", real=True)
    return _joined(expr.xreplace({wrt: stand_in}).diff(stand_in)).xreplace({stand_in: wrt})


def _joined(expr: sympy.Expr) -> sympy.Expr:
    """x**p / x as x**(p - 1), which is 0 at x = 0 and not 0 / 0: sympy keeps the quotient if p is not a number. And
    x**p log(x), the derivative by p, as 0 at x = 0."""

    def is_quotient(e: Any) -> bool:
        return e.is_Mul and any(f.is_Pow and not f.exp.is_number for f in e.args)

    def joined(e: Any) -> Any:
        exponents: dict[Any, Any] = {}
        for factor in e.args:
            base, exponent = (factor.base, factor.exp) if factor.is_Pow else (factor, sympy.S.One)
            exponents[base] = exponents.get(base, sympy.S.Zero) + exponent
        for base, exponent in list(exponents.items()):
            log = sympy.log(base)
            if log in exponents and not exponent.is_number:
                del exponents[log]
                exponents[where(base > 0, log, 0)] = sympy.S.One
        return sympy.Mul(*(base**exponent for base, exponent in exponents.items()))

    return expr.replace(is_quotient, joined)
