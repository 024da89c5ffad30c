"""Values: what the variables of a formula are while it is read, whether it came as Python or as text.

Every operation checks the types of its operands and says what is wrong in the user's terms; the caller (the tracer, or the
text parser) knows where in the source it happened and adds the place.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import sympy

from attncc.errors import SpecError
from attncc.ir import vocabulary as voc
from attncc.ir.graph import InputDecl
from attncc.ir.symbols import V_VEC, input_symbol
from attncc.ir.text import formula

_ARTICLE = {"bool": "a boolean", "int": "an index (integer)", "float": "a number"}


def fail(reason: str, remedy: str | None = None) -> NoReturn:
    raise SpecError(reason, remedy=remedy)


class Value:
    """A typed expression. Python's operators build larger ones."""

    __slots__ = ("expr",)
    __array_priority__ = 1000

    def __init__(self, expr: Any):
        self.expr = expr

    @property
    def type(self) -> str:
        return voc.type_of(self.expr)

    def __repr__(self) -> str:
        return formula(self.expr)

    # arithmetic
    def __add__(self, other: Any) -> Value:
        return Value(number(self) + number(other))

    def __sub__(self, other: Any) -> Value:
        return Value(number(self) - number(other))

    def __mul__(self, other: Any) -> Value:
        return Value(number(self) * number(other))

    def __truediv__(self, other: Any) -> Value:
        divisor = number(other)
        if divisor == 0:
            fail("division by zero")
        return Value(number(self) / divisor)

    def __floordiv__(self, other: Any) -> Value:
        a, b = number(self), number(other)
        if not (a.is_integer and b.is_integer):
            fail("// is for indices and integers", "for numbers write floor(a / b)")
        if b == 0:
            fail("division by zero")
        return Value(voc.floordiv(a, b))

    def __mod__(self, other: Any) -> Value:
        a, b = number(self), number(other)
        if not (a.is_integer and b.is_integer):
            fail("% is for indices and integers", "for numbers write a - b * floor(a / b)")
        if b == 0:
            fail("division by zero")
        return Value(voc.mod(a, b))

    def __pow__(self, other: Any) -> Value:
        base, exponent = number(self), number(other)
        return Value(base**exponent)

    def __radd__(self, other: Any) -> Value:
        return lift(other) + self

    def __rsub__(self, other: Any) -> Value:
        return lift(other) - self

    def __rmul__(self, other: Any) -> Value:
        return lift(other) * self

    def __rtruediv__(self, other: Any) -> Value:
        return lift(other) / self

    def __rfloordiv__(self, other: Any) -> Value:
        return lift(other) // self

    def __rmod__(self, other: Any) -> Value:
        return lift(other) % self

    def __rpow__(self, other: Any) -> Value:
        return lift(other) ** self

    def __neg__(self) -> Value:
        return Value(-number(self))

    def __pos__(self) -> Value:
        return Value(number(self))

    def __abs__(self) -> Value:
        return apply("abs", self)

    # comparisons
    def __lt__(self, other: Any) -> Value:
        return Value(sympy.Lt(number(self), number(other)))

    def __le__(self, other: Any) -> Value:
        return Value(sympy.Le(number(self), number(other)))

    def __gt__(self, other: Any) -> Value:
        return Value(sympy.Gt(number(self), number(other)))

    def __ge__(self, other: Any) -> Value:
        return Value(sympy.Ge(number(self), number(other)))

    def __eq__(self, other: Any) -> Value:  # type: ignore[override]
        return Value(sympy.Eq(number(self), number(other)))

    def __ne__(self, other: Any) -> Value:  # type: ignore[override]
        return Value(sympy.Ne(number(self), number(other)))

    __hash__ = None  # type: ignore[assignment]

    # logic
    def __and__(self, other: Any) -> Value:
        return Value(sympy.And(boolean(self), boolean(other)))

    def __or__(self, other: Any) -> Value:
        return Value(sympy.Or(boolean(self), boolean(other)))

    def __invert__(self) -> Value:
        return Value(sympy.Not(boolean(self)))

    def __rand__(self, other: Any) -> Value:
        return lift(other) & self

    def __ror__(self, other: Any) -> Value:
        return lift(other) | self

    def __bool__(self) -> bool:
        fail(
            f"'{formula(self.expr)}' has no truth value while the formula is read",
            "write where(condition, a, b) for a choice, and & | ~ for and, or, not (each comparison in parentheses)",
        )

    def __float__(self) -> float:
        fail("a value of the formula is no Python number", "use the functions of attncc (ac.exp, ac.log, ...)")

    def __index__(self) -> int:
        fail("a value of the formula is no Python integer", "declare a tensor that is indexed by it as an ac.Input")

    def __iter__(self) -> NoReturn:
        fail("a value of the formula cannot be iterated")


