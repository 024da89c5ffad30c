"""Compile expressions to Python functions once: calls then run only PyTorch operations, which torch.compile can
trace."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
from torch import Tensor

from attncc.ir import vocabulary as voc
from attncc.runtime.evaluate import FLOAT_FUNCTIONS, JOIN_FUNCTIONS, evaluate

#: from the values of names: tensors and numbers
Function = Callable[[Mapping[str, Any]], Any]

#: functions of what is one number for the whole call: a scalar, a length
_OF_NUMBERS: dict[type, Callable[..., float]] = {
    sympy.exp: math.exp,
    sympy.log: lambda x: math.log(x) if x > 0 else -math.inf if x == 0 else math.nan,
    voc.tanh: math.tanh,
    voc.sigmoid: lambda x: (1 + math.tanh(x / 2)) / 2,
    voc.softplus: lambda x: max(x, 0) + math.log1p(math.exp(-abs(x))),
    voc.step: lambda x: 1.0 if x > 0 else 0.0,
    voc.erf: math.erf,
    voc.gelu: lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    voc.silu: lambda x: x * (1 + math.tanh(x / 2)) / 2,
    voc.sin: math.sin,
    voc.cos: math.cos,
    voc.to_float: lambda x: x,
    voc.relu: lambda x: max(x, 0),
    voc.detach: lambda x: x,
    voc.absolute: abs,
    voc.sign: lambda x: (x > 0) - (x < 0),
    voc.maximum: max,
    voc.minimum: min,
}


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
    table: Mapping[type, Callable[..., Any]] = {**FLOAT_FUNCTIONS, **JOIN_FUNCTIONS}
    if kind in table and expr.free_symbols and (len(expr.args) == 1 or all(a.free_symbols for a in expr.args)):
        return _applied(table[kind], _OF_NUMBERS[kind], [closure(a) for a in expr.args])
    if isinstance(expr, voc.maximum | voc.minimum) and any(a.is_number for a in expr.args):
        (number,), (other,) = sympy.sift(expr.args, lambda a: a.is_number, binary=True)
        limit, low = float(number), isinstance(expr, voc.maximum)
        bounded: Callable[[Tensor], Tensor] = lambda x: x.clamp_min(limit) if low else x.clamp_max(limit)
        of_number = _OF_NUMBERS[kind]
        return _applied(bounded, lambda x: of_number(x, limit), [closure(other)])
    return lambda env: evaluate(expr, env)


def _applied(of_tensors: Callable[..., Any], of_numbers: Callable[..., Any], arguments: list[Function]) -> Function:
    """A function of values, of which one at least is a tensor, or all are numbers."""

    def apply(env: Mapping[str, Any]) -> Any:
        values = [argument(env) for argument in arguments]
        return (of_tensors if any(isinstance(x, Tensor) for x in values) else of_numbers)(*values)

    return apply
