"""Everything the passes found out about a variant, computed once and handed to every kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import sympy

from attncc.errors import UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir.graph import VariantGraph
from attncc.ir.vocabulary import Read
from attncc.passes.differentiate import Backward, differentiate
from attncc.passes.fold import Folded, fold
from attncc.passes.stream import LSE, Online, stream
from attncc.passes.tiles import TilePlan, tile_plan


@dataclass(frozen=True)
class InputGradient:
    """How the cotangent of one element read is reduced: over a program, a row, a column, a diagonal band or a tile."""

    read: Read
    expr: sympy.Expr
    kind: str  # program | row | col | band | tile
    number: int

    @property
    def name(self) -> str:
        return f"d{self.read.input}_{self.number}"


class Plan:
    """The facts about one graph. Each is computed when first asked for, so a forward pays for no backward."""

    def __init__(self, graph: VariantGraph):
        self.graph = graph

    @cached_property
    def online(self) -> Online:
        if self.graph.branches > 1:
            raise UnsupportedError("kernels for several branches are not generated yet")
        return stream(self.graph)

    @cached_property
    def backward(self) -> Backward:
        return differentiate(self.graph, self.online)

    @cached_property
    def has_backward(self) -> UnsupportedError | None:
        """None, or why there is no backward."""
        try:
            self.backward  # noqa: B018
        except UnsupportedError as error:
            return error
        return None

    @cached_property
    def folded(self) -> Folded:
        return fold(self.graph, self.online)

    @cached_property
    def over_keys(self) -> TilePlan:
        return tile_plan(self.graph["mask"].expr, sym.KV_IDX)

    @cached_property
    def over_queries(self) -> TilePlan:
        return tile_plan(self.graph["mask"].expr, sym.Q_IDX)

    @cached_property
    def stored(self) -> tuple[tuple[str, sympy.Expr], ...]:
        """The row statistics that the forward writes: what the backward needs, and lse where there is one."""
        rows: list[tuple[str, sympy.Expr]] = []
        if self.has_backward is None:
            rows += [(s.name, e) for s, e in self.backward.saved]
        if self.online.lse is not None and LSE.name not in dict(rows):
            rows.append((LSE.name, self.online.lse))
        return tuple(rows)

    @property
    def has_lse(self) -> bool:
        return self.online.lse is not None

    @cached_property
    def saved_names(self) -> tuple[str, ...]:
        """The stored rows that the backward reads."""
        return tuple(s.name for s, _ in self.backward.saved)

    @cached_property
    def gradients(self) -> tuple[InputGradient, ...]:
        """One entry a differentiable element read."""
        found = []
        for number, (read, expr) in enumerate((*self.backward.dreads, *self.backward.row_dreads)):
            found.append(InputGradient(read, expr, _kind(read), number))
        return tuple(found)

    def row_only(self, gradient: InputGradient) -> bool:
        """Is this cotangent one value a row already (a sink), rather than a sum over keys?"""
        return gradient.number >= len(self.backward.dreads)


def _kind(read: Read) -> str:
    symbols = read.free_symbols
    along_q, along_kv = sym.Q_IDX in symbols, sym.KV_IDX in symbols
    if not along_q and not along_kv:
        return "program"
    if not along_kv:
        return "row"
    if not along_q:
        return "col"
    if _by_distance(read):
        return "band"
    if _one_dimension_each(read):
        return "tile"
    raise UnsupportedError(
        f"the gradient of '{read.input}' is not derived: its index depends on the query and the key together",
        stage="score",
        remedy="index it by (q_idx, kv_idx) as two dimensions, or by a function of kv_idx - q_idx alone",
    )


def _by_distance(read: Read) -> bool:
    """Does every index depend on q_idx and kv_idx through their difference only?"""
    moved = {sym.Q_IDX: sym.Q_IDX + 1, sym.KV_IDX: sym.KV_IDX + 1}
    return all(_settled(i.subs(moved, simultaneous=True)) == _settled(i) for i in read.index)


def _settled(index: sympy.Expr) -> sympy.Expr:
    return index.func(*(_settled(a) for a in index.args)).expand() if index.args else index


def _one_dimension_each(read: Read) -> bool:
    return all(isinstance(i, sympy.Symbol) or not i.free_symbols & {sym.Q_IDX, sym.KV_IDX} for i in read.index) and {
        sym.Q_IDX,
        sym.KV_IDX,
    } <= set(read.index)
