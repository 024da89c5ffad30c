"""The reductions that an output's formula may use: `row`, `col`, `offset`, `block` and `pair`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from attncc.ir.outputs import LIMIT, OPS, Domain, Reduction, cell_symbol
from attncc.ir.vocabulary import maximum
from attncc.language.values import Value, boolean, fail, number

#: the methods that a formula may call, by name
METHODS = ("sum", "mean", "max", "min", "argmax", "argmin", "count")


@dataclass(frozen=True)
class Made:
    """A reduction that a formula asked for, with the domain it is over."""

    domain: Domain
    reduction: Reduction


class Reducer:
    """Reductions over the visible pairs of each cell of a domain. `when` restricts them to the pairs where it holds.

    Reductions are noted in `made`; equal ones are computed once.
    """

    def __init__(self, domain: Domain, made: list[Made]):
        self._domain, self._made = domain, made

    def sum(self, x: Any, when: Any = True) -> Value:
        """The sum of x; 0 where there is no such pair."""
        return self._reduce("sum", number(x), when)

    def mean(self, x: Any, when: Any = True) -> Value:
        """The mean of x over the visible pairs where `when` holds; 0 where there is none."""
        return self.sum(x, when) / Value(maximum(self.count(when).expr, sympy.S.One))

    def max(self, x: Any, when: Any = True) -> Value:
        """The largest x; -inf where there is no such pair."""
        return self._reduce("max", number(x), when)

    def min(self, x: Any, when: Any = True) -> Value:
        """The smallest x; inf where there is no such pair."""
        return -self._reduce("max", -number(x), when)

    def argmax(self, x: Any, when: Any = True) -> Value:
        """The key (of a row) or the query (of a column) with the largest x, the first of several; -1 where there is
        none."""
        return self._reduce("argmax", number(x), when)

    def argmin(self, x: Any, when: Any = True) -> Value:
        """The same for the smallest x."""
        return self._reduce("argmax", -number(x), when)

    def count(self, when: Any = True) -> Value:
        """How many pairs are visible."""
        return self._reduce("count", sympy.S.One, when)

    def _reduce(self, op: str, expr: sympy.Expr, when: Any) -> Value:
        kind = self._domain.kind
        if op not in OPS[kind]:
            fail(f"{kind}.{op} is not a reduction", f"{kind} has: {', '.join(OPS[kind])}")
        condition = boolean(when)
        nested = [s for e in (expr, condition) for s in e.free_symbols if s.name.startswith("cell_")]
        if nested:
            fail(
                f"{kind}.{op} is over a value that is itself reduced",
                "make the inner one an output of its own, and hand it to a second op as an input",
            )
        for m in self._made:
            if m.domain == self._domain and (m.reduction.op, m.reduction.expr, m.reduction.when) == (
                op,
                expr,
                condition,
            ):
                return Value(m.reduction.symbol)
        # numbered by domain too, so that a formula over two domains is told apart and refused
        symbol = cell_symbol(op, sum(m.reduction.op == op for m in self._made))
        self._made.append(Made(self._domain, Reduction(symbol, op, expr, condition)))
        return Value(symbol)


class OffsetReducer(Reducer):
    """`offset`: every distance kv_idx - q_idx that occurs; `offset(lo, hi)`: those from lo to hi, both included."""

    def __call__(self, lo: int, hi: int) -> Reducer:
        _integers("offset", lo, hi)
        if lo > hi:
            fail(f"offset({lo}, {hi}) is empty", "write the smaller distance first")
        return Reducer(Domain("offset", (int(lo), int(hi))), self._made)


class BlockReducer:
    """`block(m, n)`: blocks of m queries by n keys, from query 0 and key 0 on."""

    def __init__(self, made: list[Made]):
        self._made = made

    def __call__(self, m: int, n: int, limit: int = LIMIT) -> Reducer:
        _integers("block", m, n, limit)
        for size in (m, n):
            if size < 1 or (size & (size - 1) and size % 16):
                fail(f"block({m}, {n}): {size} cannot be tiled", "use a power of two, or a multiple of 16")
        return Reducer(Domain("block", (int(m), int(n)), limit), self._made)


class PairReducer(Reducer):
    """`pair`: every pair is a cell of its own; `pair(start, stop)`: those of the queries start:stop, as in a slice."""

    def __call__(self, start: int | None = None, stop: int | None = None, limit: int = LIMIT) -> Reducer:
        _integers("pair", *(x for x in (start, stop) if x is not None), limit)
        return Reducer(Domain("pair", (start, stop), limit), self._made)


def _integers(kind: str, *values: Any) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            fail(f"{kind}(...) takes plain integers, got {value!r}")


def reducers(made: list[Made]) -> dict[str, Any]:
    """The domains by the names that an output's formula sees."""
    return {
        "row": Reducer(Domain("row"), made),
        "col": Reducer(Domain("col"), made),
        "offset": OffsetReducer(Domain("offset", (None, None)), made),
        "block": BlockReducer(made),
        "pair": PairReducer(Domain("pair", (None, None)), made),
    }
