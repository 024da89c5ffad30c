"""The elementwise part of an auxiliary output, in PyTorch: `maximum(count, 1)` of a mean, the sign of an entropy.

The kernels compute the reductions; the rest is elementwise on the output, and PyTorch differentiates it. Each
expression is compiled to Python functions once, so that a call costs only the operations.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from torch import Tensor

from attncc.ir.graph import LOOP_DIMS, VariantGraph
from attncc.ir.outputs import Output
from attncc.ir.vocabulary import maximum, minimum, where
from attncc.runtime.evaluate import evaluate
from attncc.runtime.shapes import Bound

#: the dimension of each index in an output (B, Hq, cells...)
_AXES = {"b": 0, "h": 1, "h_kv": 1, "q_idx": 2, "kv_idx": 2}
_COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
    sympy.Lt: operator.lt,
    sympy.Le: operator.le,
    sympy.Gt: operator.gt,
    sympy.Ge: operator.ge,
}
#: from the values of names, and the dtype of arithmetic on integers
Function = Callable[[Mapping[str, Any], torch.dtype], Any]


def finish(
    graph: VariantGraph, output: Output, values: Mapping[str, Tensor], bound: Bound, number: torch.dtype
) -> Tensor:
    """The output from its reductions by symbol name. `number` is the dtype of arithmetic on integers."""
    expr = output.expr
    if expr.is_Symbol:
        return values[expr.name]
    env = {**values, **_names(graph, output, values, bound, number)}
    if not isinstance(expr, where):
        return _function(expr)(env, number)
    # a cell without a pair has no part in any gradient either
    live = _function(expr.args[0])(env, number)
    env |= {name: torch.where(live, x, 1) for name, x in values.items()}
    return torch.where(live, _function(expr.args[1])(env, number), 0)


def _names(
    graph: VariantGraph, output: Output, values: Mapping[str, Tensor], bound: Bound, number: torch.dtype
) -> dict[str, Any]:
    """Sizes, scalars, indices and inputs, of those names that the expression uses."""
    sizes, first = bound.sizes, next(iter(values.values()))
    used = {s.name for s in output.expr.free_symbols} - set(values)
    env: dict[str, Any] = {"q_len": sizes["q_idx"], "kv_len": sizes["kv_idx"], "num_heads": sizes["h"], **bound.scalars}
    for name in used & set(_AXES):
        index = torch.arange(sizes["h" if name == "h_kv" else name], device=first.device)
        if name == "h_kv":
            index = index // (sizes["h"] // sizes["h_kv"])
        env[name] = index.reshape([-1 if axis == _AXES[name] else 1 for axis in range(first.dim())])
    for decl in graph.inputs:
        if decl.name in used:
            tensor = bound.tensors[decl.name]
            if tensor.is_floating_point():
                tensor = tensor.to(torch.promote_types(tensor.dtype, number))
            env[decl.name] = tensor.expand([sizes[d] if d in LOOP_DIMS else -1 for d in decl.pattern])
    return env


@functools.lru_cache(maxsize=1024)
def _function(expr: Any) -> Function:
    """An expression as a Python function; what is not listed here goes through `evaluate`."""
    if isinstance(expr, sympy.Symbol):
        name = expr.name
        return lambda env, number: env[name]
    if isinstance(expr, sympy.Number):
        constant = int(expr) if isinstance(expr, sympy.Integer) else float(expr)
        return lambda env, number: constant
    is_int = bool(getattr(expr, "is_integer", False))
    if isinstance(expr, sympy.Add | sympy.Mul):
        join = operator.add if isinstance(expr, sympy.Add) else operator.mul
        parts = [_operand(a, is_int) for a in expr.args]
        return lambda env, number: functools.reduce(join, (part(env, number) for part in parts))
    if isinstance(expr, sympy.Pow) and expr.exp.is_number and not is_int:
        base, power = _operand(expr.base, False), float(expr.exp)
        if power == -1:
            return lambda env, number: 1 / base(env, number)
        return lambda env, number: base(env, number) ** power
    if isinstance(expr, maximum | minimum) and is_int and any(a.is_number for a in expr.args):
        limit, other = sorted(expr.args, key=lambda a: not a.is_number)
        inner, end = _function(other), int(limit)
        if isinstance(expr, maximum):
            return lambda env, number: inner(env, number).clamp_min(end)
        return lambda env, number: inner(env, number).clamp_max(end)
    if isinstance(expr, Relational):
        compare = _COMPARISONS[type(expr)]
        left, right = _function(expr.lhs), _function(expr.rhs)
        return lambda env, number: compare(left(env, number), right(env, number))
    return lambda env, number: evaluate(expr, env, number, _device(env))


def _operand(expr: Any, is_int: bool) -> Function:
    """An operand of a number's arithmetic: a tensor of integers takes the dtype that the caller names."""
    function = _function(expr)
    if is_int or expr.is_number:
        return function

    def run(env: Mapping[str, Any], number: torch.dtype) -> Any:
        value = function(env, number)
        return value.to(number) if isinstance(value, Tensor) and not value.is_floating_point() else value

    return run


def _device(env: Mapping[str, Any]) -> torch.device:
    return next(x.device for x in env.values() if isinstance(x, Tensor))
