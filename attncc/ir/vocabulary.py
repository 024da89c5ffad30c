"""The vocabulary of pure math: every function a formula may use, with its type rule and its derivative.

Add, multiply, power, `exp`, `log` and comparisons are sympy's own. The rest are the classes below. They are opaque to
sympy on purpose: `tanh` must stay one special-function instruction and `maximum` must not be case-split. Derivatives
are the numerically stable rules written here, never those of an expanded form.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom, BooleanFunction
from sympy.printing.precedence import PRECEDENCE

from attncc.ir.symbols import KV_IDX, Q_IDX, UNKNOWN

#: the indices along which tokens are counted
TOKENS = {Q_IDX, KV_IDX}
LN2 = math.log(2.0)
LOG2E = 1.0 / LN2

#: sympy's symbols are booleans too; these are not
BOOLEANS = (Relational, BooleanFunction, BooleanAtom)


class Op(sympy.Function):
    """A function of the vocabulary. `result` is its type: "float", "int", or "join" (that of its value arguments)."""

    result = "float"
    value_args: slice = slice(None)
    is_extended_real = True
    is_commutative = True

    def _eval_is_real(self) -> bool:
        return True

    def _eval_is_integer(self) -> bool | None:
        if self.result == "int":
            return True
        if self.result == "join":
            return True if all(a.is_integer for a in self.args[self.value_args]) else None
        return None

    def _eval_derivative(self, s: sympy.Symbol) -> sympy.Expr:
        total = sympy.S.Zero
        for i, arg in enumerate(self.args, start=1):
            if isinstance(arg, BOOLEANS):
                continue
            inner = arg.diff(s)
            if inner != 0:
                total += self.fdiff(i) * inner
        return total

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        raise NotImplementedError(f"{type(self).__name__} has no derivative rule")


class tanh(Op):
    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return 1 - self**2


class sigmoid(Op):
    nargs = 1

    def _eval_is_positive(self) -> bool:
        return True

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return self * (1 - self)


class softplus(Op):
    """log(1 + exp(x)), without overflow."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sigmoid(self.args[0])


class step(Op):
    """1 where x > 0, else 0: the derivative of relu (0 at 0, as PyTorch has it)."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.S.Zero


class relu(Op):
    nargs = 1
    result = "join"

    def _eval_is_nonnegative(self) -> bool:
        return True

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return step(self.args[0])


class erf(Op):
    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.Float(2 / math.sqrt(math.pi)) * sympy.exp(-(self.args[0] ** 2))


class gelu(Op):
    """x * Phi(x), the exact (erf) form."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        x = self.args[0]
        cdf = (1 + erf(sympy.Float(math.sqrt(0.5)) * x)) / 2
        return cdf + x * sympy.Float(1 / math.sqrt(2 * math.pi)) * sympy.exp(-(x**2) / 2)


class silu(Op):
    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        s = sigmoid(self.args[0])
        return s + self.args[0] * s * (1 - s)


class sin(Op):
    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return cos(self.args[0])


class cos(Op):
    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return -sin(self.args[0])


class absolute(Op):
    nargs = 1
    result = "join"

    def _eval_is_nonnegative(self) -> bool:
        return True

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sign(self.args[0])


class sign(Op):
    """-1, 0 or 1; a constant for differentiation."""

    nargs = 1
    result = "join"

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.S.Zero


class floor(Op):
    nargs = 1
    result = "int"

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.S.Zero


class maximum(Op):
    """The larger of two. At a tie the gradient goes to the second argument, so that maximum(x, 0) is relu(x)."""

    nargs = 2
    result = "join"

    @classmethod
    def eval(cls, a: Any, b: Any) -> Any:
        return max(a, b) if a.is_Integer and b.is_Integer else None

    def _eval_is_nonnegative(self) -> bool | None:
        return True if any(a.is_nonnegative for a in self.args) else None

    def _eval_is_positive(self) -> bool | None:
        return True if any(a.is_positive for a in self.args) else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        a, b = self.args
        return where(a > b, 1, 0) if argindex == 1 else where(a > b, 0, 1)


class minimum(Op):
    """The smaller of two. At a tie the gradient goes to the second argument."""

    nargs = 2
    result = "join"

    @classmethod
    def eval(cls, a: Any, b: Any) -> Any:
        return min(a, b) if a.is_Integer and b.is_Integer else None

    def _eval_is_nonnegative(self) -> bool | None:
        return True if all(a.is_nonnegative for a in self.args) else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        a, b = self.args
        return where(a < b, 1, 0) if argindex == 1 else where(a < b, 0, 1)


class where(Op):
    """where(condition, a, b): a where the condition holds, else b."""

    nargs = 3
    result = "join"
    value_args = slice(1, None)

    @classmethod
    def eval(cls, condition: Any, a: Any, b: Any) -> Any:
        if condition is sympy.true:
            return a
        if condition is sympy.false:
            return b
        return a if a == b else None

    def _eval_is_nonnegative(self) -> bool | None:
        return True if all(a.is_nonnegative for a in self.args[1:]) else None

    def _eval_derivative(self, s: sympy.Symbol) -> sympy.Expr:
        # the case that is not chosen may have an infinite derivative, which a factor of 0 would not hide
        return where(self.args[0], self.args[1].diff(s), self.args[2].diff(s))


