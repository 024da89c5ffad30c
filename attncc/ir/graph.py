"""The IR: one typed graph of stages per variant. Its grammar:

    graph  := inputs, scalars, stages, outputs
    input  := name, pattern (b | h | h_kv | q_idx | kv_idx | a free dimension)* d?, float | int, grad
    scalar := name, default (int | float)
    stage  := name = sum_d(expr)                    a sum over the head dimension, of q_vec, k_vec and vector inputs
            | name = pair expr                      raw_score, score, mask, weight: one value per (query, key) pair
            | name = row.max(expr) | row.sum(expr)  one value per query, over the keys that it sees
            | name = row.root(t: row.sum(expr) + expr, lo, hi)  one value per query: the t that makes the sum 0
            | name = col.max(expr) | col.sum(expr)  one value per key, over the queries that see it
            | out  = row.sum(expr * v_vec)          the output row
            | update = scan(expr)                   for a recurrence: the state after a token, from that before it
            | out    = read(expr)                   and the output that the token's query reads from it
    output := an auxiliary output besides `out`: see `ir.outputs`; a graph may have none

A variant may have several branches: each has its own stages, named `score[0]`, `score[1]` and so on, and `out` is
linear in their weights. If v is the first elements of k, `value` is their number. `dead_rows` says what a fully masked
row does: it gives 0 ("zero"), it sees all keys ("open"), or it weighs all keys equally ("uniform").

A recurrence has only the two stages `update` and `out`, elementwise expressions over the matrix `state`, which has a
row per component of k_vec and a column per component of v_vec; sum_d adds over the rows.

An expr is a sympy expression over the symbols of `ir.symbols`, the functions of `ir.vocabulary`, and the names of
earlier stages. An edge runs from the stage that defines a name to each stage that uses it. A graph is frozen; passes
make new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from graphlib import TopologicalSorter
from typing import Any

import sympy

from attncc.errors import Span
from attncc.ir import symbols as sym
from attncc.ir.outputs import Output
from attncc.ir.vocabulary import Read, type_of

#: dimensions an input may be indexed by, besides free ones
LOOP_DIMS = ("b", "h", "h_kv", "q_idx", "kv_idx")
#: the last dimension of an input that the similarity reads as a vector: as large as the head dimension of q and k
HEAD_DIM = "d"


@dataclass(frozen=True)
class InputDecl:
    """A tensor that a formula reads. `pattern` names its dimensions: loop indices (whose sizes are checked) or free
    names.

    `captured`: the default is a tensor of the user's own, which gets its gradient as if it were passed. `beyond`: the
    value in a kernel's tile past the edge of the tensor."""

    name: str
    pattern: tuple[str, ...]
    dtype: str = "float"
    grad: bool = False
    default: Callable[[dict[str, int]], Any] | None = field(default=None, compare=False)
    captured: bool = field(default=False, compare=False)
    beyond: int = 0

    @property
    def is_vector(self) -> bool:
        """Whether it has an entry per component of the head dimension, so that a similarity may read it as a vector."""
        return self.pattern[-1:] == (HEAD_DIM,)


@dataclass(frozen=True)
class ScalarDecl:
    """A number bound at call time. An int default makes it an integer."""

    name: str
    default: int | float

    @property
    def is_int(self) -> bool:
        return isinstance(self.default, int)


@dataclass(frozen=True)
class Stage:
    """One named value. Its `op` is

    - None: a value per pair;
    - "max", "sum": a reduction over the visible keys of a row; "root": a row value whose `expr` is a `vocabulary.Root`;
    - "col_max", "col_sum": a reduction over the queries that see a key;
    - "sum_d": a sum over the head dimension;
    - "scan", "read": the two stages of a recurrence;
    - "combine": the combination of the output rows of a hybrid's parts."""

    name: str
    expr: sympy.Basic
    op: str | None = None
    span: Span | None = field(default=None, compare=False)

    @property
    def type(self) -> str:
        return {"out": "vector", "update": "matrix"}.get(self.name) or type_of(self.expr)


