"""Values that must be known before a variant's kernels run: which rows are fully masked, and column sums.

Both become inputs of an ordinary graph, computed as the lse of an auxiliary variant:

    dead_rows[b, h, q_idx]     where lse is -inf: the log of the number of keys that a row sees
    col_lse_i[b, h, kv_idx]    log col.sum(f): the lse of the transposed variant, whose queries are the keys

A maximum over the queries is only a shift: exp(s - col.max(s)) / col.sum(exp(s - col.max(s))) = exp(s - col_lse). The
term of a pair divided by the sum is a stage of its own, col_share_i: the gradient passes through the sum by way of it
(see `passes.columns`), and the computed lse is a constant.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sympy

from attncc.errors import UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir.graph import InputDecl, Stage, VariantGraph
from attncc.ir.text import formula
from attncc.ir.vocabulary import Read, attached, where
from attncc.passes.bounds import extent, numbers
from attncc.passes.numeric import evaluate
from attncc.passes.stream import stream

#: the input that marks rows which see no key
DEAD = "dead_rows"
#: added to a column sum without a maximum, so that a sum whose terms are all 0 has a log, with a gradient
_TINY = sympy.Float(2.0**-100)
_COLUMN = "col_lse_"
_SHARE = "col_share_"


def is_column_sum(name: str) -> bool:
    """Whether it is the name of an input with the log of a column sum. No user's input has such a name. In generated
    code the name may have a prefix (see `codegen.names`)."""
    return re.fullmatch(rf"(in_)?{_COLUMN}\d+", name) is not None


def shares(graph: VariantGraph) -> tuple[tuple[Read, sympy.Expr], ...]:
    """The column sums that a graph of `phases` reads: the read of each one's log, and a pair's share of the sum."""
    stages = {s.name: s.expr for s in graph.stages if s.name.startswith(_SHARE)}
    logs = {d.name.removeprefix("in_"): d.name for d in graph.inputs if is_column_sum(d.name)}
    return tuple((_log_of(logs[n.replace(_SHARE, _COLUMN)]), stages[n]) for n in sorted(stages))


def _log_of(name: str) -> Read:
    return Read(sym.input_symbol(name, False), sym.B, sym.H, sym.KV_IDX)


@dataclass(frozen=True)
class Made:
    """An input that is computed before the kernels run, from the lse of `graph`. `transposed`: the queries of `graph`
    are the keys, and the input is its lse; else the input is 1 where the lse is -inf."""

    name: str
    graph: VariantGraph
    transposed: bool


@dataclass(frozen=True)
class Phases:
    """The graph that the kernels compute, and its inputs besides the user's, in the order in which they are made."""

    main: VariantGraph
    made: tuple[Made, ...] = ()


def phases(graph: VariantGraph) -> Phases:
    """A graph in the form of the kernels. UnsupportedError for column reductions that are not such an lse."""
    if graph.dead_rows == "zero" and not graph.cols:
        return Phases(graph)
    main, made = graph.changed(dead_rows="zero"), []
    if graph.dead_rows != "zero" and graph["mask"].expr is not sympy.true:
        main, dead = _opened(graph)
        made.append(dead)
    if graph.cols:
        main, sums = _without_columns(main)
        made += sums
    return Phases(main, tuple(made))


def _opened(graph: VariantGraph) -> tuple[VariantGraph, Made]:
    """The graph whose mask reads dead rows from an input, and the description of that input."""
    mask = graph["mask"]
    seen = [
        Stage("raw_score", sympy.S.Zero),
        Stage("score", sym.RAW_SCORE),
        mask,
        Stage("row_sum_0", sympy.S.One, "sum"),
        Stage("weight", 1 / sym.row_symbol("sum", 0)),
        Stage("out", sym.WEIGHT * sym.V_VEC, "sum"),
    ]
    counts = VariantGraph(f"keys seen by rows of {graph.name}", seen, graph.inputs, graph.scalars).select(())
    is_dead = sympy.Ne(Read(sym.input_symbol(DEAD, True), sym.B, sym.H, sym.Q_IDX), 0)
    changes = {"mask": replace(mask, expr=sympy.Or(mask.expr, is_dead))}
    if graph.dead_rows == "uniform":
        _check_uniform(graph)
        score = graph["score"]
        changes["score"] = replace(score, expr=where(is_dead, sympy.S.One, score.expr))
    stages = [changes.get(s.name, s) for s in graph.stages]
    decl = InputDecl(DEAD, ("b", "h", "q_idx"), "int")
    return graph.changed(stages=stages, inputs=(*graph.inputs, decl), dead_rows="zero"), Made(DEAD, counts, False)


