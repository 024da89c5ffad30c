"""The Triton syntax of each kind of expression: one function per kind, given the scope that places its operands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import sympy
from sympy.logic import boolalg

from attncc.codegen.loads import by_distance, read
from attncc.codegen.texts import literal, unwrap, wrap
from attncc.errors import UnsupportedError
from attncc.ir import vocabulary as voc
from attncc.ir.levels import Level
from attncc.ir.vocabulary import ByDistance, Read, type_of
from attncc.passes.fold import LN2, exp2, lower_exp, per_ln2, with_sign

if TYPE_CHECKING:
    from attncc.codegen.lower import Lowering

#: one-argument functions that print as one call
_CALLS = {
    exp2: "tl.exp2",
    voc.erf: "tl.erf",
    voc.sin: "tl.sin",
    voc.cos: "tl.cos",
    voc.gelu: "_gelu",
    voc.sign: "_sign",
}


def spell(scope: Lowering, expr: Any, level: Level) -> str:
    """The text of an expression of this level, its operands placed by `scope`. UnsupportedError: Triton has no form."""
    if expr.is_number:
        return literal(expr, type_of(expr) == "float")
    if isinstance(expr, sympy.Symbol):
        return repr(voc.LN2) if expr == LN2 else scope.leaves[expr.name].name
    if isinstance(expr, sympy.exp):
        return spell(scope, lower_exp(expr), level)
    if type(expr) in _CALLS:
        return _call(scope, expr, level)
    if type(expr) not in _KINDS:
        raise UnsupportedError(f"the Triton backend has no form for {type(expr).__name__}")
    return _KINDS[type(expr)](scope, expr, level)


def sum_text(scope: Lowering, expr: Any, level: Level, to_float: bool) -> str:
    groups = _groups(scope, _integers_first(expr) if to_float else expr.args, level)
    parts: list[Any] = []
    for group in groups:
        joined = sympy.Add(*group)
        if len(groups) > 1 and len(group) > 1 and scope.level_of(joined) != level:
            parts.append(joined)
        else:
            parts += sorted(group, key=lambda t: t.could_extract_minus_sign())
    # begin with a positive term: Triton negates by a subtraction from 0, which no compiler may leave out
    first = next((i for i, part in enumerate(parts) if not part.could_extract_minus_sign()), 0)
    parts.insert(0, parts.pop(first))
    text = ""
    for part in parts:
        negative = bool(text) and part.could_extract_minus_sign()
        operand = scope.operand(-part if negative else part, level, to_float)
        text += (f" - {operand}" if negative else f" + {operand}") if text else operand
    return text


def _call(scope: Lowering, expr: Any, level: Level) -> str:
    call = _CALLS[type(expr)]
    if call.startswith("_"):
        scope.helpers.add(call)
    return f"{call}({unwrap(scope.operand(expr.args[0], level, type_of(expr) == 'float'))})"


def _sum(scope: Lowering, expr: Any, level: Level) -> str:
    return f"({sum_text(scope, expr, level, type_of(expr) == 'float')})"


def _groups(scope: Lowering, args: Iterable[Any], level: Level) -> list[list[Any]]:
    """Arguments by level, the expression's own level first; the lower ones are hoisted together."""
    by: dict[Level, list[Any]] = {}
    for a in args:
        by.setdefault(scope.level_of(a), []).append(a)
    return [by[lv] for lv in sorted(by, reverse=True)]


