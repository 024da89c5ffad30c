"""Calls that continue earlier ones: which keys must be kept, so that later tokens see what they would see in one call.

In one call over all tokens, query i is token i. In a call that continues, the keys begin with those that were kept, and
the queries are the last tokens: the query's token is q_idx + kv_len - q_len. A formula has the same value in both if it
depends only on how far a key is behind its query. It may count keys from the first one as long as none is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from attncc.errors import UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc
from attncc.ir.graph import InputDecl, Stage, VariantGraph
from attncc.ir.text import formula
from attncc.ir.vocabulary import Read
from attncc.passes.tiles import disjunction, solve

#: the query's token, in a call whose queries are the last tokens
_PLACE = sym.Q_IDX + sym.KV_LEN - sym.Q_LEN
#: how far the key is behind the query
_BEHIND = sympy.Symbol("behind", integer=True)
#: the input that has, for each token, the number of its packed sequence
SEQUENCE = "packed_sequence"


@dataclass(frozen=True)
class Continuation:
    """A variant for calls that continue earlier ones.

    reach: the largest number of keys before its own token that a query sees, an expression of scalars; None if it may
    see all, so that all are kept. by_key: the inputs with an entry per key, which are kept with the keys.
    """

    graph: VariantGraph
    reach: sympy.Expr | None
    by_key: tuple[str, ...]


def continuation(graph: VariantGraph) -> Continuation:
    """The continuation of a variant of pairs. UnsupportedError, with the stage, if there is none."""
    placed = _placed(graph)
    reach = _reach(placed["mask"])
    for stage in placed.stages:
        _check(placed, stage, dropped=reach is not None)
    by_key = tuple(d.name for d in graph.inputs if "kv_idx" in d.pattern)
    for name in by_key:
        if "q_idx" in graph.input(name).pattern:
            raise _refusal(graph["score"], f"'{name}' has an entry for each pair, which later queries lack")
    return Continuation(placed, reach, by_key)


def packed(graph: VariantGraph) -> VariantGraph:
    """The variant over packed sequences, of which none sees another. The input SEQUENCE has the number of each token's
    sequence. UnsupportedError if formulas count tokens from the first."""
    placed = _placed(graph)
    for stage in placed.stages:
        _check(placed, stage, dropped=True)
    of = sym.input_symbol(SEQUENCE, True)
    same = sympy.Eq(Read(of, sym.B, _PLACE), Read(of, sym.B, sym.KV_IDX))
    mask = placed["mask"]
    stages = [
        Stage("mask", sympy.And(mask.expr, same), span=mask.span) if s.name == "mask" else s for s in placed.stages
    ]
    inputs = [*placed.inputs, InputDecl(SEQUENCE, ("b", "kv_idx"), "int")]
    return placed.changed(name=f"{graph.name}_packed", stages=stages, inputs=inputs)


def _placed(graph: VariantGraph) -> VariantGraph:
    """The graph with q_idx replaced by the query's token, except in the index of an input with an entry per query."""
    for stage in graph.stages:
        if stage.op in ("col_max", "col_sum"):
            raise _refusal(stage, "it normalizes over queries, and later ones would change what earlier ones gave")
        if stage.expr.atoms(voc.cumsum):
            raise _refusal(stage, "it sums an input along all tokens")
    if graph.dead_rows != "zero":
        raise _refusal(graph["mask"], f"rows that see no key are '{graph.dead_rows}': they see all keys")
    patterns = {d.name: d.pattern for d in graph.inputs}

    def moved(expr: sympy.Basic) -> sympy.Basic:
        if isinstance(expr, Read):
            by_query = [dim == "q_idx" for dim in patterns[expr.input]]
            own = zip(expr.index, by_query, strict=True)
            return expr.func(expr.args[0], *(i if kept and i == sym.Q_IDX else moved(i) for i, kept in own))
        if not expr.args:
            return {sym.Q_IDX: _PLACE, sym.Q_LEN: sym.KV_LEN}.get(expr, expr)
        return expr.func(*(moved(a) for a in expr.args))

    stages = [Stage(s.name, moved(s.expr), s.op, s.span) for s in graph.stages]
    return graph.changed(stages=stages, outputs=())


def _reach(mask: Stage) -> sympy.Expr | None:
    """How far back the mask shows keys, if scalars determine it, else None. UnsupportedError if it shows later keys."""
    reach: sympy.Expr = sympy.S.Zero
    for term in disjunction(mask.expr) or [()]:
        bounds = [bound for atom in term for bound in solve(atom, sym.KV_IDX) or []]
        if sympy.false in term:
            continue
        if not any(side == "hi" and _distance(bound).is_nonnegative for side, bound in bounds):
            raise _refusal(mask, "a query may see keys of later tokens")
        back = [_distance(bound) for side, bound in bounds if side == "lo"]
        scalars = [b for b in back if not b.free_symbols & set(sym.INDICES.values()) and not b.atoms(Read)]
        if not scalars:
            return None
        nearest = scalars[0]
        for other in scalars[1:]:
            nearest = voc.minimum(nearest, other)
        reach = nearest if reach == 0 else voc.maximum(reach, nearest)
    return reach


def _distance(bound: sympy.Expr) -> sympy.Expr:
    """How far a bound on kv_idx is behind the query."""
    return sympy.expand(_PLACE - bound)


def _check(graph: VariantGraph, stage: Stage, dropped: bool) -> None:
    """UnsupportedError if a stage changes its value when keys are `dropped`, or when more keys are appended."""
    behind = {sym.Q_IDX: sym.KV_IDX + _BEHIND - sym.KV_LEN + sym.Q_LEN}
    patterns = {d.name: d.pattern for d in graph.inputs}
    for read in stage.expr.atoms(Read):
        for dim, index in zip(patterns[read.input], read.index, strict=True):
            if dim == "q_idx":
                if index != sym.Q_IDX:
                    raise _refusal(stage, f"{formula(read)} reads what another query has")
                continue
            moving = index.xreplace(behind) - (sym.KV_IDX if dim == "kv_idx" else 0)
            _check_names(stage, _names(moving), dropped)
    values = stage.expr.xreplace({read: sympy.Dummy() for read in stage.expr.atoms(Read)})
    _check_names(stage, _names(values.xreplace(behind)), dropped)


def _check_names(stage: Stage, names: set[sympy.Symbol], dropped: bool) -> None:
    if names & {sym.KV_LEN, sym.Q_LEN}:
        raise _refusal(stage, "it asks how many tokens there are, and more may come")
    if dropped and sym.KV_IDX in names:
        raise _refusal(stage, "it counts tokens from the first, and those that no query sees any more are dropped")


def _names(expr: sympy.Basic) -> set[sympy.Symbol]:
    """The symbols that a value depends on, without those that cancel in sums and comparisons."""
    if isinstance(expr, sympy.core.relational.Relational):
        return _names(expr.lhs - expr.rhs)
    if isinstance(expr, sympy.Add | sympy.Mul):
        expr = sympy.expand_mul(expr)
    if isinstance(expr, sympy.Symbol):
        return {expr}
    return set().union(*(_names(a) for a in expr.args))


def _refusal(stage: Stage, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"no call can go on from another: {reason}",
        stage=stage.name,
        span=stage.span,
        remedy="pass whole sequences, without states and cu_seqlens, or ask how far a key is behind its query",
    )