class floordiv(Op):
    """Integer division that rounds towards minus infinity, as Python's // does."""

    precedence = PRECEDENCE["Add"]  # it prints as an operator, in parentheses within any product
    nargs = 2
    result = "int"

    @classmethod
    def eval(cls, a: Any, b: Any) -> Any:
        if a.is_Integer and b.is_Integer and b != 0:
            return sympy.Integer(int(a) // int(b))
        return a if b == 1 else None

    def _eval_is_nonnegative(self) -> bool | None:
        return True if self.args[0].is_nonnegative and self.args[1].is_positive else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.S.Zero


class mod(Op):
    """Integer remainder with the sign of the divisor, as Python's % has."""

    precedence = PRECEDENCE["Add"]
    nargs = 2
    result = "int"

    @classmethod
    def eval(cls, a: Any, b: Any) -> Any:
        return sympy.Integer(int(a) % int(b)) if a.is_Integer and b.is_Integer and b != 0 else None

    def _eval_is_nonnegative(self) -> bool | None:
        return True if self.args[1].is_positive else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.S.Zero


class _Bitwise(Op):
    """A bitwise operation on integers in two's complement, as Python's operators are."""

    nargs = 2
    result = "int"

    operate: ClassVar[Callable[[int, int], int]]

    @classmethod
    def eval(cls, a: Any, b: Any) -> Any:
        return sympy.Integer(cls.operate(int(a), int(b))) if a.is_Integer and b.is_Integer else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.S.Zero


class bit_and(_Bitwise):
    operate = operator.and_

    def _eval_is_nonnegative(self) -> bool | None:
        return True if any(a.is_nonnegative for a in self.args) else None


class bit_or(_Bitwise):
    operate = operator.or_

    def _eval_is_nonnegative(self) -> bool | None:
        return True if all(a.is_nonnegative for a in self.args) else None


class bit_xor(_Bitwise):
    operate = operator.xor

    def _eval_is_nonnegative(self) -> bool | None:
        return True if all(a.is_nonnegative for a in self.args) else None


class to_int(Op):
    """Truncation towards zero; a boolean becomes 0 or 1."""

    nargs = 1
    result = "int"

    @classmethod
    def eval(cls, x: Any) -> Any:
        return x if not isinstance(x, BOOLEANS) and x.is_integer else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.S.Zero


class to_float(Op):
    """An index, an integer or a boolean as a float."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.S.One


class sum_d(Op):
    """The sum of a vector's components over the head dimension. Only the similarity stage has vectors."""

    nargs = 1


class detach(Op):
    """Its argument, as a constant for differentiation."""

    nargs = 1
    result = "join"

    @classmethod
    def eval(cls, x: Any) -> Any:
        return x if x.is_number else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.S.Zero


class Root(Op):
    """`Root(term, rest, lo, hi)`: the t in [lo, hi] at which the sum of `term` over the visible keys, plus `rest`, is
    0. The sum is monotone in t, which is the symbol `symbols.UNKNOWN` in term and rest."""

    nargs = 4

    @property
    def free_symbols(self) -> set[sympy.Basic]:
        return super().free_symbols - {UNKNOWN}


class cumsum(Op):
    """The running sum of an input along the tokens, up to and including the entry that is read.

    Its argument is a Read with one index along the tokens. `passes.running` turns it into an input.
    """

    nargs = 1

    @property
    def axis(self) -> int:
        """The dimension of the input that the sum runs along."""
        return next(i for i, e in enumerate(self.args[0].index) if e.free_symbols & TOKENS)


class Read(sympy.Function):
    """`Read(input, i, j, ...)`: one element of a user's input tensor. An index outside the tensor reads 0."""

    is_extended_real = True
    is_commutative = True

    def _eval_is_real(self) -> bool:
        return True

    def _eval_is_integer(self) -> bool | None:
        return True if self.args[0].is_integer else None

    def _eval_derivative(self, s: sympy.Symbol) -> sympy.Expr:
        return sympy.S.Zero

    @property
    def input(self) -> str:
        return str(self.args[0])

    @property
    def index(self) -> tuple[sympy.Expr, ...]:
        return tuple(self.args[1:])


class ByDistance(sympy.Function):
    """`ByDistance(number, kv_idx, q_idx, shift)`: the entry of a kernel's table `number` for the distance
    kv_idx + shift - q_idx. No user writes it: see `passes.distances`."""

    is_extended_real = True
    is_commutative = True

    def _eval_is_real(self) -> bool:
        return True


#: name a user writes -> class, for one-to-one functions
FUNCTIONS: dict[str, type[sympy.Function]] = {
    "exp": sympy.exp,
    "log": sympy.log,
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
    "detach": detach,
}

#: pieces of the special-function unit that one evaluation costs, for the cost model
SFU_COST: dict[type, float] = {
    sympy.exp: 1,
    sympy.log: 1,
    tanh: 1,
    sigmoid: 1.5,
    softplus: 2,
    silu: 2,
    erf: 2,
    gelu: 2,
    sin: 1,
    cos: 1,
}

#: every node that an expression of the IR may consist of
NODES = (
    *(sympy.Symbol, sympy.Rational, sympy.Float, sympy.Add, sympy.Mul, sympy.Pow, sympy.exp, sympy.log),
    *(sympy.Eq, sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.And, sympy.Or, sympy.Not, BooleanAtom),
    *(Op, Read),
)


def type_of(expr: Any) -> str:
    """ "bool", "int" or "float"."""
    if isinstance(expr, BOOLEANS):
        return "bool"
    return "int" if expr.is_integer else "float"


def attached(expr: Any) -> Any:
    """The expression without `detach`, which matters only to differentiation."""
    return expr.replace(detach, lambda x: x) if expr.has(detach) else expr
