"""PyTorch's elementwise functions on cells, by PyTorch's names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy

from attncc.ir import vocabulary as voc
from attncc.language import functions as fn
from attncc.language.flex import cells as ce
from attncc.language.flex.cells import Cell, cell
from attncc.language.values import Value, fail, lift

Function = Callable[..., Cell]


def _of_values(function: Callable[..., Any]) -> Function:
    """A function of finite numbers."""
    return lambda *operands: ce.plain(lambda *values: lift(function(*map(ce.number, values))), *operands)


def _of_one(function: Callable[..., Any]) -> Function:
    """A function of one finite number, with PyTorch's options for it."""

    def call(x: Cell, *options: Any, **named: Any) -> Cell:
        return ce.plain(lambda value: lift(function(ce.number(value), *options, **named)), x)

    return call


def _trunc(x: Value) -> Value:
    return x if x.type == "int" else fn.to_int(x)


def _floor(x: Value) -> Value:
    return x if x.type == "int" else fn.floor(x)


def _round(x: Value) -> Value:
    """To the nearest integer, halves to the even one."""
    up = fn.floor(x + 0.5)
    return fn.where((fn.to_float(up) == x + 0.5) & (up % 2 != 0), up - 1, up)


def _gelu(x: Value, approximate: str = "none") -> Value:
    if approximate == "none":
        return fn.gelu(x)
    return 0.5 * x * (1 + fn.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _softplus(x: Value, beta: float = 1.0, threshold: float = 20.0) -> Value:
    soft = fn.softplus(beta * x) / beta
    # above its threshold PyTorch's is the identity, which is what softplus is there up to exp(-threshold)
    return soft if threshold >= 16 else fn.where(beta * x > threshold, x, soft)


def _elu(x: Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Value:
    below = alpha * (fn.exp(fn.minimum(input_scale * x, 0)) - 1)
    return scale * fn.where(x > 0, x, below)


def _celu(x: Value, alpha: float = 1.0) -> Value:
    return fn.where(x > 0, x, alpha * (fn.exp(fn.minimum(x / alpha, 0)) - 1))


def _hardtanh(x: Value, min_val: float = -1.0, max_val: float = 1.0) -> Value:
    return fn.minimum(max_val, fn.maximum(min_val, x))


def _logit(x: Value, eps: float | None = None) -> Value:
    if eps is not None:
        x = _hardtanh(x, eps, 1 - eps)
    return fn.log(x / (1 - x))


def _reciprocal(x: Value) -> Value:
    return 1 / x


def _leaky_relu(x: Value, negative_slope: float = 0.01) -> Value:
    return fn.where(x > 0, x, negative_slope * x)


def _threshold(x: Value, threshold: float, value: float) -> Value:
    return fn.where(x > threshold, x, value)


def _sigmoid_of_three(x: Value) -> Value:
    """(x + 3) / 6 within [0, 1]."""
    return _hardtanh(x + 3, 0, 6) / 6


#: functions of one number
UNARY: dict[str, Callable[..., Any]] = {
    "exp": fn.exp,
    "exp2": fn.exp2,
    "expm1": lambda x: fn.exp(x) - 1,
    "log": fn.log,
    "log2": fn.log2,
    "log10": lambda x: fn.log(x) * (1 / math.log(10.0)),
    "log1p": lambda x: fn.log(1 + x),
    "sqrt": fn.sqrt,
    "rsqrt": lambda x: 1 / fn.sqrt(x),
    "square": lambda x: x**2,
    "reciprocal": _reciprocal,
    "neg": lambda x: -x,
    "negative": lambda x: -x,
    "__neg__": lambda x: -x,
    "positive": lambda x: x,
    "__pos__": lambda x: x,
    "abs": fn.absolute,
    "absolute": fn.absolute,
    "__abs__": fn.absolute,
    "sign": fn.sign,
    "sgn": fn.sign,
    "floor": _floor,
    "ceil": lambda x: -_floor(-x),
    "trunc": _trunc,
    "fix": _trunc,
    "frac": lambda x: x - fn.to_float(_trunc(x)),
    "round": _round,
    "sin": fn.sin,
    "cos": fn.cos,
    "tan": lambda x: fn.sin(x) / fn.cos(x),
    "sinh": lambda x: (fn.exp(x) - fn.exp(-x)) / 2,
    "cosh": lambda x: (fn.exp(x) + fn.exp(-x)) / 2,
    "tanh": fn.tanh,
    "erf": fn.erf,
    "erfc": lambda x: 1 - fn.erf(x),
    "sigmoid": fn.sigmoid,
    "expit": fn.sigmoid,
    "logit": _logit,
    "logsigmoid": lambda x: -fn.softplus(-x),
    "log_sigmoid": lambda x: -fn.softplus(-x),
    "softplus": _softplus,
    "softsign": lambda x: x / (1 + fn.absolute(x)),
    "tanhshrink": lambda x: x - fn.tanh(x),
    "relu": fn.relu,
    "relu6": lambda x: _hardtanh(x, 0, 6),
    "leaky_relu": _leaky_relu,
    "_threshold": _threshold,
    "elu": _elu,
    "celu": _celu,
    "selu": lambda x: _elu(x, 1.6732632423543772, 1.0507009873554805),
    "gelu": _gelu,
    "silu": fn.silu,
    "mish": lambda x: x * fn.tanh(fn.softplus(x)),
    "hardtanh": _hardtanh,
    "hardsigmoid": _sigmoid_of_three,
    "hardswish": lambda x: x * _sigmoid_of_three(x),
}


def _power_of_two(n: Value) -> int:
    if not n.expr.is_Integer or not 0 <= int(n.expr) < 31:
        remedy = "bits that an index counts are a captured tensor of booleans: bits[q_idx, kv_idx]"
        fail("a shift by anything but a constant from 0 to 30 is not part of the language", remedy)
    return 1 << int(n.expr)


def _bits(name: str, logic: Callable[[Value, Value], Value]) -> Function:
    """A bitwise operator: logic between booleans, bits between integers."""

    def both(x: Value, y: Value) -> Value:
        if x.type == y.type == "bool":
            return logic(x, y)
        value: Value = lift(getattr(fn, name)(ce.number(x), ce.number(y)))
        return value

    return lambda a, b: ce.plain(both, a, b)


def _logic(logic: Callable[[Value, Value], Value]) -> Function:
    return lambda a, b: Cell(logic(ce.truth(a), ce.truth(b)))


def _xor(a: Value, b: Value) -> Value:
    return (a & ~b) | (~a & b)


def _compare(relation: Callable[[Value, Value], Value]) -> Function:
    return _of_values(relation)


def _equal(holds: bool) -> Function:
    """Equality; of two booleans it is logic, over which tiles can be told apart."""

    def both(x: Value, y: Value) -> Value:
        if x.type == y.type == "bool":
            return ~_xor(x, y) if holds else _xor(x, y)
        left, right = ce.number(x), ce.number(y)
        return left == right if holds else left != right

    return lambda a, b: ce.plain(both, a, b)


def _fmod(a: Value, b: Value) -> Value:
    """The remainder with the sign of the dividend."""
    return a - b * _truncated(a, b)


def _truncated(a: Value, b: Value) -> Value:
    if a.type == b.type == "int":
        quotient = a // b
        return fn.where((quotient < 0) & (quotient * b != a), quotient + 1, quotient)
    return fn.to_int(a / b)


def _floor_divided(a: Value, b: Value) -> Value:
    return a // b if a.type == b.type == "int" else fn.floor(a / b)


def _remainder(a: Value, b: Value) -> Value:
    return a % b if a.type == b.type == "int" else a - b * fn.to_float(fn.floor(a / b))


def _scaled(operation: Function) -> Function:
    """add and sub, whose second operand may be scaled by `alpha`."""
    return lambda a, b, alpha=1: operation(a, b if alpha == 1 else ce.multiply(b, cell(alpha)))


def _divided(a: Cell, b: Cell, rounding_mode: str | None = None) -> Cell:
    if rounding_mode is None:
        return ce.divide(a, b)
    return _of_values(_truncated if rounding_mode == "trunc" else _floor_divided)(a, b)


def _swapped(operation: Function) -> Function:
    return lambda a, b, **options: operation(b, a, **options)


def _named(*names: str, function: Function) -> dict[str, Function]:
    return dict.fromkeys(names, function)


_power = _of_values(lambda a, b: a**b)
_left = _of_values(lambda a, n: a * _power_of_two(n))
_right = _of_values(lambda a, n: a // _power_of_two(n))
_and, _or, _xor_bits = (
    _bits("bit_and", lambda a, b: a & b),
    _bits("bit_or", lambda a, b: a | b),
    _bits("bit_xor", _xor),
)

#: functions of two cells
BINARY: dict[str, Function] = {
    **_named("add", "__add__", "__radd__", function=_scaled(ce.add)),
    **_named("sub", "subtract", "__sub__", function=_scaled(ce.subtract)),
    **_named("rsub", "__rsub__", function=_swapped(_scaled(ce.subtract))),
    **_named("mul", "multiply", "__mul__", "__rmul__", function=ce.multiply),
    **_named("div", "divide", "true_divide", "__div__", "__truediv__", function=_divided),
    **_named("__rdiv__", "__rtruediv__", function=_swapped(ce.divide)),
    **_named("floor_divide", "__floordiv__", function=_of_values(_floor_divided)),
    **_named("__rfloordiv__", function=_swapped(_of_values(_floor_divided))),
    **_named("remainder", "__mod__", function=_of_values(_remainder)),
    **_named("__rmod__", function=_swapped(_of_values(_remainder))),
    **_named("fmod", function=_of_values(_fmod)),
    **_named("pow", "float_power", "__pow__", function=_power),
    **_named("__rpow__", function=_swapped(_power)),
    "hypot": _of_values(lambda a, b: fn.sqrt(a * a + b * b)),
    **_named("maximum", "fmax", function=ce.maximum),
    **_named("minimum", "fmin", function=ce.minimum),
    **_named("eq", "__eq__", function=_equal(True)),
    **_named("ne", "not_equal", "__ne__", function=_equal(False)),
    **_named("lt", "less", "__lt__", function=_compare(lambda a, b: a < b)),
    **_named("le", "less_equal", "__le__", function=_compare(lambda a, b: a <= b)),
    **_named("gt", "greater", "__gt__", function=_compare(lambda a, b: a > b)),
    **_named("ge", "greater_equal", "__ge__", function=_compare(lambda a, b: a >= b)),
    **_named("logical_and", function=_logic(lambda a, b: a & b)),
    **_named("logical_or", function=_logic(lambda a, b: a | b)),
    **_named("logical_xor", function=_logic(_xor)),
    **_named("bitwise_and", "__and__", "__rand__", function=_and),
    **_named("bitwise_or", "__or__", "__ror__", function=_or),
    **_named("bitwise_xor", "__xor__", "__rxor__", function=_xor_bits),
    **_named("bitwise_left_shift", "__lshift__", function=_left),
    **_named("bitwise_right_shift", "__rshift__", function=_right),
    **_named("__rlshift__", function=_swapped(_left)),
    **_named("__rrshift__", function=_swapped(_right)),
}


def _clamp(x: Cell, min: Cell | None = None, max: Cell | None = None) -> Cell:
    """At a bound the gradient passes, as in PyTorch: a tie of ours gives it to the second operand."""
    if min is not None:
        x = ce.maximum(min, x)
    return ce.minimum(max, x) if max is not None else x


def _not(x: Cell) -> Cell:
    value = ce.plain(lambda v: v, x).value
    return Cell(~value if value.type == "bool" else -value - 1)


def _masked_fill(x: Cell, mask: Cell, value: Cell) -> Cell:
    return ce.where(mask, value, x)


def _constant(value: bool) -> Function:
    return lambda x: Cell(Value(sympy.true if value else sympy.false))


#: functions of any number of cells, whose optional operands may be named
OTHER: dict[str, Function] = {
    **_named("clamp", "clip", function=_clamp),
    "clamp_min": lambda x, min: _clamp(x, min),
    "clamp_max": lambda x, max: _clamp(x, None, max),
    **_named("where", function=ce.where),
    **_named("masked_fill", function=_masked_fill),
    **_named("bitwise_not", "__invert__", function=_not),
    "logical_not": lambda x: Cell(~ce.truth(x)),
    "isneginf": lambda x: Cell(Value(x.hidden)),
    "isinf": lambda x: Cell(Value(x.hidden)),
    "isfinite": lambda x: Cell(Value(sympy.Not(x.hidden))),
    "isnan": _constant(False),
    "isposinf": _constant(False),
    "lerp": lambda a, b, weight: ce.add(a, ce.multiply(weight, ce.subtract(b, a))),
    "addcmul": lambda x, a, b, value=1: ce.add(x, ce.multiply(cell(value), ce.multiply(a, b))),
    "addcdiv": lambda x, a, b, value=1: ce.add(x, ce.multiply(cell(value), ce.divide(a, b))),
}


def converted(x: Cell, kind: str) -> Cell:
    """A cell in a dtype of kind "bool", "int" or "float", as PyTorch converts it."""
    if x.hidden is not sympy.false and kind != "float":
        x = ce.plain(lambda v: v, x)
    value = x.value
    if kind == "bool":
        return Cell(value if value.type == "bool" else value != 0)
    if value.expr.is_number:  # a constant is a number of either kind
        return x if kind == "float" else Cell(lift(int(value.expr)))
    value = ce.number(value)
    if kind == "int":
        return Cell(value if value.type == "int" else Value(voc.to_int(value.expr)))
    return x if value.type == "float" else Cell(Value(voc.to_float(value.expr)), x.hidden)


def elementwise(name: str) -> tuple[Function, int | None] | None:
    """The function on cells that PyTorch knows by `name`, and how many of its arguments are operands (None: all of
    them, also by keyword; what is no operand is an option, passed as it is). None if there is no such function."""
    name = name.removeprefix("special_")
    if name in UNARY:
        return _of_one(UNARY[name]), 1
    if name in BINARY:
        return BINARY[name], 2
    return (OTHER[name], None) if name in OTHER else None
