"""The functions of the vocabulary as a user calls them: `ac.exp(score - m)`. On plain numbers they are Python's own."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

from attncc.language.values import OF_ORDER, Value, apply, arity, constant, fail, lift, over_head_dim, running_sum

_ON_NUMBERS: dict[str, Callable[..., Any]] = {
    "exp": math.exp,
    "log": math.log,
    "tanh": math.tanh,
    "sin": math.sin,
    "cos": math.cos,
    "erf": math.erf,
    "floor": math.floor,
    "abs": abs,
    "maximum": max,
    "minimum": min,
    "bit_and": operator.and_,
    "bit_or": operator.or_,
    "bit_xor": operator.xor,
    "int": int,
    "float": float,
    "detach": lambda x: x,
}


def _on_numbers(name: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except (ValueError, ArithmeticError):
        fail(f"{name}({', '.join(map(str, args))}) has no finite real value")


def _function(name: str, doc: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if name in _ON_NUMBERS and len(args) == arity(name) and all(constant(a) for a in args):
            return _on_numbers(name, _ON_NUMBERS[name], *args)
        return apply(name, *args)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = doc
    return call


exp = _function("exp", "e to the power x.")
log = _function("log", "The natural logarithm of x.")
tanh = _function("tanh", "The hyperbolic tangent of x.")
sigmoid = _function("sigmoid", "1 / (1 + exp(-x)).")
softplus = _function("softplus", "log(1 + exp(x)), without overflow.")
relu = _function("relu", "max(x, 0), with derivative 0 at 0.")
gelu = _function("gelu", "x * Phi(x), the exact (erf) form.")
silu = _function("silu", "x * sigmoid(x).")
erf = _function("erf", "The error function of x.")
sin = _function("sin", "The sine of x.")
cos = _function("cos", "The cosine of x.")
absolute = _function("abs", "The absolute value of x.")
sign = _function("sign", "-1, 0 or 1; a constant for differentiation.")
floor = _function("floor", "The largest integer not above x, as an integer.")
maximum = _function("maximum", "The larger of two; at a tie the gradient goes to the second.")
minimum = _function("minimum", "The smaller of two; at a tie the gradient goes to the second.")
where = _function("where", "where(condition, a, b): a where the condition holds, else b.")
bit_and = _function("bit_and", "The bitwise and of two integers.")
bit_or = _function("bit_or", "The bitwise or of two integers.")
bit_xor = _function("bit_xor", "The bitwise exclusive or of two integers.")
detach = _function("detach", "x as a constant: its value, and no gradient through it.")
to_int = _function("int", "Truncation towards zero; a boolean becomes 0 or 1.")
to_float = _function("float", "An index or a boolean as a number.")


def sqrt(x: Any) -> Any:
    """The square root of x."""
    return _on_numbers("sqrt", math.sqrt, x) if constant(x) else lift(x) ** 0.5


def exp2(x: Any) -> Any:
    """2 to the power x."""
    return _on_numbers("exp2", math.exp2, x) if constant(x) else exp(lift(x) * math.log(2.0))


def log2(x: Any) -> Any:
    """The logarithm of x to base 2."""
    return _on_numbers("log2", math.log2, x) if constant(x) else log(x) * (1 / math.log(2.0))


def sum_d(x: Any) -> Value:
    """The sum of a vector's components, those of the head dimension: sum_d(w[h] * tanh(q_vec + k_vec))."""
    return over_head_dim("sum_d", x)


def dot(a: Any, b: Any) -> Value:
    """The dot product of two vectors: sum_d(a * b)."""
    return over_head_dim("dot", a, b)


def cumsum(x: Any) -> Value:
    """The running sum of an input along the tokens, up to and including the one that is read: cumsum(g[b, h, kv_idx]).

    A gate that decays from token to token is exp(cumsum(g[b, h, q_idx]) - cumsum(g[b, h, kv_idx])): each token that
    lies between the key and the query has its part.
    """
    return running_sum(x)


def norm(x: Any) -> Value:
    """The Euclidean length of a vector: sqrt(sum_d(x * x))."""
    return sqrt(over_head_dim("norm", x, x))


#: what people write elsewhere, and what says it here
_ELSEWHERE = {
    "clamp": "minimum(maximum(x, low), high)",
    "clip": "minimum(maximum(x, low), high)",
    "max": "maximum(a, b), or over a query's keys row.max(x)",
    "min": "minimum(a, b), or over a query's keys row.min(x)",
    "sum": "row.sum(x), over a query's keys",
    "mean": "row.mean(x), over a query's keys",
    "pow": "x ** y",
    "square": "x ** 2",
    "rsqrt": "1 / sqrt(x)",
    "round": "floor(x + 0.5)",
    "log1p": "log(1 + x)",
    "expm1": "exp(x) - 1",
    "logsigmoid": "-softplus(-x)",
    "log_sigmoid": "-softplus(-x)",
    "logaddexp": "maximum(a, b) + softplus(-abs(a - b))",
    "logsumexp": "m + log(row.sum(exp(x - m))), with m = row.max(x)",
    "var": "row.mean((x - row.mean(x)) ** 2)",
    "std": "sqrt(row.mean((x - row.mean(x)) ** 2))",
    "tan": "sin(x) / cos(x)",
    "cosh": "(exp(x) + exp(-x)) / 2",
    "sinh": "(exp(x) - exp(-x)) / 2",
    "acosh": "log(x + sqrt(x * x - 1))",
    "ceil": "-floor(-x)",
    "swish": "silu(x)",
    "elu": "where(x > 0, x, exp(minimum(x, 0)) - 1)",
    "leaky_relu": "where(x > 0, x, a * x)",
    "heaviside": "where(x > 0, 1, 0)",
    "masked_fill": "where(condition, a, b); what is hidden is the mask's",
    "normalize": "x / norm(x)",
    "int": "to_int(x)",
    "float": "to_float(x)",
}
_NOT_RANDOM = "no formula draws numbers: draw them before the call, and read them as an input over b, h, q_idx, kv_idx"
_NOT_ROTATED = "rotate q and k before the call: a formula sees one component of a vector at a time"
#: what people write that is no part of a formula, and where it goes
_OUTSIDE = {
    **dict.fromkeys(("dropout", "rand", "randn", "bernoulli"), _NOT_RANDOM),
    **dict.fromkeys(("rope", "rotary", "rotate", "rotate_half", "apply_rotary_emb"), _NOT_ROTATED),
    "topk": OF_ORDER,
}


def instead(name: str, known: Iterable[str]) -> str | None:
    """A suggestion for an unknown function: a similar name of `known`, or another way to write it."""
    if name in _ELSEWHERE:
        return f"write {_ELSEWHERE[name]}"
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean '{near[0]}'?" if near else None


#: every function by the name it has in the text form, where int and float may be said as in Python, too
TABLE: dict[str, Callable[..., Any]] = {
    "exp": exp,
    "exp2": exp2,
    "log": log,
    "log2": log2,
    "sqrt": sqrt,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "softplus": softplus,
    "relu": relu,
    "gelu": gelu,
    "silu": silu,
    "erf": erf,
    "sin": sin,
    "cos": cos,
    "abs": absolute,
    "sign": sign,
    "floor": floor,
    "maximum": maximum,
    "minimum": minimum,
    "where": where,
    "bit_and": bit_and,
    "bit_or": bit_or,
    "bit_xor": bit_xor,
    "int": to_int,
    "float": to_float,
    "to_int": to_int,
    "to_float": to_float,
    "dot": dot,
    "norm": norm,
    "sum_d": sum_d,
    "detach": detach,
    "cumsum": cumsum,
}
