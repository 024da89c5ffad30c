"""Hybrids: several variants of the same q, k and v whose output rows are combined, as a window beside a memory.

near = ac.Variant(name="near", mask=ac.causal & ac.sliding_window(64))
layer = ac.Hybrid(
    parts={"near": near, "far": ac.variants.get("retention")},
    inputs={"gate": ac.Input("b", "h", "q_idx", grad=True)},
    combine=lambda near, far, b, h, q_idx, gate: far + ac.sigmoid(gate[b, h, q_idx]) * near,
)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy

from attncc.errors import Span, SpecError
from attncc.ir import symbols as sym
from attncc.ir.graph import InputDecl, ScalarDecl, Stage, VariantGraph
from attncc.ir.hybrid import HybridGraph
from attncc.ir.text import formula
from attncc.ir.vocabulary import Read
from attncc.language.places import return_span
from attncc.language.stages import SEES_PARTS, check_name, environment
from attncc.language.values import Value, fail, number
from attncc.language.variant import Input, Scalar, Variant, declarations, located, runner

#: by what the inputs of a combination are indexed: what an element of an output row knows of its place
DIMS = ("b", "h", "h_kv", "q_idx")
#: the combination as a function from the names it sees, and where it is
Evaluator = tuple[Callable[[dict[str, Any]], Any], Span | None]


class Hybrid:
    """Several variants of the same q, k and v, and an output that combines theirs, element by element.

    `parts` gives each variant a name. `combine` is a formula of the parts' output rows, by those
    names, of `b`, `h`, `h_kv`, `q_idx`, and of `inputs` and scalars of its own, which it reads at these indices. The
    inputs of all parts are inputs of the call; where several declare one it is the same tensor.
    Compiled, it is a HybridOp: each part has its own plan, and where all are causal a state goes in and out.
    Raises SpecError, with file, line and a caret, when the combination is wrong.
    """

    graph: HybridGraph

    def __init__(
        self,
        *,
        name: str = "hybrid",
        parts: Mapping[str, Variant],
        combine: Callable[..., Any],
        inputs: Mapping[str, Input | Scalar] | None = None,
        cites: str = "",
    ):
        self.name = name
        decls, scalars = declarations(inputs or {})
        evaluator = (located(runner(combine, "combine"), "combine"), return_span(combine))
        for key, part in parts.items():
            if not isinstance(part, Variant):
                raise SpecError(
                    f"the part '{key}' is of type {type(part).__name__}",
                    remedy="pass an ac.Variant; a shipped one is ac.variants.get(name)",
                )
        graphs = {key: part.graph for key, part in parts.items()}
        self.graph = assemble_hybrid(name, graphs, decls, scalars, evaluator, cites)

    @classmethod
    def from_graph(cls, graph: HybridGraph) -> Hybrid:
        """A Hybrid around a graph that was made elsewhere, such as by the text form."""
        self = cls.__new__(cls)
        self.name, self.graph = graph.name, graph
        return self

    @property
    def parts(self) -> dict[str, Variant]:
        """Its variants by their names here."""
        return {name: Variant.from_graph(graph) for name, graph in self.graph.parts}

    def __repr__(self) -> str:
        return f"<Hybrid {self.name} of {', '.join(self.parts)} {self.graph.digest}>"


def assemble_hybrid(
    name: str,
    parts: Mapping[str, VariantGraph],
    inputs: Mapping[str, InputDecl],
    scalars: Mapping[str, ScalarDecl],
    combine: Evaluator,
    cites: str = "",
) -> HybridGraph:
    """Run the combination on the names that it sees and build the graph. Raises SpecError where something is wrong."""
    if len(parts) < 2:
        raise SpecError(
            f"a hybrid has two parts or more, and this has {len(parts)}", remedy="one alone is an ac.Variant"
        )
    for key, graph in parts.items():
        check_name(key, "part")
        if key in inputs or key in scalars:
            raise SpecError(f"'{key}' names a part and an input", remedy="rename one of them")
        if graph.value is not None or graph.branches > 1:
            reason = "takes its values from k" if graph.value is not None else f"has {graph.branches} branches in q"
            raise SpecError(f"the part '{key}' {reason}, and parts share q, k and v", remedy="call it by itself")
    _check_shared({**parts, "combine": VariantGraph(name, (), inputs.values(), scalars.values())})
    function, span = combine
    given = environment(inputs, scalars)
    hidden = set(sym.INDICES) - set(SEES_PARTS["combine"])
    rows = {key: sympy.Symbol(key, real=True) for key in parts}
    seen = {n: v for n, v in given.items() if n not in hidden} | {key: Value(row) for key, row in rows.items()}
    try:
        expr = number(function(seen))
        _check_reads(expr, {d.name: d for d in inputs.values()})
        names = {s.name for s in expr.free_symbols}
        for unused in [key for key in (*parts, *inputs, *scalars) if key not in names]:
            fail(f"'{unused}' is declared, but the combination does not read it", "read it, or drop it")
    except SpecError as error:
        raise error.at(span, "combine") from None
    combined = VariantGraph(name, [Stage("out", expr, "combine", span)], inputs.values(), scalars.values(), cites)
    return HybridGraph(name, tuple(parts.items()), combined, cites)


def _check_shared(graphs: Mapping[str, VariantGraph]) -> None:
    """SpecError where two declare one name differently, for a call has one tensor of that name."""
    known: dict[str, tuple[str, InputDecl | ScalarDecl]] = {}
    for key, graph in graphs.items():
        own: list[InputDecl | ScalarDecl] = [*graph.inputs, *graph.scalars]
        for decl in own:
            first, other = known.setdefault(decl.name, (key, decl))
            if other != decl:
                raise SpecError(f"'{first}' and '{key}' declare '{decl.name}' differently", remedy="rename one of them")


def _check_reads(expr: sympy.Expr, inputs: Mapping[str, InputDecl]) -> None:
    """SpecError where the combination uses its place otherwise than to read what an input has there."""
    symbols = {sym.B: "b", sym.H: "h", sym.H_KV: "h_kv", sym.Q_IDX: "q_idx"}
    for read in expr.atoms(Read):
        pattern = inputs[read.input].pattern
        if any(dim not in DIMS for dim in pattern) or tuple(symbols.get(i) for i in read.index) != pattern:
            fail(
                f"'{formula(read)}': a combination reads what an input has at the place of the row",
                f"index it by {', '.join(DIMS)}, as they stand, and declare it with these",
            )
    if sym.Q_IDX in expr.xreplace({read: sympy.Dummy() for read in expr.atoms(Read)}).free_symbols:
        fail(
            "the combination computes with q_idx, which counts the tokens of a call", "read an input there: gate[q_idx]"
        )
