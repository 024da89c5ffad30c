"""Subexpressions that depend on a pair's distance only: precomputed tables with an entry per distance.

T5's buckets, a learned bias per distance, periods between query and key, a power of the distance: each is a function of
kv_idx - q_idx, of the head and of inputs, so that all pairs of a head share q_len + kv_len - 1 values. If one is more
expensive than a load, a small kernel computes the table once, and pairs read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import sympy

from attncc.ir import symbols as sym
from attncc.ir.graph import VariantGraph
from attncc.ir.similarity import by_distance
from attncc.ir.vocabulary import ByDistance, Read, type_of
from attncc.passes.counts import pair_costs
from attncc.passes.fold import LN2

#: a formula with more operations per pair than this is read from a table: a load takes the load unit the clock of four
#: operations, and has a latency
WORK_OF_A_LOAD = 16
#: the most table entries per pair, in a forward and in a backward: each is a tile; more were not measured
MOST_OF_A_SCORE, MOST_TABLES = 2, 6
#: operations that take as long as a load of an input's element, with its offset and guard
WORK_OF_A_READ = 16
#: operations that take as long as one of the special-function unit
SFU_WORK = 8
#: kv_idx - q_idx, in a table's formula
DISTANCE = sympy.Symbol("distance", integer=True)
#: the position of a pair by its indices, as arguments of ByDistance
INDICES = (sym.KV_IDX, sym.Q_IDX, sympy.S.Zero)
_NAMES = frozenset({s.name for s in sym.INDICES.values()} | {LN2.name, sym.SCALE.name})


@dataclass(frozen=True)
class Tables:
    """The tables of some kernels: formulas over q_idx and kv_idx that depend on their difference alone.

    by_batch, by_head: whether they also differ by batch or head; known: the names of the variant's inputs and scalars;
    unused: the numbers of tables that these kernels do not read, of those that several kernels share.
    """

    formulas: tuple[sympy.Expr, ...] = ()
    known: frozenset[str] = frozenset()
    unused: frozenset[int] = frozenset()

    @property
    def count(self) -> int:
        """The number of tables; 0 if none of them is read."""
        return len(self.formulas) if len(self.unused) < len(self.formulas) else 0

    @property
    def read(self) -> Tables:
        """The tables for Triton's kernels, which use only those whose formulas read an input: their loads per pair go
        through shared memory, and take as long as some forty operations (on an H100 1.1 of a causal dQ's 2 ms)."""
        return replace(self, unused=frozenset(i for i, e in enumerate(self.formulas) if not reads(e)))

    @property
    def by_batch(self) -> bool:
        return any(sym.B in e.free_symbols for e in self.formulas)

    @property
    def by_head(self) -> bool:
        return any({sym.H, sym.H_KV} & e.free_symbols for e in self.formulas)

    @property
    def of_distance(self) -> tuple[sympy.Expr, ...]:
        """The formulas over DISTANCE, which unlike kv_idx may be negative."""
        return tuple(e.xreplace({sym.Q_IDX: sympy.S.Zero, sym.KV_IDX: DISTANCE}) for e in self.formulas)

    def apart(self, expr: Any, place: tuple[Any, Any, Any] = INDICES) -> Any:
        """The expression with the tables' formulas replaced by their entries. place: kv_idx, q_idx, and a shift."""
        numbers = {e: i for i, e in enumerate(self.formulas) if i not in self.unused}

        def entry(e: sympy.Expr) -> sympy.Expr | None:
            return ByDistance(sympy.Integer(numbers[e]), *place) if e in numbers else None

        return _walk(expr, self.known, entry) if numbers else expr


NO_TABLES = Tables()


def reads(formula: sympy.Expr) -> bool:
    """Whether it reads an input by distance, instead of only computing."""
    return any(_indices(r) for r in formula.atoms(Read))


def tables_of(exprs: Iterable[Any], graph: VariantGraph) -> Tables:
    """The tables that pay for kernels of these expressions, in the order of their first use."""
    known = frozenset({d.name for d in graph.inputs} | {s.name for s in graph.scalars})
    found: dict[sympy.Expr, None] = {}

    def entry(e: sympy.Expr) -> sympy.Expr | None:
        if _work(e) > WORK_OF_A_LOAD:
            found.setdefault(e)
            return ByDistance(sympy.Integer(0), *INDICES)
        return None

    for expr in exprs:
        _walk(expr, known, entry)
    return Tables(tuple(found), known)


def _walk(expr: Any, known: frozenset[str], entry: Any) -> Any:
    """The expression with its largest parts that depend only on the distance replaced by what `entry` returns for them,
    unless this is None."""
    if not {sym.Q_IDX, sym.KV_IDX} <= expr.free_symbols or isinstance(expr, ByDistance):
        return expr
    if _of_distance(expr, known):
        found = entry(expr)
        return expr if found is None else found
    rest = list(expr.args)
    replaced = []
    if (expr.is_Add or expr.is_Mul) and type_of(expr) == "float":
        own = [a for a in rest if not _indices(a) or _of_distance(a, known, ("float", "int"))]
        own = [a for a in own if _names(a) <= known | _NAMES]
        together = expr.func(*own)
        found = entry(together) if _of_distance(together, known, ("float", "int")) else None
        if found is not None:
            replaced, rest = [found], [a for a in rest if a not in own]
    return expr.func(*replaced, *(_walk(a, known, entry) for a in rest))


def _of_distance(expr: Any, known: frozenset[str], types: tuple[str, ...] = ("float",)) -> bool:
    """Whether it depends on q_idx and kv_idx only through their difference, and otherwise only on the program. `types`:
    an integer may be part of a table's formula if it is added to, or multiplied with, a float."""
    both = _indices(expr) == {sym.Q_IDX, sym.KV_IDX}
    return both and type_of(expr) in types and _names(expr) <= known | _NAMES and by_distance(expr)


def _indices(expr: Any) -> set[sympy.Symbol]:
    return expr.free_symbols & {sym.Q_IDX, sym.KV_IDX}


def _names(expr: Any) -> set[str]:
    return {s.name for s in expr.free_symbols}


def _work(expr: sympy.Expr) -> float:
    costs = pair_costs([expr], frozenset())
    return (
        costs.fma
        + costs.int
        + SFU_WORK * costs.sfu
        + WORK_OF_A_READ * len({r for r in expr.atoms(Read) if _indices(r)})
    )
