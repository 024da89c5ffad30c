"""Derivatives of the IR's expressions."""

from __future__ import annotations

import sympy


def derivative(expr: sympy.Expr, wrt: sympy.Expr) -> sympy.Expr:
    """The derivative by a symbol or by an element read."""
    if isinstance(wrt, sympy.Symbol):
        return expr.diff(wrt)
    stand_in = sympy.Dummy("read", real=True)
    return expr.xreplace({wrt: stand_in}).diff(stand_in).xreplace({stand_in: wrt})
