"""Small pieces of generated code: numbers, parentheses, and descriptive names."""

from __future__ import annotations

import math
from typing import Any

import sympy

from attncc.errors import UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc
from attncc.ir.vocabulary import ByDistance, Read, type_of
from attncc.passes.fold import exp2


def is_number(text: str) -> bool:
    """Whether the text is a literal."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def literal(expr: Any, is_float: bool) -> str:
    """A constant; UnsupportedError for one that is not finite."""
    if expr in (sympy.true, sympy.false):
        return str(bool(expr))
    value = float(expr)
    if not is_float and value.is_integer():
        return str(int(expr))
    if not math.isfinite(value):
        raise UnsupportedError(f"the constant {expr} is not finite")
    return repr(value)


def wrap(text: str) -> str:
    """The text in parentheses, unless it is one unit already."""
    return (
        text
        if text.isidentifier() or (text.endswith(")") and text.startswith(("(", "tl.", "_")) and balanced(text))
        else f"({text})"
    )


def unwrap(text: str) -> str:
    """The text without parentheses around the whole, for an argument or the right side of an assignment."""
    return text[1:-1] if text.startswith("(") and balanced(text) else text


def balanced(text: str) -> bool:
    """Whether the text is one parenthesized unit, on which a method can be called."""
    start = text.index("(")
    depth = 0
    for i, c in enumerate(text[start:], start):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return i == len(text) - 1
    return False


#: the names of values, by the function that made them
HINTS = {
    exp2: "power",
    voc.tanh: "tanh",
    voc.sigmoid: "sigmoid",
    voc.absolute: "magnitude",
    voc.sign: "sign",
    voc.relu: "relu",
    voc.maximum: "larger",
    voc.minimum: "smaller",
    voc.where: "choice",
    voc.floordiv: "quotient",
    voc.mod: "remainder",
    voc.bit_and: "bits",
    voc.bit_or: "bits",
    voc.bit_xor: "bits",
    sympy.log: "log",
}


def hinted(expr: Any) -> str:
    """A descriptive name for a value."""
    if isinstance(expr, Read):
        return f"{expr.input}_value"
    if isinstance(expr, ByDistance):
        return "by_distance"
    if isinstance(expr, sympy.Symbol):
        return expr.name
    if type(expr) in HINTS:
        return HINTS[type(expr)]
    if type_of(expr) == "bool":
        return "holds"
    names = {s.name for s in expr.free_symbols}
    if expr.is_Mul and names == {"scale", "ln2"}:
        return "scale_log2"
    if names and names <= {sym.Q_IDX.name, sym.KV_LEN.name, sym.Q_LEN.name} and sym.Q_IDX.name in names:
        return "q_pos"
    if expr.is_Mul:
        return "product"
    return "shifted" if expr.is_Add else "value"
