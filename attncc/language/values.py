"""Values: the variables of a formula while it is being read, from Python or from text.

Every operation checks the types of its operands, and reports errors in the user's terms. The caller (the tracer, or the
text parser) knows the place in the source, and adds it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NoReturn

import sympy
import sympy.tensor.tensor  # sympy imports it at its first sum: a part of importing, not of the first formula
from sympy.core.relational import Relational

from attncc.errors import SpecError
from attncc.ir import vocabulary as voc
from attncc.ir.graph import InputDecl
from attncc.ir.similarity import is_vector
from attncc.ir.symbols import COMPONENT, QK, RAW_SCORE, SCORE, V_VEC, WEIGHT, input_symbol
from attncc.ir.text import formula

_ARTICLE = {"bool": "a boolean", "int": "an index (integer)", "float": "a number"}
#: what algebra may leave behind where a constant part of a formula has no value: 1/0, log(0), sqrt(-1)
_NO_VALUE = (sympy.zoo, sympy.nan, sympy.oo, -sympy.oo, sympy.I)
#: an integer constant must fit an index
_LARGEST = 2**63
#: a constant raised to a larger power is a mistake, or an attack on whoever reads the text
_LARGEST_POWER = 64


_BITWISE = ("bit_and", "bit_or", "bit_xor")
_TWO_ARGUMENTS = ("maximum", "minimum", *_BITWISE)


#: where what mixes heads goes, as talking heads do
_OTHER_HEADS = (
    "sums over heads go around the op: of scores, q and k of all heads side by side, and factors times q; of weights, "
    "v of all heads side by side, and sums of the outputs"
)


def fail(reason: str, remedy: str | None = None) -> NoReturn:
    raise SpecError(reason, remedy=remedy)


class Value:
    """A typed expression. Python's operators build larger ones."""

    __slots__ = ("expr",)
    __array_priority__ = 1000

    def __init__(self, expr: Any):
        if expr.has(*_NO_VALUE):
            fail(f"the formula has no finite real value here: '{formula(expr)}'")
        self.expr = expr

    @property
    def type(self) -> str:
        return voc.type_of(self.expr)

    def __repr__(self) -> str:
        return formula(self.expr)

    # arithmetic
    def __add__(self, other: Any) -> Value:
        a, b = _operands(self, other)
        return Value(a + b)

    def __sub__(self, other: Any) -> Value:
        a, b = _operands(self, other)
        return Value(a - b)

    def __mul__(self, other: Any) -> Value:
        a, b = _operands(self, other)
        return Value(_product(a, b))

    def __truediv__(self, other: Any) -> Value:
        a, b = _operands(self, other)
        if b == 0:
            fail("division by zero")
        return Value(_product(a, 1 / b))

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
        if base == 0 and exponent.is_negative:
            fail("division by zero")
        if base.is_number and exponent.is_number and abs(exponent) > _LARGEST_POWER:
            fail(f"the constant power {formula(base)} ** {formula(exponent)} is too large")
        if exponent.is_Float:  # so that algebra and printing know a square root when they see one
            exact = sympy.Rational(float(exponent))
            exponent = exact if exact.q <= 4 else exponent
        return Value((base**exponent).replace(sympy.Abs, voc.absolute))

    def __radd__(self, other: Any) -> Value:
        return self + other

    def __rsub__(self, other: Any) -> Value:
        return -self + other

    def __rmul__(self, other: Any) -> Value:
        return self * other

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
        return _compare(sympy.Lt, self, other)

    def __le__(self, other: Any) -> Value:
        return _compare(sympy.Le, self, other)

    def __gt__(self, other: Any) -> Value:
        return _compare(sympy.Gt, self, other)

    def __ge__(self, other: Any) -> Value:
        return _compare(sympy.Ge, self, other)

    def __eq__(self, other: Any) -> Value:  # type: ignore[override]
        return _compare(sympy.Eq, self, other)

    def __ne__(self, other: Any) -> Value:  # type: ignore[override]
        return _compare(sympy.Ne, self, other)

    __hash__ = None  # type: ignore[assignment]

    # what is written of whole tensors, or of bits
    def __getitem__(self, index: Any) -> NoReturn:
        remedy = "only inputs are indexed"
        if self.expr in (RAW_SCORE, SCORE, WEIGHT):
            branches = "weight[0] is that of a branch, with branches=2 or more; " if self.expr == WEIGHT else ""
            remedy = branches + _OTHER_HEADS
        fail(f"'{self}' is not a tensor, but one number of one head, query and key", remedy)

    def __matmul__(self, other: Any) -> NoReturn:
        fail("the operator @ is not part of the language: a formula is of one head, query and key", _OTHER_HEADS)

    def __lshift__(self, other: Any) -> NoReturn:
        self._shifted("<<", other)

    def __rshift__(self, other: Any) -> NoReturn:
        self._shifted(">>", other)

    def _shifted(self, sign: str, other: Any) -> NoReturn:
        number(other)
        remedy = "by a constant n write x * 2**n, x // 2**n; other bits go into an input of 0 and 1"
        fail(f"the operator {sign} is not part of the language", remedy)

    def __xor__(self, other: Any) -> NoReturn:
        fail("the operator ^ is not part of the language", "a power is written a ** b, and of bits bit_xor(a, b)")

    __rmatmul__, __rlshift__, __rrshift__, __rxor__ = __matmul__, __lshift__, __rshift__, __xor__

    # logic
    def __and__(self, other: Any) -> Value:
        return Value(sympy.And(*_booleans("&", self, other)))

    def __or__(self, other: Any) -> Value:
        return Value(sympy.Or(*_booleans("|", self, other)))

    def __invert__(self) -> Value:
        return Value(sympy.Not(boolean(self)))

    def __rand__(self, other: Any) -> Value:
        return lift(other) & self

    def __ror__(self, other: Any) -> Value:
        return lift(other) | self

    def __bool__(self) -> bool:
        fail(
            f"'{formula(self.expr)}' has no truth value while the formula is read",
            "write where(condition, a, b) for a choice, maximum and minimum for max and min, "
            "and & | ~ for and, or, not, with each comparison in parentheses: (a <= x) & (x < b)",
        )

    def __float__(self) -> float:
        fail("a value of the formula is no Python number", "use the functions of attncc (ac.exp, ac.log, ...)")

    def __index__(self) -> int:
        fail("a value of the formula is no Python integer", "declare a tensor that is indexed by it as an ac.Input")

    def __iter__(self) -> NoReturn:
        fail("a value of the formula cannot be iterated", "over the keys of a query go row.sum, row.max and their like")


