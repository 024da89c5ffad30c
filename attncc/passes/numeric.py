"""Evaluate expressions in NumPy, for passes that try a formula at small sizes. Integers stay exact."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import sympy

from attncc.ir import vocabulary as voc
from attncc.ir.vocabulary import Read

_erf = np.vectorize(math.erf, otypes=[np.float64])
_TABLE: dict[type, Callable[..., Any]] = {
    sympy.Eq: np.equal,
    sympy.Ne: np.not_equal,
    sympy.Lt: np.less,
    sympy.Le: np.less_equal,
    sympy.Gt: np.greater,
    sympy.Ge: np.greater_equal,
    sympy.Not: np.logical_not,
    sympy.exp: np.exp,
    sympy.log: np.log,
    voc.tanh: np.tanh,
    voc.sigmoid: lambda x: 0.5 + 0.5 * np.tanh(0.5 * x),
    voc.softplus: lambda x: np.logaddexp(x, 0.0),
    voc.step: lambda x: np.where(x > 0, 1, 0),
    voc.relu: lambda x: np.maximum(x, 0),
    voc.erf: _erf,
    voc.gelu: lambda x: 0.5 * x * (1 + _erf(x * 0.5**0.5)),
    voc.silu: lambda x: x * (0.5 + 0.5 * np.tanh(0.5 * x)),
    voc.sin: np.sin,
    voc.cos: np.cos,
    voc.absolute: np.abs,
    voc.sign: np.sign,
    voc.floor: lambda x: np.floor(x).astype(np.int64),
    voc.maximum: np.maximum,
    voc.minimum: np.minimum,
    voc.where: np.where,
    voc.detach: lambda x: x,
    voc.floordiv: np.floor_divide,
    voc.mod: np.mod,
    voc.bit_and: np.bitwise_and,
    voc.bit_or: np.bitwise_or,
    voc.bit_xor: np.bitwise_xor,
    voc.to_int: lambda x: np.trunc(np.asarray(x, dtype=np.float64)).astype(np.int64),
    voc.to_float: lambda x: np.asarray(x, dtype=np.float64),
}
_FOLDED: dict[type, Callable[[Any, Any], Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.And: np.logical_and,
    sympy.Or: np.logical_or,
}


def evaluate(expr: Any, env: Mapping[str, Any]) -> np.ndarray:
    """The value of `expr`, of the broadcast shape of the arrays in `env` that it uses.

    `env` maps each symbol's name to a number or an array, and each input's name to its array. A read outside is 0.
    """
    known: dict[Any, Any] = {}

    def value(e: Any) -> Any:
        if e not in known:
            known[e] = compute(e)
        return known[e]

    def compute(e: Any) -> Any:
        if isinstance(e, Read):
            return _read(np.asarray(env[e.input]), [np.asarray(value(i)) for i in e.index])
        if isinstance(e, sympy.Symbol):
            return env[e.name]
        if e in (sympy.true, sympy.false):
            return np.bool_(bool(e))
        if isinstance(e, sympy.Number):
            return int(e) if e.is_Integer else float(e)
        args = [value(a) for a in e.args]
        if type(e) in _FOLDED:
            return functools.reduce(_FOLDED[type(e)], args)
        if isinstance(e, sympy.Pow):
            whole = e.exp.is_Integer and e.exp >= 0
            return np.power(args[0] if whole else np.asarray(args[0], dtype=np.float64), args[1])
        return _TABLE[type(e)](*args)

    with np.errstate(all="ignore"):  # masked pairs may divide by zero
        return np.asarray(value(expr))


def _read(array: np.ndarray, index: list[np.ndarray]) -> np.ndarray:
    if not index:
        return array
    inside = functools.reduce(
        np.logical_and, ((i >= 0) & (i < size) for i, size in zip(index, array.shape, strict=True))
    )
    found = array[tuple(np.where(inside, i, 0) for i in index)]
    return np.where(inside, found, 0)