def _check_uniform(graph: VariantGraph) -> None:
    """Raise UnsupportedError unless n equal scores of 1 give n weights of 1 / n."""
    keys = 7
    values: dict[str, Any] = {"score": 1.0, "kv_len": keys, **{s.name: s.default for s in graph.scalars}}
    known = True
    for stage in (*graph.rows, graph["weight"]):
        unknown = {s.name for s in stage.expr.free_symbols} - set(values)
        if unknown or stage.op == "root" or stage.expr.atoms(Read):
            known = False
            break
        value = float(evaluate(stage.expr, values))
        values[stage.name] = keys * value if stage.op == "sum" else value
    if not known or abs(values["weight"] * keys - 1) > 1e-6:
        raise UnsupportedError(
            "dead_rows = 'uniform': it is not known that equal scores give equal weights that sum to 1",
            stage="normalizer",
            span=graph["weight"].span,
            remedy="use dead_rows = 'open', which shows such a row all keys",
        )


def _without_columns(graph: VariantGraph) -> tuple[VariantGraph, list[Made]]:
    """The graph with every column sum as an input, and the descriptions of these inputs."""
    known: dict[sympy.Symbol, sympy.Expr] = {}
    made: list[Made] = []
    decls: list[InputDecl] = []
    stages: list[Stage] = []
    for stage in graph.cols:
        if stage.op == "col_sum":
            name = f"{_COLUMN}{len(made)}"
            found, shift = _column(graph, stage, name)
            read = _log_of(name)
            known[sympy.Symbol(stage.name, real=True)] = sympy.exp(read - shift)
            made.append(found)
            decls.append(InputDecl(name, ("b", "h", "kv_idx")))
            share = _shifted(attached(stage.expr) * sympy.exp(shift - read))
            stages.append(Stage(f"{_SHARE}{len(made) - 1}", share, span=stage.span))
    for stage in graph.stages:
        if stage.op in ("col_max", "col_sum"):
            continue
        expr = _shifted(stage.expr.xreplace(known)) if stage.expr.free_symbols & known.keys() else stage.expr
        left = sorted(s.name for s in expr.free_symbols if sym.is_col_name(s.name))
        if left:
            raise UnsupportedError(
                f"'{formula(stage.expr)}' needs {left[0]} other than as the shift of a column sum's exponentials",
                stage="normalizer",
                span=stage.span,
                remedy="write p = exp(score - col.max(score)) and p / col.sum(p), or use no col.max",
            )
        stages.append(replace(stage, expr=expr))
    return graph.changed(stages=stages, inputs=(*graph.inputs, *decls)), made


def _shifted(expr: sympy.Expr) -> sympy.Expr:
    """The expression with products of exponentials merged into one, in which shifts cancel."""
    expr = expr.replace(lambda e: e.is_Mul, lambda e: sympy.powsimp(e, combine="exp"))
    return expr.replace(lambda e: isinstance(e, sympy.exp), lambda e: sympy.exp(sympy.expand(e.args[0])))