def _product(scope: Lowering, expr: Any, level: Level) -> str:
    is_float = type_of(expr) == "float"
    number, rest = expr.as_coeff_Mul()
    over = [f for f in sympy.Mul.make_args(rest) if not _is_reciprocal(f)]
    under = [1 / f for f in sympy.Mul.make_args(rest) if _is_reciprocal(f)]
    if under and not is_float:
        raise UnsupportedError("an integer quotient must be written with //")
    # factors of a lower level are multiplied there, once
    lower_over = [f for f in over if scope.level_of(f) != level]
    lower_under = [f for f in under if scope.level_of(f) != level]
    own_over = [f for f in over if scope.level_of(f) == level]
    own_under = [f for f in under if scope.level_of(f) == level]
    if LN2 in own_under:  # multiply by log2(e) instead of dividing by ln(2)
        own_under.remove(LN2)
        number = sympy.Float(float(number) * voc.LOG2E)
    factors = [scope.operand(f, level, is_float) for f in own_over]
    split_levels = sorted({scope.level_of(f) for f in (*lower_over, *lower_under)}, reverse=True)
    for i, lv in enumerate(split_levels):
        part = sympy.Mul(
            *(f for f in lower_over if scope.level_of(f) == lv),
            *(1 / f for f in lower_under if scope.level_of(f) == lv),
        )
        # the number joins the lowest part; a sign alone does if every pair would need a negation, and the part has a
        # name
        apart = number != -1 or (level == Level.PAIR and is_float and part.free_symbols - {LN2})
        if i == len(split_levels) - 1 and number != 1 and apart:
            part, number = sympy.Mul(number, part), sympy.S.One
        factors.append(scope.operand(part, level, is_float))
    if number not in (1, -1) or not factors:
        factors.insert(0, literal(number, is_float))
        sign = ""
    else:
        sign = "-" if number == -1 else ""
    text = sign + " * ".join(factors)
    if own_under:
        divisor = scope.operand(sympy.Mul(*own_under), level, is_float)
        text = f"{text} / {divisor}"
    return f"({text})"


def _power(scope: Lowering, expr: Any, level: Level) -> str:
    base, power = expr.base, expr.exp
    if base == LN2 and power == -1:
        return repr(voc.LOG2E)
    if power.is_number:
        value = float(power)
        operand = scope.operand(base, level, True)
        if value == 0.5:
            return f"tl.sqrt({unwrap(operand)})"
        if value == -0.5:
            return f"tl.rsqrt({unwrap(operand)})"
        if value == -1:
            return f"(1.0 / {operand})"
        if value.is_integer() and abs(value) >= 2:
            name = operand if operand.isidentifier() else _hoist_own(scope, base, level)
            product = _whole_power(scope, name, int(abs(value)))
            return f"({product})" if value > 0 else f"(1.0 / ({product}))"
    exponent = wrap(scope.operand(power, level, True))
    if base.is_number and base.is_positive:
        return f"tl.exp2({exponent} * {math.log2(float(base))!r})"
    if power.is_number or (base.is_nonnegative and not power.is_integer):  # a negative base has only integer powers
        return f"tl.exp2({exponent} * {_logarithm(scope, 'log2', base, level)})"
    scope.helpers |= {"_power", "_log2"}
    fast = "FAST_MATH" if scope.level_of(base) == Level.PAIR else "False"
    x = f"{exponent} * 0.0 + {literal(base, True)}" if base.is_number else unwrap(scope.operand(base, level, True))
    return f"_power({x}, {unwrap(exponent)}, {fast})"


def _whole_power(scope: Lowering, name: str, power: int) -> str:
    """A product of a name with itself: written out, or by squares where it is long."""
    if power <= 8:
        return " * ".join([name] * power)
    scope.helpers.add("_square")
    text = name
    for bit in f"{power:b}"[1:]:
        text = f"_square({unwrap(text)})" + (f" * {name}" if bit == "1" else "")
    return text


def _hoist_own(scope: Lowering, expr: Any, level: Level) -> str:
    text = scope.hoisted(expr)
    return scope.raised(text, scope.level_of(expr), level)


def _tanh(scope: Lowering, expr: Any, level: Level) -> str:
    scope.helpers.add("_tanh")
    return f"_tanh({unwrap(scope.operand(expr.args[0], level, True))}, FAST_MATH)"


def _absolute(scope: Lowering, expr: Any, level: Level) -> str:
    (x,) = expr.args
    text = unwrap(scope.operand(x, level, type_of(expr) == "float"))
    if not (isinstance(x, sympy.Symbol) and level == Level.PAIR):
        return f"tl.abs({text})"
    scope.helpers.add("_magnitude")
    return f"_magnitude({text}, FAST_MATH)"


def _with_sign(scope: Lowering, expr: Any, level: Level) -> str:
    scope.helpers.add("_with_sign")
    value, of = (unwrap(scope.operand(e, level, True)) for e in expr.args)
    return f"_with_sign({value}, {of}, FAST_MATH)"


