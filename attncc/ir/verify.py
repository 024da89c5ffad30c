"""Check that a graph is well formed. All passes rely on these invariants; a pass that breaks one has a bug."""

from __future__ import annotations

from graphlib import CycleError

import sympy

from attncc.errors import SpecError
from attncc.ir import symbols as sym
from attncc.ir.graph import Stage, VariantGraph
from attncc.ir.outputs import OPS, Output
from attncc.ir.text import formula
from attncc.ir.vocabulary import NODES, Read, type_of

_REQUIRED = ("raw_score", "score", "mask", "weight", "out")
_EXPECTED = {"mask": "bool"}


def verify(graph: VariantGraph) -> None:
    """Raise SpecError unless the graph is acyclic, typed, closed over its declarations, and linear in v_vec."""
    if graph.branches > 1:
        for part in graph.parts:
            verify(part)
        return
    if graph.recurrent:
        _verify_recurrence(graph)
        return
    for name in _REQUIRED:
        if name not in graph:
            raise SpecError(f"the graph has no stage '{name}'")
    try:
        stages = graph.stages
    except CycleError as error:
        cycle = " -> ".join(error.args[1][:-1])
        raise SpecError(f"the stages depend on each other in a circle: {cycle}") from None
    declared = {d.name for d in graph.inputs} | {s.name for s in graph.scalars}
    names = {s.name for s in stages}
    indices = set(sym.INDICES)
    for stage in stages:
        allowed = declared | names | indices | _extra(stage)
        unknown = sorted(s.name for s in stage.expr.free_symbols if s.name not in allowed)
        if unknown:
            raise SpecError(f"'{unknown[0]}' is not defined", stage=stage.name, span=stage.span)
        expected = _EXPECTED.get(stage.name)
        if expected and type_of(stage.expr) != expected:
            raise SpecError(f"expected {expected}, got {type_of(stage.expr)}", stage=stage.name, span=stage.span)
        _verify_vocabulary(stage)
        _verify_reads(graph, stage)
        if stage.op == "max" and type_of(stage.expr) == "bool":
            raise SpecError("row.max of a boolean", stage=stage.name, span=stage.span)
    _verify_output(graph["out"])
    for output in graph.outputs:
        _verify_auxiliary(graph, output, declared | indices)


def _verify_recurrence(graph: VariantGraph) -> None:
    """Check a recurrence: the names that the new state, and the output read from it, may use."""
    declared = {d.name for d in graph.inputs} | {s.name for s in graph.scalars}
    token = declared | set(sym.INDICES) - {"q_idx", "q_len"} | {"state", "d_idx"}
    for stage, seen in ((graph["update"], {"k_vec", "v_vec"}), (graph["out"], {"q_vec", "scale"})):
        unknown = sorted(s.name for s in stage.expr.free_symbols if s.name not in token | seen)
        if unknown:
            raise SpecError(f"'{unknown[0]}' is not defined", stage=stage.name, span=stage.span)
        _verify_vocabulary(stage)
        _verify_reads(graph, stage)


def _extra(stage: Stage) -> set[str]:
    if stage.name == "raw_score":
        return {"qk", "scale"}
    if stage.op == "sum_d":
        return {"q_vec", "k_vec", "d_idx", "scale"}
    return {"v_vec"} if stage.name == "out" else set()


def _verify_vocabulary(stage: Stage) -> None:
    for node in sympy.preorder_traversal(stage.expr):
        if not isinstance(node, NODES):
            raise SpecError(f"'{formula(node)}' is not part of the vocabulary", stage=stage.name, span=stage.span)


def _verify_reads(graph: VariantGraph, stage: Stage) -> None:
    bare = {s.name for s in stage.expr.replace(lambda e: isinstance(e, Read), lambda e: sympy.S.Zero).free_symbols}
    for decl in graph.inputs:
        if decl.name in bare:
            raise SpecError(f"the input '{decl.name}' is used without an index", stage=stage.name, span=stage.span)
    for read in stage.expr.atoms(Read):
        decl = graph.input(read.input)
        if len(read.index) != len(decl.pattern):
            raise SpecError(
                f"'{decl.name}' has {len(decl.pattern)} dimensions, read with {len(read.index)}",
                stage=stage.name,
                span=stage.span,
            )
        for dim, index in zip(decl.pattern, read.index, strict=True):
            if any(s.name in ("score", "raw_score", "weight") for s in index.free_symbols) and decl.grad:
                raise SpecError(
                    f"'{decl.name}' is indexed by the score in dimension '{dim}', and wants a gradient",
                    stage=stage.name,
                    span=stage.span,
                    remedy="an index has no derivative; declare the input without grad",
                )


def _verify_output(out: Stage) -> None:
    factor = out.expr.coeff(sym.V_VEC)
    if sympy.expand(out.expr - factor * sym.V_VEC) != 0 or factor == 0 or factor.has(sym.V_VEC):
        raise SpecError(
            f"the output '{formula(out.expr)}' is not linear in v_vec",
            stage="reduction",
            span=out.span,
            remedy="write row.sum(weight * v_vec), or row.sum(weight * factor * v_vec)",
        )


#: by domain: the index that an output's own expression may use besides its reductions
_CELL_INDEX = {"row": sym.Q_IDX.name, "col": sym.KV_IDX.name}


def _verify_auxiliary(graph: VariantGraph, output: Output, program: set[str]) -> None:
    """Check an auxiliary output: reductions of pair expressions, and an expression over them that is no pair
    expression."""
    where = f"output '{output.name}'"
    pair = program | {sym.WEIGHT.name, sym.SCORE.name}
    cells = {r.symbol.name for r in output.reductions}
    varying = {sym.Q_IDX.name, sym.KV_IDX.name} - {_CELL_INDEX.get(output.domain.kind)}
    if not output.reductions:
        raise SpecError(f"the {where} reduces nothing", stage=where, span=output.span)
    for r in output.reductions:
        if r.op not in OPS[output.domain.kind]:
            raise SpecError(f"{output.domain.kind} has no reduction '{r.op}'", stage=where, span=output.span)
        if type_of(r.expr) == "bool":
            raise SpecError(f"{output.domain}.{r.op} of a boolean", stage=where, span=output.span)
        if type_of(r.when) != "bool":
            raise SpecError(f"expected a condition, got '{formula(r.when)}'", stage=where, span=output.span)
    checked = [(e, pair) for r in output.reductions for e in (r.expr, r.when)]
    for expr, allowed in (*checked, (output.expr, (program - varying) | cells)):
        stage = Stage(where, expr, span=output.span)
        unknown = sorted(s.name for s in expr.free_symbols if s.name not in allowed)
        if unknown:
            by_pair = unknown[0] in (sym.WEIGHT.name, sym.SCORE.name, sym.Q_IDX.name, sym.KV_IDX.name)
            raise SpecError(
                f"'{unknown[0]}' stands outside of the {output.domain} reductions"
                if by_pair
                else f"'{unknown[0]}' is not defined",
                stage=where,
                span=output.span,
                remedy=f"move it into the reduction: {output.domain}.sum(...)" if by_pair else None,
            )
        _verify_vocabulary(stage)
        _verify_reads(graph, stage)