class VariantGraph:
    """An immutable variant: declarations, and stages that form a directed acyclic graph."""

    def __init__(
        self,
        name: str,
        stages: Iterable[Stage],
        inputs: Iterable[InputDecl] = (),
        scalars: Iterable[ScalarDecl] = (),
        cites: str = "",
        branches: int = 1,
        outputs: Iterable[Output] = (),
        value: int | None = None,
        dead_rows: str = "zero",
    ):
        self.name = name
        self.dead_rows = dead_rows
        self.branches = branches
        self.value = value
        self.cites = cites
        self.inputs = tuple(sorted(inputs, key=lambda d: d.name))
        self.scalars = tuple(sorted(scalars, key=lambda d: d.name))
        self.outputs = tuple(sorted(outputs, key=lambda o: o.name))
        self._given = {stage.name: stage for stage in stages}
        # values that every call needs are computed here, because torch.compile cannot trace a cached property
        found = [s.expr.atoms(Read) for s in self._given.values()]
        #: the inputs that are read as vectors over the head dimension
        self.vectors = frozenset(r.input for reads in found for r in reads if sym.COMPONENT in r.index)
        #: whether the variant is a recurrence: a state from token to token, without pairs
        self.recurrent = "update" in self._given
        #: whether any stage uses `scale`
        self.has_scale = any(sym.SCALE in s.expr.free_symbols for s in self._given.values())

    def changed(
        self,
        *,
        name: str | None = None,
        stages: Iterable[Stage] | None = None,
        inputs: Iterable[InputDecl] | None = None,
        scalars: Iterable[ScalarDecl] | None = None,
        outputs: Iterable[Output] | None = None,
        value: int | None = None,
        dead_rows: str | None = None,
    ) -> VariantGraph:
        """A copy with other stages, declarations or outputs; everything else is the same."""
        return VariantGraph(
            self.name if name is None else name,
            self.stages if stages is None else stages,
            self.inputs if inputs is None else inputs,
            self.scalars if scalars is None else scalars,
            self.cites,
            branches=self.branches,
            value=self.value if value is None else value,
            dead_rows=self.dead_rows if dead_rows is None else dead_rows,
            outputs=self.outputs if outputs is None else outputs,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # cached properties are not copied: the copy computes them again
        own = (self.inputs, self.scalars, self.cites, self.branches, self.outputs, self.value, self.dead_rows)
        return VariantGraph, (self.name, tuple(self._given.values()), *own)

    def __getitem__(self, name: str) -> Stage:
        return self._given[name]

    def __contains__(self, name: str) -> bool:
        return name in self._given

    @cached_property
    def uses(self) -> dict[str, tuple[str, ...]]:
        """For each stage, the names of the stages that it uses."""
        found = {}
        for name, stage in self._given.items():
            found[name] = tuple(sorted(s.name for s in stage.expr.free_symbols if s.name in self._given))
        return found

    @cached_property
    def dag(self) -> Any:
        """The stages as a frozen networkx.DiGraph: a node carries its `stage`, an edge runs from a definition to a
        use."""
        import networkx as nx  # imported here: calls do not need it, and it takes a quarter of a second

        dag = nx.DiGraph()
        for name, stage in self._given.items():
            dag.add_node(name, stage=stage)
        dag.add_edges_from((used, name) for name, uses in self.uses.items() for used in uses)
        return nx.freeze(dag)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Topologically sorted, otherwise in the order given. CycleError: there is a cycle."""
        TopologicalSorter(self.uses).prepare()
        waiting, ordered = dict(self.uses), []
        while waiting:
            ready = next(name for name, uses in waiting.items() if not any(u in waiting for u in uses))
            del waiting[ready]
            ordered.append(self[ready])
        return tuple(ordered)

    @cached_property
    def rows(self) -> tuple[Stage, ...]:
        """The row reductions, without `out`."""
        return tuple(s for s in self.stages if s.op in ("max", "sum", "root") and s.name != "out")

    @cached_property
    def cols(self) -> tuple[Stage, ...]:
        """The reductions over the queries that see a key."""
        return tuple(s for s in self.stages if s.op in ("col_max", "col_sum"))

    @cached_property
    def sums_d(self) -> tuple[Stage, ...]:
        """The sums over the head dimension except qk, which has no stage."""
        return tuple(s for s in self.stages if s.op == "sum_d")

    @cached_property
    def has_dot(self) -> bool:
        """Whether dot(q_vec, k_vec) is part of the similarity."""
        return sym.QK in self["raw_score"].expr.free_symbols

    @cached_property
    def parts(self) -> tuple[VariantGraph, ...]:
        """One graph per branch, with the plain stage names: variants of their own, whose output rows add up to
        `out`."""
        return split(self) if self.branches > 1 else (self,)

    def output(self, name: str) -> Output:
        """The auxiliary output of that name; KeyError if there is none."""
        found = {o.name: o for o in self.outputs}
        return found[name]

    def select(self, names: Iterable[str]) -> VariantGraph:
        """The graph with only these auxiliary outputs, and the inputs and scalars that it then reads."""
        outputs = [self.output(name) for name in names]
        used = {s.name for stage in self.stages for s in stage.expr.free_symbols}
        used |= {s.name for output in outputs for s in output.free_symbols}
        inputs = [d for d in self.inputs if d.name in used]
        scalars = [d for d in self.scalars if d.name in used]
        return self.changed(inputs=inputs, scalars=scalars, outputs=outputs)

    @cached_property
    def core(self) -> VariantGraph:
        """The graph without auxiliary outputs and without inputs that no stage reads: the part that computes `out`."""
        plain = self.select(())
        return plain if self.outputs or len(plain.inputs) < len(self.inputs) else self

    def input(self, name: str) -> InputDecl:
        return next(d for d in self.inputs if d.name == name)

    @cached_property
    def reads(self) -> tuple[Read, ...]:
        """Every distinct element read of an input, in a fixed order."""
        found: dict[Read, None] = {}
        for stage in self.stages:
            for read in sorted(stage.expr.atoms(Read), key=str):
                found.setdefault(read)
        return tuple(found)

    @cached_property
    def digest(self) -> str:
        """Identifies the mathematics: equal for two forms of one variant, whatever their names."""
        import hashlib

        from attncc.ir.text import to_text

        return hashlib.sha256(to_text(self, header=False).encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VariantGraph) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def tagged(stages: Iterable[Stage], branch: int) -> tuple[Stage, ...]:
    """A branch's stages, with their names in a graph of several branches."""
    stages = tuple(stages)
    names = {sym.QK, *(sympy.Symbol(s.name, real=True) for s in stages)}
    moved = {symbol: sym.of_branch(symbol, branch) for symbol in names}
    return tuple(replace(s, name=f"{s.name}[{branch}]", expr=s.expr.xreplace(moved)) for s in stages)


def split(graph: VariantGraph) -> tuple[VariantGraph, ...]:
    """The inverse of `tagged` for every branch, each with its own share of `out`."""
    parts = []
    factor = graph["out"].expr.coeff(sym.V_VEC)
    for branch in range(graph.branches):
        suffix = f"[{branch}]"
        own = [s for s in graph.stages if s.name.endswith(suffix)]
        moved = {sym.of_branch(sym.QK, branch): sym.QK}
        moved |= {sympy.Symbol(s.name, real=True): sympy.Symbol(s.name.removesuffix(suffix), real=True) for s in own}
        stages = [replace(s, name=s.name.removesuffix(suffix), expr=s.expr.xreplace(moved)) for s in own]
        share = factor.diff(sym.of_branch(sym.WEIGHT, branch)) * sym.WEIGHT
        stages.append(replace(graph["out"], expr=share * sym.V_VEC))
        parts.append(VariantGraph(f"{graph.name}{suffix}", stages, graph.inputs, graph.scalars))
    return tuple(parts)