def _log(scope: Lowering, expr: Any, level: Level) -> str:
    return _logarithm(scope, "log", expr.args[0], level)


def _logarithm(scope: Lowering, name: str, expr: Any, level: Level) -> str:
    x = unwrap(scope.operand(expr, level, True))
    if scope.level_of(expr) != Level.PAIR:  # one value per row may as well be exact
        return f"tl.{name}({x})"
    scope.helpers |= {f"_{name}", "_log2"}
    return f"_{name}({x}, FAST_MATH)"


def _softplus(scope: Lowering, expr: Any, level: Level) -> str:
    scope.helpers |= {"_softplus", "_log", "_log2"}
    return f"_softplus({unwrap(scope.operand(expr.args[0], level, True))}, FAST_MATH)"


def _sigmoid(scope: Lowering, expr: Any, level: Level) -> str:
    power = per_ln2(lower_exp(sympy.expand(-expr.args[0])))
    # two elements of a tile share one division; of a value per row, a thread may have only one
    name = "_logistic_of_pairs" if scope.level_of(power) == Level.PAIR else "_logistic"
    scope.helpers.add(name)
    return f"{name}({unwrap(scope.operand(power, level, True))}, FAST_MATH)"


def _silu(scope: Lowering, expr: Any, level: Level) -> str:
    x = expr.args[0]
    return _product_of(scope, x, voc.sigmoid(x), level)


def _product_of(scope: Lowering, a: Any, b: Any, level: Level) -> str:
    return f"({scope.operand(a, level, True)} * {scope.operand(b, level, True)})"


def _relu(scope: Lowering, expr: Any, level: Level) -> str:
    return f"tl.maximum({unwrap(scope.operand(expr.args[0], level, True))}, 0.0)"


def _step(scope: Lowering, expr: Any, level: Level) -> str:
    return f"tl.where({scope.operand(expr.args[0], level, True)} > 0.0, 1.0, 0.0)"


def _extremum(scope: Lowering, expr: Any, level: Level) -> str:
    is_float = type_of(expr) == "float"
    a, b = (scope.operand(x, level, is_float) for x in expr.args)
    return f"tl.{type(expr).__name__}({unwrap(a)}, {unwrap(b)})"


def _where(scope: Lowering, expr: Any, level: Level) -> str:
    is_float = type_of(expr) == "float"
    condition = scope.operand(expr.args[0], level, False)
    a, b = (_case(scope, x, level, is_float) for x in expr.args[1:])
    return f"tl.where({unwrap(condition)}, {unwrap(a)}, {unwrap(b)})"


def _case(scope: Lowering, expr: Any, level: Level, is_float: bool) -> str:
    """One of the two cases of a choice. If its negative has a name already, as in f * sign(x), it is the negation of
    that, so that no factor per row or column is kept for a second product."""
    opposite = scope.known(-expr) if expr.is_Mul and scope.level_of(expr) == level else None
    return f"-{opposite}" if opposite and opposite.isidentifier() else scope.operand(expr, level, is_float)


def _detach(scope: Lowering, expr: Any, level: Level) -> str:
    return scope.operand(expr.args[0], level, type_of(expr) == "float")


def _floor(scope: Lowering, expr: Any, level: Level) -> str:
    return f"tl.floor({unwrap(scope.operand(expr.args[0], level, True))}).to(tl.int32)"


def _to_int(scope: Lowering, expr: Any, level: Level) -> str:
    return f"{wrap(scope.operand(expr.args[0], level, False))}.to(tl.int32)"


def _to_float(scope: Lowering, expr: Any, level: Level) -> str:
    if type_of(expr.args[0]) == "bool":
        return f"tl.where({scope.operand(expr.args[0], level, False)}, 1.0, 0.0)"
    return scope.operand(expr.args[0], level, True)


def _floordiv(scope: Lowering, expr: Any, level: Level) -> str:
    return _integer(scope, "//", "_floor_div", expr, level)


def _mod(scope: Lowering, expr: Any, level: Level) -> str:
    return _integer(scope, "%", "_floor_mod", expr, level)