class Indexed:
    """What a formula may only index. Any other use fails, in the words of `_how`: (what is wrong, what to write)."""

    def _how(self) -> tuple[str, str]:
        raise NotImplementedError

    def _unindexed(self, *_: Any) -> NoReturn:
        fail(*self._how())

    def __getattr__(self, name: str) -> NoReturn:
        self._unindexed()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _unindexed
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _unindexed
    __neg__ = __pos__ = __abs__ = __lt__ = __le__ = __gt__ = __ge__ = _unindexed
    __eq__ = __ne__ = _unindexed
    __and__ = __rand__ = __or__ = __ror__ = __invert__ = _unindexed
    __bool__ = __float__ = __int__ = __index__ = __iter__ = __len__ = _unindexed
    __hash__ = None  # type: ignore[assignment]


#: what people add to v, or to the output
_NO_VECTOR = (
    "only the similarity stage sees vectors: multiply v by one, or add one to it, before the op, and the output behind "
    "it; what is added for each query goes there times the output row.sum(weight) where that is not 1"
)


class InputTensor(Indexed):
    """A user's tensor inside a formula: `slopes[h]` reads one element.

    Where a stage sees vectors, an input whose last dimension is the head dimension is read without it: `u[h]`.
    """

    def __init__(self, decl: InputDecl, vectors: bool = False):
        self._decl, self._vectors = decl, vectors
        self._symbol = input_symbol(decl.name, decl.dtype == "int")

    def __getitem__(self, index: Any) -> Value:
        index = index if isinstance(index, tuple) else (index,)
        pattern = self._decl.pattern
        whole = self._decl.is_vector and len(index) == len(pattern) - 1
        if whole and not self._vectors:
            fail(
                f"'{self._decl.name}[{', '.join(pattern[:-1])}]' is a vector over the head dimension",
                _NO_VECTOR,
            )
        if len(index) != len(pattern) and not whole:
            fail(
                f"'{self._decl.name}' has {len(pattern)} dimension{'s' * (len(pattern) != 1)} "
                f"[{', '.join(pattern)}], but is read with {len(index)} ind{'ices' if len(index) != 1 else 'ex'}",
                f"write {self._decl.name}[{', '.join(pattern)}], or change the pattern of the input",
            )
        exprs = []
        for i in index:
            expr = number(i)
            if not expr.is_integer:
                fail(f"'{formula(expr)}' is {_ARTICLE['float']}, not an index", "wrap it in to_int(...) or floor(...)")
            if is_vector(expr):
                fail(f"'{formula(expr)}' is a vector, not an index")
            exprs.append(expr)
        if whole:
            exprs.append(COMPONENT)
        return Value(voc.Read(self._symbol, *exprs))

    def _how(self) -> tuple[str, str]:
        name, pattern = self._decl.name, self._decl.pattern[: -1 if self._decl.is_vector else None]
        if self._decl.is_vector and not self._vectors:
            return f"'{name}' is a vector over the head dimension", _NO_VECTOR
        return f"the input '{name}' is a tensor and must be indexed", f"write {name}[{', '.join(pattern)}]"


