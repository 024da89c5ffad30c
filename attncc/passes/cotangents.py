"""Gradients through auxiliary outputs: the terms that their cotangents add to each pair.

An output is r = sum over the pairs of a cell of f(weight, score, inputs). Its cotangent dr adds dr[cell] * df/dweight
to the cotangent of the pair's weight (otherwise do . v), and dr[cell] * df/dscore to that of its score. The backward
kernels read the cotangent tensors as inputs indexed by the pair's cell. The delta of a row gains the sum of weight *
(the added terms), which takes one more light pass. For a maximum, only the pair that attains it has a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from attncc.errors import UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc
from attncc.ir.graph import InputDecl, VariantGraph
from attncc.ir.outputs import Domain, Output, Reduction, cell_symbol
from attncc.ir.vocabulary import Read
from attncc.passes.calculus import derivative
from attncc.passes.differentiate import PairCotangents
from attncc.passes.outputs import Named, Weight, named


@dataclass(frozen=True)
class Hidden:
    """A tensor that the backward reads besides the variant's inputs: the cotangent of a reduction, or the position of a
    maximum."""

    decl: InputDecl
    reduction: str  # the name of the reduction that it belongs to
    is_place: bool


@dataclass(frozen=True)
class Cotangents:
    """The backward of a graph with cotangents of some of its reductions.

    graph: the core with the hidden inputs; carry: the same with the one output whose light pass completes delta, or
    None if delta needs no more terms; extra: the terms added to each pair's cotangents.
    """

    graph: VariantGraph
    carry: VariantGraph | None
    hidden: tuple[Hidden, ...]
    extra: PairCotangents


def with_places(graph: VariantGraph) -> VariantGraph:
    """The graph with the position of every maximum over a row or a column, which the maximum's gradient needs."""
    added = []
    for output in graph.outputs:
        for entry in named((output,)):
            if _needs_place(output.domain, entry.reduction):
                place = replace(entry.reduction, symbol=cell_symbol("argmax", 0), op="argmax")
                added.append(Output(place_of(entry.name), output.domain, (place,), place.symbol))
    if not added:
        return graph
    return graph.changed(outputs=(*graph.outputs, *added))


def place_of(reduction: str) -> str:
    """The name of the output that holds the position of a maximum."""
    return f"{reduction}_place"


def _needs_place(domain: Domain, reduction: Reduction) -> bool:
    return reduction.op == "max" and domain.kind in ("row", "col")


@dataclass(frozen=True)
class Terms:
    """The terms that cotangents of reductions add to a pair's cotangents of the weight, of the score and of element
    reads, as expressions over WEIGHT and SCORE."""

    of_weight: sympy.Expr
    of_score: sympy.Expr
    of_reads: tuple[tuple[Read, sympy.Expr], ...]
    hidden: tuple[Hidden, ...]


def terms(graph: VariantGraph, given: tuple[str, ...]) -> Terms:
    """The terms for cotangents of the reductions in `given` (named as in `passes.outputs.named`).

    Raises UnsupportedError for a reduction whose gradient is not derived.
    """
    domains = {o.name: o.domain for o in graph.outputs}
    taken = {d.name for d in graph.inputs} | {s.name for s in graph.scalars}
    hidden: list[Hidden] = []
    of_weight = of_score = sympy.S.Zero
    of_reads: dict[Read, sympy.Expr] = {}
    differentiable = {d.name for d in graph.inputs if d.grad}
    for entry in named(graph.outputs):
        if entry.name not in given:
            continue
        expr = entry.reduction.expr
        factor = _factor(domains[entry.output], entry, hidden, taken)
        of_weight += factor * derivative(expr, sym.WEIGHT)
        of_score += factor * derivative(expr, sym.SCORE)
        for read in sorted(expr.atoms(Read), key=str):
            if read.input in differentiable:
                of_reads[read] = of_reads.get(read, sympy.S.Zero) + factor * derivative(expr, read)
    return Terms(of_weight, of_score, tuple(of_reads.items()), tuple(hidden))


def differentiable_outputs(graph: VariantGraph) -> dict[str, UnsupportedError | None]:
    """The float outputs, each with None, or the reason why no gradient through it is derived."""
    found: dict[str, UnsupportedError | None] = {}
    for output in graph.outputs:
        given = tuple(entry.name for entry in named((output,)) if not entry.reduction.is_int)
        if output.type == "int" or not given:
            continue
        try:
            terms(graph, given)
        except UnsupportedError as error:
            found[output.name] = error
        else:
            found[output.name] = None
    return found


def cotangents(graph: VariantGraph, weight: Weight, given: tuple[str, ...]) -> Cotangents:
    """The backward's graph for cotangents of these reductions. Raises UnsupportedError as `terms`."""
    found = terms(graph, given)
    decls = [*graph.inputs, *(h.decl for h in found.hidden)]
    name = f"{graph.name}, with cotangents of {', '.join(given)} of {graph.digest}"
    extra = PairCotangents(
        weight.expr,
        weight.of(found.of_weight),
        weight.of(found.of_score),
        tuple((read, weight.of(expr)) for read, expr in found.of_reads),
    )
    symbol = cell_symbol("sum", 0)
    missing = Output("carry", Domain("row"), (Reduction(symbol, "sum", sym.WEIGHT * found.of_weight),), symbol)
    plain, carry = (graph.changed(name=name, inputs=decls, outputs=outputs) for outputs in ((), (missing,)))
    return Cotangents(plain, carry if found.of_weight != 0 else None, found.hidden, extra)


def _factor(domain: Domain, entry: Named, hidden: list[Hidden], taken: set[str]) -> sympy.Expr:
    """The cotangent of the reduction at the pair's cell; 0 if the pair is not reduced."""
    reduction = entry.reduction
    if reduction.op == "max" and domain.kind == "block":
        raise UnsupportedError(
            f"the gradient of the output '{entry.output}' is not derived: the place of a maximum over {domain} is not "
            "kept",
            stage=f"output '{entry.output}'",
            remedy=f"detach it, or use {domain}.sum or row.max",
        )
    read = _hidden(domain, entry, f"d{entry.name}", "float", hidden, taken, is_place=False)
    conditions = [] if reduction.when is sympy.true else [reduction.when]
    if _needs_place(domain, reduction):
        place = _hidden(domain, entry, place_of(entry.name), "int", hidden, taken, is_place=True)
        along = sym.KV_IDX if domain.kind == "row" else sym.Q_IDX
        conditions.append(sympy.Eq(along, place))
    return voc.where(sympy.And(*conditions), read, sympy.S.Zero)


def _hidden(
    domain: Domain, entry: Named, name: str, dtype: str, hidden: list[Hidden], taken: set[str], is_place: bool
) -> Read:
    while name in taken:
        name += "_"
    taken.add(name)
    dims = ("rows", "kv_idx") if domain.kind == "pair" else domain.dims
    hidden.append(Hidden(InputDecl(name, ("b", "h", *dims), dtype), entry.name, is_place))
    return Read(sym.input_symbol(name, dtype == "int"), sym.B, sym.H, *domain.cell())