def _bit_and(scope: Lowering, expr: Any, level: Level) -> str:
    return f"({scope.operand(expr.args[0], level, False)} & {scope.operand(expr.args[1], level, False)})"


def _bit_or(scope: Lowering, expr: Any, level: Level) -> str:
    return f"({scope.operand(expr.args[0], level, False)} | {scope.operand(expr.args[1], level, False)})"


def _bit_xor(scope: Lowering, expr: Any, level: Level) -> str:
    return f"({scope.operand(expr.args[0], level, False)} ^ {scope.operand(expr.args[1], level, False)})"


def _integer(scope: Lowering, operator: str, helper: str, expr: Any, level: Level) -> str:
    """Python's // or %. Triton's truncate, so they are used only if nothing is negative."""
    a, b = expr.args
    left, right = scope.operand(a, level, False), scope.operand(b, level, False)
    if a.is_nonnegative and b.is_positive:
        return f"({left} {operator} {right})"
    scope.helpers.add(helper)
    return f"{helper}({left}, {right})"


def _and(scope: Lowering, expr: Any, level: Level) -> str:
    return "(" + " & ".join(_condition(scope, a, level) for a in sorted(expr.args, key=str)) + ")"


def _or(scope: Lowering, expr: Any, level: Level) -> str:
    return "(" + " | ".join(_condition(scope, a, level) for a in sorted(expr.args, key=str)) + ")"


def _not(scope: Lowering, expr: Any, level: Level) -> str:
    return (
        f"(not {_condition(scope, expr.args[0], level)})"
        if level == Level.PROGRAM
        else f"~{_condition(scope, expr.args[0], level)}"
    )


def _condition(scope: Lowering, expr: Any, level: Level) -> str:
    return scope.operand(expr, level, False)


def _relation(scope: Lowering, expr: Any, level: Level) -> str:
    is_float = "float" in (type_of(expr.lhs), type_of(expr.rhs))
    left, right = (scope.operand(x, level, is_float) for x in (expr.lhs, expr.rhs))
    return f"({left} {expr.rel_op} {right})"


def _constant(scope: Lowering, expr: Any, level: Level) -> str:
    return str(bool(expr))


def _integers_first(total: Any) -> tuple[Any, ...]:
    """The terms of a sum, its integers added up as one, so that they cancel exactly before fractions are added."""
    integers = [t for t in total.args if t.is_integer and not t.is_number]
    rest = [t for t in total.args if t not in integers]
    return (sympy.Add(*integers), *rest) if len(integers) > 1 and rest else total.args


def _is_reciprocal(f: Any) -> bool:
    return bool(f.is_Pow and f.exp.is_number and f.exp.could_extract_minus_sign() and float(f.exp) == -1)


#: the function for each kind of expression, of sympy and of the vocabulary
_KINDS: dict[type, Callable[[Lowering, Any, Level], str]] = {
    sympy.Add: _sum,
    sympy.Mul: _product,
    sympy.Pow: _power,
    Read: read,
    ByDistance: by_distance,
    sympy.log: _log,
    voc.absolute: _absolute,
    voc.tanh: _tanh,
    with_sign: _with_sign,
    voc.softplus: _softplus,
    voc.sigmoid: _sigmoid,
    voc.silu: _silu,
    voc.relu: _relu,
    voc.step: _step,
    voc.maximum: _extremum,
    voc.minimum: _extremum,
    voc.where: _where,
    voc.detach: _detach,
    voc.floor: _floor,
    voc.to_int: _to_int,
    voc.to_float: _to_float,
    voc.floordiv: _floordiv,
    voc.mod: _mod,
    voc.bit_and: _bit_and,
    voc.bit_or: _bit_or,
    voc.bit_xor: _bit_xor,
    sympy.And: _and,
    sympy.Or: _or,
    sympy.Not: _not,
    sympy.StrictLessThan: _relation,
    sympy.LessThan: _relation,
    sympy.StrictGreaterThan: _relation,
    sympy.GreaterThan: _relation,
    sympy.Equality: _relation,
    sympy.Unequality: _relation,
    boolalg.BooleanTrue: _constant,
    boolalg.BooleanFalse: _constant,
}