class Weights(Indexed):
    """The weights of a variant with several branches: `weight[0]` is that of the first."""

    def __init__(self, symbols: Sequence[sympy.Symbol]):
        self._symbols = tuple(symbols)

    def __getitem__(self, index: Any) -> Value:
        (at,) = index if isinstance(index, tuple) and len(index) == 1 else (index,)
        expr = at.expr if isinstance(at, Value) else sympy.sympify(at)
        last = len(self._symbols) - 1
        if not (getattr(expr, "is_Integer", False) and 0 <= expr <= last):
            fail(f"the branches are weight[0] to weight[{last}]: there is no weight[{at}]", "a branch is a constant")
        return Value(self._symbols[int(expr)])

    def _how(self) -> tuple[str, str]:
        count = len(self._symbols)
        return f"there are {count} branches, each with its own weight", "write weight[0], weight[1]"


def lift(x: Any) -> Value:
    """A Python number, boolean or Value as a Value."""
    if isinstance(x, Value):
        return x
    if isinstance(x, Indexed):
        x._unindexed()
    if isinstance(x, bool):
        return Value(sympy.true if x else sympy.false)
    if x is None:
        fail("the formula gives nothing", "end the function with `return` and the value")
    if isinstance(x, numbers.Integral):
        x = int(x)
        if abs(x) >= _LARGEST:
            fail("the integer constant does not fit 64 bits", "write it as a number: 1e30")
        return Value(sympy.Integer(x))
    if isinstance(x, numbers.Real):  # NumPy's numbers are such, too
        x = float(x)
        if not math.isfinite(x):
            fail(f"the constant {x} is not finite", "hide pairs with the mask stage, never with an infinite score")
        return Value(sympy.Integer(int(x)) if x.is_integer() and abs(x) < 2**53 else sympy.Float(x))
    if type(x).__module__.split(".")[0] == "torch":
        fail(
            "a tensor is captured by the formula",
            "declare it: inputs={'name': ac.Input(...)}, and read it as name[...]",
        )
    stage = getattr(x, "stage", None)
    if isinstance(stage, str):  # a Mask or a ScoreMod
        joined = "mask=ac.causal & function" if stage == "mask" else "score=ac.alibi() >> function"
        what = "a mask" if stage == "mask" else "a modifier of scores"
        fail(f"{what} is no value of a formula", f"join the two where the variant is made: {joined}")
    if callable(x):
        fail(f"a function, {getattr(x, '__name__', x)}, is no value of a formula", "call it")
    fail(f"{type(x).__name__} is not a value of a formula", "numbers, booleans, indices and inputs are")


def _operands(a: Value, b: Any) -> tuple[Any, Any]:
    """Two operands of arithmetic. A float constant makes a number of an index, as it does in Python: 1.0 * kv_idx."""
    left, right = number(a), number(b)
    real = isinstance(b, numbers.Real) and not isinstance(b, numbers.Integral)
    if real and left.is_integer and right.is_integer:
        left = voc.to_float(left)
    return left, right


def _compare(relation: Any, a: Value, b: Any) -> Value:
    """A comparison with a constant on its right, where Python puts it too: 0 <= x is x >= 0."""
    left, right = number(a), number(b)
    result = relation(left, right)
    flip = left.is_number and not right.is_number and isinstance(result, Relational)
    return Value(result.reversed if flip else result)


def _product(a: Any, b: Any) -> Any:
    """a * b with its exponentials gathered in one: exp(x) * exp(-m) is exp(x - m), which does not overflow."""
    product = a * b
    powers = [f for f in sympy.Mul.make_args(product) if isinstance(f, sympy.exp)]
    if len(powers) < 2:
        return product
    return product / sympy.Mul(*powers) * sympy.exp(sympy.Add(*(p.args[0] for p in powers)))


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


def _booleans(sign: str, a: Any, b: Any) -> tuple[Any, Any]:
    """The operands of & or |, of which two integers are nearly always a mistake about what they join."""
    left, right = lift(a), lift(b)
    if left.type == right.type == "int":
        fail(
            f"expected a boolean, got {_ARTICLE['int']}: '{left}'",
            f"{sign} joins its neighbours before they are compared: put each comparison in parentheses, "
            f"(a <= b) {sign} (c < d)",
        )
    return boolean(left), boolean(right)