class InputTensor:
    """A user's tensor inside a formula: `slopes[h]` reads one element."""

    def __init__(self, decl: InputDecl):
        self._decl = decl
        self._symbol = input_symbol(decl.name, decl.dtype == "int")

    def __getitem__(self, index: Any) -> Value:
        index = index if isinstance(index, tuple) else (index,)
        pattern = self._decl.pattern
        if len(index) != len(pattern):
            fail(
                f"'{self._decl.name}' has {len(pattern)} dimension{'s' * (len(pattern) != 1)} "
                f"[{', '.join(pattern)}], but is read with {len(index)} ind{'ices' if len(index) != 1 else 'ex'}",
                f"write {self._decl.name}[{', '.join(pattern)}], or change the pattern of the input",
            )
        exprs = []
        for i in index:
            expr = number(i)
            if not expr.is_integer:
                fail(f"'{formula(expr)}' is {_ARTICLE['float']}, not an index", "wrap it in int(...) or floor(...)")
            exprs.append(expr)
        return Value(voc.Read(self._symbol, *exprs))

    def __getattr__(self, name: str) -> NoReturn:
        self._unindexed()

    def _unindexed(self, *_: Any) -> NoReturn:
        name, pattern = self._decl.name, ", ".join(self._decl.pattern)
        fail(f"the input '{name}' is a tensor and must be indexed", f"write {name}[{pattern}]")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _unindexed
    __neg__ = __abs__ = __lt__ = __le__ = __gt__ = __ge__ = __pow__ = __rpow__ = __floordiv__ = __mod__ = _unindexed


def lift(x: Any) -> Value:
    """A Python number, boolean or Value as a Value."""
    if isinstance(x, Value):
        return x
    if isinstance(x, InputTensor):
        x._unindexed()
    if isinstance(x, bool):
        return Value(sympy.true if x else sympy.false)
    if isinstance(x, int):
        return Value(sympy.Integer(x))
    if isinstance(x, float):
        if not math.isfinite(x):
            fail(f"the constant {x} is not finite", "hide pairs with the mask stage, never with an infinite score")
        return Value(sympy.Integer(int(x)) if x.is_integer() and abs(x) < 2**53 else sympy.Float(x))
    if type(x).__module__.split(".")[0] == "torch":
        fail(
            "a tensor is captured by the formula",
            "declare it: inputs={'name': ac.Input(...)}, and read it as name[...]",
        )
    fail(f"{type(x).__name__} is not a value of a formula", "numbers, booleans, indices and inputs are")


def number(x: Any) -> Any:
    """The expression of a float or an index."""
    value = lift(x)
    if value.type == "bool":
        fail(f"expected a number, got a boolean: '{formula(value.expr)}'", "write where(condition, 1, 0)")
    return value.expr


def boolean(x: Any) -> Any:
    """The expression of a boolean."""
    value = lift(x)
    if value.type != "bool":
        fail(
            f"expected a boolean, got {_ARTICLE[value.type]}: '{formula(value.expr)}'",
            f'did you mean a comparison, e.g. "{formula(value.expr)} > 0"?',
        )
    return value.expr


def apply(name: str, *args: Any) -> Value:
    """One function of the vocabulary, by the name a user writes."""
    cls = voc.FUNCTIONS[name]
    if name == "where":
        if len(args) != 3:
            fail(f"where takes 3 arguments (condition, a, b), got {len(args)}")
        return Value(cls(boolean(args[0]), number(args[1]), number(args[2])))
    arity = 2 if name in ("maximum", "minimum") else 1
    if len(args) != arity:
        fail(f"{name} takes {arity} argument{'s' * (arity > 1)}, got {len(args)}")
    if name in ("int", "float"):
        return Value(cls(lift(args[0]).expr))
    exprs = [number(a) for a in args]
    if any(e.has(V_VEC) for e in exprs):
        fail(f"{name}(v_vec): the output must be linear in v_vec", "write row.sum(weight * v_vec)")
    return Value(cls(*exprs))


def constant(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)
