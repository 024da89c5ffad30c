"""Auxiliary outputs, which a caller may request besides the output row: a pair expression, and its reduction.

    output    := name = expr over reductions of one domain
    reduction := domain.sum(expr) | domain.max(expr) | domain.argmax(expr) | domain.count(), over the visible pairs of
                 a cell for which a condition holds
    domain    := row | col | offset | offset(lo, hi) | block(m, n) | pair | pair(start, stop)

A domain says which pairs form a cell: those of one query, of one key, of one distance kv_idx - q_idx, of one block of
m queries by n keys, or each pair alone (for the queries of the slice start:stop). A cell without a visible pair has sum
0, max -inf, argmax -1 and count 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import sympy

from attncc.errors import Span
from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc

#: the reductions of each domain; argmax exists only where a cell is a line of pairs
OPS: dict[str, tuple[str, ...]] = {
    "row": ("sum", "max", "argmax", "count"),
    "col": ("sum", "max", "argmax", "count"),
    "offset": ("sum", "count"),
    "block": ("sum", "max", "count"),
    "pair": ("sum", "max"),
}
#: the largest output of a domain whose size grows with queries times keys, in elements: 1 GiB of float32
LIMIT = 2**28


@dataclass(frozen=True)
class Domain:
    """The domain of a reduction: which pairs of one (batch, query head) form a cell.

    args: (lo, hi) of offset, both inclusive, or (None, None); (m, n) of block; (start, stop) of pair, as in a slice.
    limit: the most elements that an output of block or pair may have; larger calls are refused."""

    kind: str
    args: tuple[int | None, ...] = ()
    limit: int = field(default=LIMIT, compare=False)

    def __str__(self) -> str:
        if all(a is None for a in self.args):
            return self.kind
        shown = self.args[:-1] if self.args[-1] is None else self.args
        return f"{self.kind}({', '.join(map(str, shown))})"

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the output's dimensions after batch and head."""
        return {
            "row": ("q_idx",),
            "col": ("kv_idx",),
            "offset": ("offset",),
            "block": ("q_block", "kv_block"),
            "pair": ("q_idx", "kv_idx"),
        }[self.kind]

    @property
    def grows(self) -> bool:
        """Whether the output's size grows with queries times keys."""
        return self.kind in ("block", "pair")

    def first(self) -> sympy.Expr:
        """The first query of the domain, as an expression."""
        start = self.args[0] if self.kind == "pair" else None
        if start is None or start == 0:
            return sympy.S.Zero
        return voc.minimum(start, sym.Q_LEN) if start > 0 else voc.maximum(sym.Q_LEN + start, 0)

    def rows(self, q_len: int) -> tuple[int, int]:
        """The queries of the domain: the first, and one past the last."""
        start, stop = self.args if self.kind == "pair" else (None, None)
        begin, end = (
            default if x is None else (max(q_len + x, 0) if x < 0 else min(x, q_len))
            for x, default in ((start, 0), (stop, q_len))
        )
        return begin, max(begin, end)

    def shape(self, q_len: int, kv_len: int) -> tuple[int, ...]:
        """The output's shape after batch and head."""
        if self.kind == "row":
            return (q_len,)
        if self.kind == "col":
            return (kv_len,)
        if self.kind == "offset":
            lo, hi = self.args
            if lo is None or hi is None:
                return (max(q_len + kv_len - 1, 0),)
            return (hi - lo + 1,)
        if self.kind == "block":
            m, n = self.args
            assert m is not None
            assert n is not None
            return (-(-q_len // m), -(-kv_len // n))
        begin, end = self.rows(q_len)
        return (end - begin, kv_len)

    def cell(self) -> tuple[sympy.Expr, ...]:
        """The index of a pair's cell in the output, after batch and head. For offset and pair it may lie outside."""
        q, kv = sym.Q_IDX, sym.KV_IDX
        if self.kind == "row":
            return (q,)
        if self.kind == "col":
            return (kv,)
        if self.kind == "offset":
            lo = self.args[0]
            return (kv - q + sym.Q_LEN - 1,) if lo is None else (kv - q - lo,)
        if self.kind == "block":
            return (voc.floordiv(q, sympy.Integer(self.args[0])), voc.floordiv(kv, sympy.Integer(self.args[1])))
        return (q - self.first(), kv)


@dataclass(frozen=True)
class Reduction:
    """One value per cell: `op` over its visible pairs for which `when` holds. Counts and positions are integers."""

    symbol: sympy.Symbol
    op: str
    expr: sympy.Expr
    when: sympy.Basic = sympy.true

    @property
    def is_int(self) -> bool:
        return self.op in ("argmax", "count")


@dataclass(frozen=True)
class Output:
    """A named auxiliary output: `expr` is over its reductions, values of the program, and the cell's q_idx or
    kv_idx."""

    name: str
    domain: Domain
    reductions: tuple[Reduction, ...]
    expr: sympy.Expr
    span: Span | None = field(default=None, compare=False)

    @property
    def free_symbols(self) -> set[sympy.Symbol]:
        """Every symbol in the output's formulas, including those of its reductions."""
        parts = [self.expr, *(e for r in self.reductions for e in (r.expr, r.when))]
        return set().union(*(p.free_symbols for p in parts))

    @property
    def type(self) -> str:
        return voc.type_of(self.expr)

    def xreplace(self, symbols: Mapping[sympy.Symbol, sympy.Symbol]) -> Output:
        """The output with other symbols in its formulas."""
        reductions = (replace(r, expr=r.expr.xreplace(symbols), when=r.when.xreplace(symbols)) for r in self.reductions)
        return replace(self, reductions=tuple(reductions), expr=self.expr.xreplace(symbols))


def cell_symbol(op: str, number: int) -> sympy.Symbol:
    """The value of an output's `number`-th reduction of a kind, such as `cell_sum_0`."""
    name = f"cell_{op}_{number}"
    if op in ("argmax", "count"):
        return sympy.Symbol(name, integer=True)
    return sympy.Symbol(name, real=True)