def constant_power(base: int | float, exponent: int | float) -> int | float:
    """base ** exponent of two plain numbers, refused where it would be huge."""
    if abs(exponent) > _LARGEST_POWER or abs(base) >= _LARGEST:
        fail(f"the constant power {base} ** {exponent} is too large")
    return base**exponent


def arity(name: str) -> int:
    """How many arguments a function of the vocabulary takes."""
    return {"where": 3}.get(name, 2 if name in _TWO_ARGUMENTS else 1)


def apply(name: str, *args: Any) -> Value:
    """One function of the vocabulary, by the name a user writes."""
    cls = voc.FUNCTIONS[name]
    if name == "where":
        if len(args) != 3:
            fail(f"where takes 3 arguments (condition, a, b), got {len(args)}")
        return Value(cls(boolean(args[0]), number(args[1]), number(args[2])))
    expected = arity(name)
    if len(args) != expected:
        fail(f"{name} takes {expected} argument{'s' * (expected > 1)}, got {len(args)}")
    if name in ("int", "float"):
        return Value(cls(lift(args[0]).expr))
    exprs = [number(a) for a in args]
    if any(e.has(V_VEC) for e in exprs):
        fail(
            f"{name}(v_vec): the output must be linear in v_vec",
            "write row.sum(weight * v_vec), or in a recurrence factor * k_vec * v_vec; functions of v go before the "
            "op, those of the output behind it",
        )
    if name in _BITWISE and not all(e.is_integer for e in exprs):
        fail(f"{name} is for indices and integers", "wrap a number in to_int(...) or floor(...)")
    result = cls(*exprs)
    # exp(1) and log(3) are numbers; algebra would keep them as E and log(3)
    return Value(sympy.Float(float(result)) if name in ("exp", "log") and result.is_number else result)


def over_head_dim(name: str, *vectors: Any) -> Value:
    """The sum of a product's components, as the function `name` writes it."""
    exprs = [number(x) for x in vectors]
    for expr in exprs:
        if not is_vector(expr):
            fail(f"{name} takes vectors, and '{formula(expr)}' is none", "q_vec, k_vec and inputs over 'd' are")
    return Value(voc.sum_d(sympy.Mul(*exprs)))


#: what PyTorch has for a row and no pass over its keys computes
_ORDERED = ("topk", "sort", "argsort", "kthvalue", "median", "quantile")
OF_ORDER = (
    "keep the keys above a threshold: row.root solves for one, as in ac.entmax15, or it is an input, as in top_theta"
)
_RUNNING = ("cumsum", "cumprod", "logcumsumexp")
_INSTEAD_OF_RUNNING = "make the running sums in PyTorch, M x N for each head, and add them as an input: ac.bias()"


def no_reduction(domain: str, name: str, methods: Sequence[str]) -> tuple[str, str]:
    """Why a formula cannot ask for a reduction that there is not, and what it can ask for."""
    remedy = f"one of: {', '.join(f'{domain}.{method}' for method in methods)}"
    if name in _ORDERED and "root" in methods:
        remedy = OF_ORDER
    elif name in _RUNNING:
        remedy = f"a reduction is one value a {domain}; {_INSTEAD_OF_RUNNING}"
    return f"no {domain} reduction is called '{name}'", remedy


def running_sum(x: Any) -> Value:
    """The running sum of an element read, along the one of its dimensions that counts tokens."""
    expr = number(x)
    if not isinstance(expr, voc.Read):
        if expr.free_symbols & {SCORE, RAW_SCORE, QK}:
            why = f"a running sum along the keys of a row, as of '{formula(expr)}', is no sum over the row"
            fail(why, _INSTEAD_OF_RUNNING)
        remedy = "compute what each token adds before the call, pass it as an input, and write cumsum(g[b, h, kv_idx])"
        fail(f"cumsum takes an element of an input, and '{formula(expr)}' is none", remedy)
    if expr.is_integer:
        fail(f"'{formula(expr)}' is an integer; only a float input has a running sum", "declare the input as float")
    along = [i for i in expr.index if i.free_symbols & voc.TOKENS]
    if len(along) != 1 or along[0].free_symbols >= voc.TOKENS:
        fail(f"'{formula(expr)}' has not one index along the tokens", "read it by kv_idx, or by the query's position")
    return Value(voc.cumsum(expr))


def constant(x: Any) -> bool:
    """Whether x is a plain Python number."""
    return isinstance(x, int | float) and not isinstance(x, bool)