def _column(graph: VariantGraph, stage: Stage, name: str) -> tuple[Made, sympy.Expr]:
    """The input with the log of a column sum, and the shift of the sum's terms, by which this log is too large."""
    term = attached(stage.expr)
    scores = {sym.SCORE: sympy.Symbol(sym.SCORE.name, real=True)}
    if term != stage.expr or not (term.is_nonnegative or extent(term.xreplace(scores), numbers(graph)).lo >= 0):
        raise UnsupportedError(
            f"col.sum({formula(stage.expr)}): the terms of a column sum are positive, and none is held back",
            stage="normalizer",
            span=stage.span,
            remedy="sum a positive function of the score, such as exp(score - col.max(score)) or sigmoid(score)",
        )
    if any(sym.is_col_name(s.name) and "_sum_" in s.name for s in term.free_symbols):
        raise UnsupportedError(
            f"col.sum({formula(stage.expr)}) needs another column sum whole",
            stage="normalizer",
            span=stage.span,
            remedy="make it in a first op, from its lse, and hand it to a second op as an input",
        )
    maxima = [s for s in graph.cols if s.op == "col_max" and sympy.Symbol(s.name, real=True) in term.free_symbols]
    by_row = {sympy.Symbol(s.name, real=True): sym.row_symbol("max", i) for i, s in enumerate(maxima)}
    swapped = _swap(graph)
    rows = [Stage(by_row[sympy.Symbol(s.name, real=True)].name, swapped(s.expr), "max") for s in maxima]
    symbol, term = sym.row_symbol("sum", 0), swapped(term.xreplace(by_row))
    total = symbol if maxima else symbol + _TINY
    stages = [
        *(replace(s, name=_swapped_name(s.name), expr=swapped(s.expr)) for s in graph.sums_d),
        *(replace(graph[n], expr=swapped(graph[n].expr)) for n in ("raw_score", "score", "mask")),
        *rows,
        Stage(symbol.name, term, "sum", stage.span),
        Stage("weight", term / total, span=stage.span),
        Stage("out", sym.WEIGHT * sym.V_VEC, "sum"),
    ]
    inputs = [replace(d, pattern=tuple(map(_other_axis, d.pattern)), default=_swapped_sizes(d)) for d in graph.inputs]
    turned = VariantGraph(f"columns of {graph.name}", stages, inputs, graph.scalars).select(())
    online = stream(turned)
    if online.lse is None or online.before:
        raise UnsupportedError(
            f"col.sum({formula(stage.expr)}) has no online form",
            stage="normalizer",
            span=stage.span,
            remedy="write col.sum(exp(score - col.max(score))), or a sum without col.max",
        )
    back = {row: col for col, row in by_row.items()}
    return Made(name, turned, True), (online.lse - sympy.log(total)).xreplace(back)


_AXES = {"q_idx": "kv_idx", "kv_idx": "q_idx"}
_SYMBOLS = {
    sym.Q_IDX: sym.KV_IDX,
    sym.KV_IDX: sym.Q_IDX,
    sym.Q_LEN: sym.KV_LEN,
    sym.KV_LEN: sym.Q_LEN,
    sym.Q_VEC: sym.K_VEC,
    sym.K_VEC: sym.Q_VEC,
}


def _other_axis(dim: str) -> str:
    return _AXES.get(dim, dim)


def _swap(graph: VariantGraph) -> Callable[[Any], Any]:
    """A function that exchanges queries and keys in an expression of the graph."""
    names = {s: sympy.Symbol(_swapped_name(s.name), real=True) for s in _sums(graph)}

    def swapped(expr: Any) -> Any:
        if sym.H_KV in expr.free_symbols:
            raise UnsupportedError(
                f"'{formula(expr)}' reads h_kv, and columns are normalized for each query head",
                remedy="give the input an entry a query head, and index it by h",
            )
        return expr.xreplace({**_SYMBOLS, **names})

    return swapped


def _sums(graph: VariantGraph) -> list[sympy.Symbol]:
    return [sympy.Symbol(s.name, real=True) for s in graph.sums_d]


def _swapped_name(name: str) -> str:
    """The name of a sum over the head dimension after queries and keys are exchanged."""
    if name.startswith(("q_term_", "k_term_")):
        return ("k" if name[0] == "q" else "q") + name[1:]
    return name


def _swapped_sizes(decl: InputDecl) -> Callable[[dict[str, int]], Any] | None:
    """An input's default, as a function of sizes in which queries and keys are exchanged."""
    make = decl.default
    if make is None or decl.captured:
        return None
    return lambda sizes: make({_other_axis(name): size for name, size in sizes.items()})
