"""Compile expressions to Python functions once: calls then run only PyTorch operations, which torch.compile can
trace."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy

from attncc.ir import vocabulary as voc
from attncc.runtime.evaluate import COMPARISONS, FLOAT_FUNCTIONS, JOIN_FUNCTIONS, evaluate

#: from the values of names: tensors and numbers
Function = Callable[[Mapping[str, Any]], Any]


def closure(expr: Any) -> Function:
    """The expression as a function of its names. What has no form here goes through `evaluate`, in float32."""
    if isinstance(expr, sympy.Symbol):
        name = expr.name
        return lambda env: env[name]
    if isinstance(expr, sympy.Number):
        constant = int(expr) if isinstance(expr, sympy.Integer) else float(expr)
        return lambda env: constant
    if isinstance(expr, sympy.Add | sympy.Mul):
        join = operator.add if isinstance(expr, sympy.Add) else operator.mul
        parts = [closure(a) for a in expr.args]
        return lambda env: functools.reduce(join, (part(env) for part in parts))
    if isinstance(expr, sympy.Pow) and expr.base is not sympy.E and expr.exp.is_number:
        base, power = closure(expr.base), float(expr.exp)
        return lambda env: base(env) ** power
    kind = type(expr)
    table: Mapping[type, Callable[..., Any]] = {**FLOAT_FUNCTIONS, **JOIN_FUNCTIONS, **COMPARISONS}
    if kind in table and expr.args and any(a.free_symbols for a in expr.args):
        function, arguments = table[kind], [closure(a) for a in expr.args]
        if len(arguments) == 1 or all(a.free_symbols for a in expr.args):
            return lambda env: function(*(a(env) for a in arguments))
    if isinstance(expr, voc.maximum | voc.minimum) and expr.args[1].is_number:
        inner, limit = closure(expr.args[0]), float(expr.args[1])
        if isinstance(expr, voc.maximum):
            return lambda env: inner(env).clamp_min(limit)
        return lambda env: inner(env).clamp_max(limit)
    return lambda env: evaluate(expr, env)
