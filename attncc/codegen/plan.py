"""Everything that the passes derive from a variant, computed once and used by all kernels.

A variant with several branches has a part for each, which is the plan of a single-branch variant. A kernel computes the
parts side by side; values of a single part (its score, running maximum, lse) have the part's tag in their name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import sympy

from attncc.codegen.facts import Facts, facts_of
from attncc.errors import UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir.graph import VariantGraph
from attncc.ir.similarity import by_distance
from attncc.ir.vocabulary import Read
from attncc.passes.differentiate import (
    DELTA,
    Backward,
    PairCotangents,
    differentiate,
    needs_reverse,
    normal_form,
)
from attncc.passes.distances import MOST_OF_A_SCORE, MOST_TABLES, NO_TABLES, Tables, reads, tables_of
from attncc.passes.fold import Folded, S, fold
from attncc.passes.phases import phases
from attncc.passes.reverse import first_at
from attncc.passes.running import without_running_sums
from attncc.passes.similarity import Similarity, loops_by_key, refuse_gradients, similarity
from attncc.passes.stream import LSE, Online, Sweep, renamed, stream
from attncc.passes.ties import with_ties
from attncc.passes.tiles import TilePlan, tile_plan_of


@dataclass(frozen=True)
class InputGradient:
    """The gradient of one element read: its cotangent `expr` at a pair, and the `kind` of its entries, over which the
    cotangent is summed: one per program, row, column, diagonal (band) or pair (tile)."""

    read: Read
    expr: sympy.Expr
    kind: str  # program | row | col | band | tile
    number: int
    part: int = 0
    row_only: bool = False  # `expr` is already a value per row (as for a sink), not a sum over keys
    own: bool = False  # the read is a term of the similarity; the kernel uses its sum for dQ or dK

    @property
    def name(self) -> str:
        return f"d{self.read.input}_{self.number}"


class Plan:
    """The results of all passes over one graph. Each is computed at its first use, so a forward pays for no backward.
    `given` is the graph as the user wrote it; `graph` has its running sums as inputs (see `passes.running`).

    `tag`: the suffix of this part's names, if the variant has several; `extra`: further cotangents of pairs; `facts`:
    those of an equal plan, if they are known already.
    """

    def __init__(
        self, graph: VariantGraph, tag: str = "", extra: PairCotangents | None = None, facts: Facts | None = None
    ):
        if graph.recurrent:
            raise UnsupportedError(
                f"'{graph.name}' is a recurrence: it has a state from token to token, and no pairs of query and key",
                remedy="ac.compile(...) has its kernels, attncc explain its form by chunks",
            )
        found = phases(graph)
        self.given = graph
        self.graph = with_ties(without_running_sums(found.main))
        #: inputs that other ops make before the kernels run
        self.made = found.made
        self.tag = tag
        self.extra = extra
        self._facts = facts

    @cached_property
    def parts(self) -> tuple[Plan, ...]:
        """The plans of the branches; with one branch, this plan."""
        if self.graph.branches == 1:
            return (self,)
        return tuple(Plan(part, f"_{i}") for i, part in enumerate(self.graph.parts))

    @property
    def knows_facts(self) -> bool:
        """Whether the facts are known without running a pass."""
        return self._facts is not None

    @property
    def facts(self) -> Facts:
        """The facts that calls need, from the cache or from the passes."""
        if self._facts is None:
            self._facts = facts_of(self)
        return self._facts

    @cached_property
    def similarity(self) -> Similarity:
        """The terms of the similarity. UnsupportedError: branches with sums over the head dimension other than qk."""
        if self.graph.branches > 1 and self.graph.sums_d:
            raise UnsupportedError(
                "each of several branches has its own dot(q_vec, k_vec), and no other sum over the head dimension yet",
                stage="similarity",
                span=self.graph.sums_d[0].span,
                remedy="make q and k in PyTorch, before the op, or compile the branches as variants of their own",
            )
        return similarity(self.graph)

    @property
    def core(self) -> VariantGraph:
        """The variant as the kernels of pairs see it: row and column terms of the similarity are inputs."""
        return self.similarity.core

    @property
    def branch(self) -> int:
        """The number of this part's branch."""
        return int(self.tag[1:]) if self.tag else 0

    @cached_property
    def online(self) -> Online:
        return stream(self.core)

    @cached_property
    def backward(self) -> Backward:
        found = differentiate(self.core, self.online, self.extra)
        if self.core is self.graph:
            return found
        # dK also gets contributions of terms and other matmuls, which must not be multiplied by the scale of dqk
        return replace(found, dqk=found.dqk * found.dqk_scale, dqk_scale=sympy.S.One)

    @cached_property
    def has_backward(self) -> UnsupportedError | None:
        """The reason why there is no backward, or None if there is one."""
        try:
            self.gradients  # noqa: B018
        except UnsupportedError as error:
            return error
        return None

    def refuse_gradients(self) -> None:
        """Raise the reason, if there is no backward."""
        if not self.facts.has_backward and self.has_backward is not None:
            raise self.has_backward

    @cached_property
    def folded(self) -> Folded:
        return fold(self.core, self.online)

    @cached_property
    def score_tables(self) -> Tables:
        """The tables by distance of the forward; none with several branches."""
        found = tables_of([self.folded.score], self.core) if len(self.parts) == 1 else NO_TABLES
        return found if len(found.formulas) <= MOST_OF_A_SCORE else NO_TABLES

    @cached_property
    def tables(self) -> Tables:
        """The tables by distance of the backward, which begin with the forward's."""
        if len(self.parts) > 1 or self.has_backward is not None:
            return self.score_tables
        raw = {sym.RAW_SCORE: self.core["raw_score"].expr}
        dsums, dreads = (
            [self.folded.apply(e.xreplace(raw)) for _, e in gradients]
            for gradients in (self.backward.dsums, self.backward.dreads)
        )
        found = tables_of([self.folded.score, *dsums], self.core)
        more = (e for e in tables_of(dreads, self.core).formulas if e not in found.formulas and reads(e))
        found = replace(found, formulas=(*found.formulas, *more))  # only Triton's kernels compute gradients of reads
        return found if len(found.formulas) <= MOST_TABLES else self.score_tables

    @cached_property
    def masks(self) -> tuple[sympy.Basic, ...]:
        """The masks of the branches, each once."""
        return tuple(dict.fromkeys(part["mask"].expr for part in self.graph.parts))

    @cached_property
    def over_keys(self) -> TilePlan:
        return tile_plan_of(self.masks, sym.KV_IDX)

    @cached_property
    def over_queries(self) -> TilePlan:
        return tile_plan_of(self.masks, sym.Q_IDX)

    def own(self, name: str) -> str:
        """The name, in a kernel, of this part's value of `name`."""
        return f"{name}{self.tag}"

    def tagged(self, expr: Any) -> Any:
        """An expression of this part with its own values renamed as in a kernel (see `own`)."""
        if not self.tag:
            return expr
        return expr.xreplace({s: sympy.Symbol(self.own(s.name), real=True) for s in self._own_symbols})

    @cached_property
    def _own_symbols(self) -> frozenset[sympy.Symbol]:
        own = {S, sym.QK, LSE, DELTA}
        steps: list[Sweep | Online] = [*self.online.before, self.online]
        for step in steps:
            own |= {*step.max_symbols, *map(renamed, step.max_symbols), *(r.symbol for r in step.sums)}
        for sweep in self.online.before:
            if sweep.root is not None:
                name = sweep.root.symbol.name
                own |= {sympy.Symbol(n, real=True) for n in (name, f"{name}_slope", f"{name}_value")}
        if self.has_backward is None:
            backward = self.backward
            own |= {s for s, _ in (*backward.saved, *backward.parts, *backward.cotangents)}
        return frozenset(own)

    @cached_property
    def by_reverse(self) -> bool:
        """Whether a gradient passes through row statistics. Those are then stored as -inf for fully masked rows."""
        return needs_reverse(self.core, self.online)

    @cached_property
    def only_triton(self) -> str:
        """Why only the Triton backend has this forward; "" if Gluon has it, too."""
        if any(part.online.before for part in self.parts):
            return "Gluon kernels go over the keys once, and this plan has several passes"
        if any(first_at(m).name in dict(part.stored) for part in self.parts for m in part.online.max_symbols):
            return "Gluon kernels do not keep where a row maximum is, which this backward needs"
        return ""

    @cached_property
    def whole_rows(self) -> str:
        """Why the keys of a row cannot be split among several programs; "" if they can."""
        several = any(part.online.before for part in self.parts)
        return "each pass over the keys needs what the one before it found over all of them" if several else ""

    @cached_property
    def stored(self) -> tuple[tuple[str, sympy.Expr], ...]:
        """The row statistics that the forward writes: those that determine the weight, and lse if there is one."""
        if len(self.parts) > 1:
            return tuple((part.own(name), e) for part in self.parts for name, e in part.stored)
        rows = [(s.name, e) for s, e in normal_form(self.online).saved]
        if self.by_reverse and self.has_backward is None:
            rows += [(s.name, e) for s, e in self.backward.saved if s.name not in dict(rows)]
        if self.online.lse is not None and LSE.name not in dict(rows):
            rows.append((LSE.name, self.online.lse))
        return tuple(rows)

    @property
    def has_lse(self) -> bool:
        """Whether there is a single lse that can be an output; several branches have one each."""
        return len(self.parts) == 1 and self.online.lse is not None

    @cached_property
    def saved_names(self) -> tuple[str, ...]:
        """The stored rows that the backward reads."""
        return tuple(part.own(s.name) for part in self.parts for s, _ in part.backward.saved)

    @cached_property
    def shares(self) -> tuple[str, ...]:
        """The names of the branches' contributions to `out`, all but the first's, which are saved for the backward if
        it needs a delta per branch. The delta of the first branch is that of `out` minus theirs."""
        needed = len(self.parts) > 1 and self.has_backward is None and self.needs_delta
        return tuple(part.own("share") for part in self.parts[1:]) if needed else ()

    @cached_property
    def needs_delta(self) -> bool:
        return any(part.backward.needs_delta or part.backward.sweep_needs_delta for part in self.parts)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names, in the kernels, of the values per key that a sweep of the backward computes."""
        return tuple(c.symbol.name for part in self.parts for c in part.backward.columns)

    @cached_property
    def results(self) -> tuple[str, ...]:
        """The results of the forward after `out`: row statistics, then rows as wide as those of `out`."""
        return (*(name for name, _ in self.stored), *self.shares)

    @cached_property
    def saved(self) -> tuple[str, ...]:
        """The results that the backward reads."""
        return (*self.saved_names, *self.shares)

    @cached_property
    def gradients(self) -> tuple[InputGradient, ...]:
        """The gradients of inputs, one per differentiable element read."""
        refuse_gradients(self.graph)
        found: list[InputGradient] = []
        for i, part in enumerate(self.parts):
            reads = [(r, e, False) for r, e in part.backward.dreads] + [
                (r, e, True) for r, e in part.backward.row_dreads
            ]
            for read, expr, row_only in reads:
                own = read.input in self.similarity.own
                found.append(InputGradient(read, expr, _kind(read), len(found), i, row_only, own))
        return tuple(found)

    @cached_property
    def packs_heads(self) -> bool:
        """Whether the query heads of a group can be rows of one tile: values derived from keys, and scanned loop
        bounds, must be the same for all of them."""
        by_head = any(sym.H in dot.right.free_symbols for dot in self.similarity.dots)
        return not by_head and not (self.over_keys.scanned and self.over_keys.by_head)

    @cached_property
    def one_loop(self) -> bool:
        """Whether dK/dV can visit the tiles of all query heads of a group in one loop: their bounds must be the same,
        and nothing may be summed per head."""
        by_key = any(g.kind == "col" for g in self.gradients) or loops_by_key(self.graph) or self.columns
        return not self.over_queries.by_head and not by_key


def _kind(read: Read) -> str:
    symbols = read.free_symbols
    along_q, along_kv = sym.Q_IDX in symbols, sym.KV_IDX in symbols
    if not along_q and not along_kv:
        return "program"
    if not along_kv:
        return "row"
    if not along_q:
        return "col"
    if by_distance(read):
        return "band"
    return "tile"
