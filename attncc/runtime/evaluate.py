"""Evaluate expressions of the IR in plain PyTorch: one table entry per function of the vocabulary. Differentiable.

Integers are int64 and exact; other values are computed in the dtype that the caller names.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor

from attncc.ir import vocabulary as voc

Environment = Mapping[str, Tensor | int | float]


def evaluate(
    expr: Any, env: Environment, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Tensor:
    """The value of `expr`, of the common broadcast shape of the tensors in `env` that it uses (0-d for a constant).

    `env` maps the name of each symbol to a tensor or a number, and that of each input to its whole tensor, which Reads
    index: an index outside it (negative ones too) reads 0 and passes no gradient. float tensors keep their dtype;
    integers that enter arithmetic with fractions become `dtype`. sum_d is the sum over the dimension before the last,
    where a recurrence has the components of its vectors.
    """
    return _Evaluator(env, dtype, torch.device(device))(expr)


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))  # torch's softplus is the identity above 20


# The ties of maximum and minimum give their gradient to the second argument, where torch.maximum halves it.
FLOAT_FUNCTIONS: dict[type, Callable[..., Tensor]] = {
    sympy.exp: torch.exp,
    sympy.log: torch.log,
    voc.tanh: torch.tanh,
    voc.sigmoid: torch.sigmoid,
    voc.softplus: _softplus,
    voc.step: lambda x: (x > 0).to(x.dtype),
    voc.erf: torch.erf,
    voc.gelu: torch.nn.functional.gelu,
    voc.silu: torch.nn.functional.silu,
    voc.sin: torch.sin,
    voc.cos: torch.cos,
    voc.to_float: lambda x: x,
}
#: functions of floats or of integers: the result is of the type of the arguments
JOIN_FUNCTIONS: dict[type, Callable[..., Tensor]] = {
    voc.relu: torch.relu,
    voc.detach: torch.detach,
    voc.absolute: torch.abs,
    voc.sign: torch.sign,
    voc.maximum: lambda a, b: torch.where(a > b, a, b),
    voc.minimum: lambda a, b: torch.where(a < b, a, b),
}
_INT_FUNCTIONS: dict[type, Callable[..., Tensor]] = {
    voc.floor: lambda x: x if x.dtype == torch.int64 else torch.floor(x).to(torch.int64),
    voc.to_int: lambda x: x.to(torch.int64),
    voc.floordiv: lambda a, b: torch.div(a, b, rounding_mode="floor"),
    voc.mod: torch.remainder,
    voc.bit_and: torch.bitwise_and,
    voc.bit_or: torch.bitwise_or,
    voc.bit_xor: torch.bitwise_xor,
}
COMPARISONS: dict[type, Callable[[Tensor, Tensor], Tensor]] = {
    sympy.Eq: torch.eq,
    sympy.Ne: torch.ne,
    sympy.Lt: torch.lt,
    sympy.Le: torch.le,
    sympy.Gt: torch.gt,
    sympy.Ge: torch.ge,
}


class _Evaluator:
    """One evaluation: equal subexpressions are computed once."""

    def __init__(self, env: Environment, dtype: torch.dtype, device: torch.device):
        self.env, self.dtype, self.device = env, dtype, device
        self._known: dict[Any, Tensor] = {}

    def __call__(self, expr: Any) -> Tensor:
        if expr not in self._known:
            self._known[expr] = self._compute(expr)
        return self._known[expr]

    def _compute(self, expr: Any) -> Tensor:
        kind = type(expr)
        if isinstance(expr, voc.Read):
            return self._read(expr, self.env[expr.input])
        if isinstance(expr, voc.cumsum):
            read = expr.args[0]
            return self._read(read, self._float(self._tensor(self.env[read.input])).cumsum(expr.axis))
        if isinstance(expr, sympy.Symbol):
            return self._tensor(self.env[expr.name])
        if isinstance(expr, sympy.Integer):
            return self._tensor(int(expr))
        if isinstance(expr, sympy.Number):
            return self._tensor(float(expr))
        if expr in (sympy.true, sympy.false):
            return torch.tensor(bool(expr), device=self.device)
        if isinstance(expr, sympy.Pow):
            return self._power(expr)
        values = [self(a) for a in expr.args]
        if isinstance(expr, voc.sum_d):
            return self._float(values[0]).sum(-2, keepdim=True)
        if kind in FLOAT_FUNCTIONS:
            return FLOAT_FUNCTIONS[kind](*map(self._float, values))
        if kind in JOIN_FUNCTIONS:
            return JOIN_FUNCTIONS[kind](*self._joined(expr, values))
        if kind in _INT_FUNCTIONS:
            return _INT_FUNCTIONS[kind](*values)
        if kind in COMPARISONS:
            return COMPARISONS[kind](*self._alike(values))
        if isinstance(expr, voc.where):
            a, b = self._joined(expr, values[1:])
            return torch.where(values[0], a, b)
        if isinstance(expr, sympy.Add):
            return functools.reduce(operator.add, self._joined(expr, values))
        if isinstance(expr, sympy.Mul):
            return functools.reduce(operator.mul, self._joined(expr, values))
        if isinstance(expr, sympy.And):
            return functools.reduce(torch.logical_and, values)
        if isinstance(expr, sympy.Or):
            return functools.reduce(torch.logical_or, values)
        if isinstance(expr, sympy.Not):
            return torch.logical_not(values[0])
        raise TypeError(f"{kind.__name__} is no node of the IR")

    def _tensor(self, x: Tensor | int | float) -> Tensor:
        if isinstance(x, Tensor):
            return x
        return torch.tensor(x, dtype=torch.int64 if isinstance(x, int) else self.dtype, device=self.device)

    def _float(self, x: Tensor) -> Tensor:
        return x if x.is_floating_point() else x.to(self.dtype)

    def _joined(self, expr: Any, values: list[Tensor]) -> list[Tensor]:
        """The operands in the type of `expr`. PyTorch alone would make float32 of an integer times a fraction."""
        return values if expr.is_integer else [self._float(x) for x in values]

    def _alike(self, values: list[Tensor]) -> list[Tensor]:
        floats = any(x.is_floating_point() for x in values)
        return [self._float(x) for x in values] if floats else values

    def _power(self, expr: Any) -> Tensor:
        base, exponent = self(expr.base), expr.exp
        if expr.is_integer:
            return torch.pow(base, int(exponent)) if exponent.is_Integer else torch.pow(base, self(exponent))
        if exponent.is_Integer:
            return torch.pow(self._float(base), int(exponent))
        if exponent.is_number:
            return torch.pow(self._float(base), float(exponent))
        return torch.pow(self._float(base), self._float(self(exponent)))

    def _read(self, read: voc.Read, given: Tensor | int | float) -> Tensor:
        tensor = self._tensor(given)
        if not tensor.is_floating_point():
            tensor = tensor.to(torch.int64)
        if not read.index:
            return tensor
        index = torch.broadcast_tensors(*(self(i) for i in read.index))
        inside = functools.reduce(
            torch.logical_and, ((i >= 0) & (i < size) for i, size in zip(index, tensor.shape, strict=True))
        )
        if tensor.numel() == 0:
            return tensor.new_zeros(inside.shape) + tensor.sum()
        flat = torch.zeros_like(index[0])
        for i, size in zip(index, tensor.shape, strict=True):
            flat = flat * size + torch.where(inside, i, 0)
        # not tensor[index], whose gradient sorts all of the index, and adds what has one place one by one
        value = tensor.reshape(-1).index_select(0, flat.reshape(-1)).reshape(flat.shape)
        return torch.where(inside, value, 0)
