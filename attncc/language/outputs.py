"""Auxiliary outputs: the ready-made ones, and the translation of a formula to an output of the graph.

    ac.Variant(..., outputs={"entropy": ac.outputs.entropy,
                             "recent": lambda weight, row, q_idx, kv_idx: row.sum(weight, q_idx - kv_idx < 64)})
    out, entropy = op(q, k, v, outputs=("out", "entropy"))

A formula may use weight, score, the indices, the variant's inputs, and `row`, `col`, `offset`, `block`, `pair`, which
reduce over the visible pairs of a query, a key, a distance, a block, or one pair. For a weight below 2^-126, including
0, `log(weight)` is log(2^-126), so that weight * log(weight) is 0 there.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy

from attncc.errors import Span, SpecError
from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc
from attncc.ir.graph import InputDecl
from attncc.ir.outputs import LIMIT, Domain, Output, Reduction, cell_symbol
from attncc.ir.text import formula, ordered_text
from attncc.language import functions as fn
from attncc.language.combinators import Mask, Piece, ScoreMod, call_by_name
from attncc.language.reducers import Made, reducers
from attncc.language.values import Value, fail, number


class OutputSpec(Piece):
    """An output's formula, with the inputs that it brings along."""

    stage = "output"

    @classmethod
    def of(cls, x: Any) -> OutputSpec:
        """From an OutputSpec, or a function whose parameters are names that an output sees."""
        if isinstance(x, OutputSpec):
            return x
        if callable(x) and not isinstance(x, Mask | ScoreMod):
            return cls(lambda env: call_by_name(x, env, "output"), label=getattr(x, "__name__", "output"))
        fail(f"{type(x).__name__} is no output", "it is a function of weight and row, or one of ac.outputs")


def _ready(function: Callable[..., Any]) -> OutputSpec:
    made = OutputSpec.of(function)
    made.__doc__ = function.__doc__
    return made


@_ready
def entropy(weight: Any, row: Any) -> Any:
    """(B, Hq, M): the entropy of each row in nats, -sum w log w, for nonnegative weights."""
    return -row.sum(weight * fn.log(weight))


@_ready
def row_max(score: Any, row: Any) -> Any:
    """(B, Hq, M): the largest score of each row; -inf for a fully masked row."""
    return row.max(score)


@_ready
def argmax(weight: Any, row: Any) -> Any:
    """(B, Hq, M), int64: the key with the largest weight, the first of several; -1 for a fully masked row."""
    return row.argmax(weight)


@_ready
def top1_prob(weight: Any, row: Any) -> Any:
    """(B, Hq, M): the largest weight of each row; -inf for a fully masked row."""
    return row.max(weight)


def row_mass(where: int | Callable[..., Any] | Mask = 0, stop: int | None = None) -> OutputSpec:
    """(B, Hq, M): the weight that each row puts on the keys where:stop (a slice), or on those that a condition names.

    `row_mass(0, 128)` is of the first 128 keys. A condition is a mask, or a function of the names that a mask sees:
    `row_mass(lambda b, kv_idx, segment: segment[b, kv_idx] == 2)`.
    """
    if callable(where) or isinstance(where, Mask):
        mask = Mask.of(where)
        return OutputSpec(
            lambda e: e["row"].sum(e["weight"], mask.run(e)), mask.inputs, mask.scalars, f"row_mass({mask.label})"
        )
    start = where
    return OutputSpec(
        lambda e: e["row"].sum(e["weight"], _between(e["kv_idx"], e["kv_len"], start, stop)),
        label=f"row_mass({start}, {stop})",
    )


def segment_mass(value: int, segment: str = "segment") -> OutputSpec:
    """(B, Hq, M): the weight on the keys of one segment. `segment` names an integer input [b, kv_idx]."""
    decl = InputDecl(segment, ("b", "kv_idx"), "int")
    return OutputSpec(
        lambda e: e["row"].sum(e["weight"], e[segment][e["b"], e["kv_idx"]] == value),
        {segment: decl},
        label=f"segment_mass({value})",
    )


@_ready
def received(weight: Any, col: Any) -> Any:
    """(B, Hq, N): the weight that each key receives, summed over the queries of one query head."""
    return col.sum(weight)


def column_mean(start: int | None = None, stop: int | None = None) -> OutputSpec:
    """(B, Hq, N): the mean weight of each key over the queries start:stop that see it, as a slice has them.

    `column_mean(-32)` is of the last 32 queries.
    """
    return OutputSpec(
        lambda e: e["col"].mean(e["weight"], _between(e["q_idx"], e["q_len"], start, stop)),
        label=f"column_mean({start}, {stop})",
    )


def block_sums(m: int, n: int, limit: int = LIMIT) -> OutputSpec:
    """(B, Hq, ceil(M / m), ceil(N / n)): the weight in each block of m queries by n keys."""
    return OutputSpec(lambda e: e["block"](m, n, limit).sum(e["weight"]), label=f"block_sums({m}, {n})")


def offset_sums(lo: int | None = None, hi: int | None = None) -> OutputSpec:
    """(B, Hq, hi - lo + 1): the weight at each distance kv_idx - q_idx from lo to hi, both inclusive.

    Without bounds (B, Hq, M + N - 1): every distance, from 1 - M to N - 1.
    """
    if lo is None and hi is None:
        return OutputSpec(lambda e: e["offset"].sum(e["weight"]), label="offset_sums")
    return OutputSpec(lambda e: e["offset"](lo, hi).sum(e["weight"]), label=f"offset_sums({lo}, {hi})")


def last_rows(n: int = 1, limit: int = LIMIT) -> OutputSpec:
    """(B, Hq, min(n, M), N): the weights of the last n queries; 0 where the mask hides a pair."""
    if n < 1:
        fail(f"last_rows({n}): there is no such row")
    return OutputSpec(lambda e: e["pair"](-n, None, limit).sum(e["weight"]), label=f"last_rows({n})")


def weights(limit: int = LIMIT) -> OutputSpec:
    """(B, Hq, M, N): every weight; 0 where the mask hides a pair. A call with more than `limit` elements is refused."""
    return OutputSpec(lambda e: e["pair"](None, None, limit).sum(e["weight"]), label="weights")


def scores(limit: int = LIMIT) -> OutputSpec:
    """(B, Hq, M, N): every score, after the score stage; -inf where the mask hides a pair. `limit`: as in `weights`."""
    return OutputSpec(lambda e: e["pair"](None, None, limit).max(e["score"]), label="scores")


#: by the name they have in the text form
TABLE: dict[str, Any] = {
    "entropy": entropy,
    "row_max": row_max,
    "argmax": argmax,
    "top1_prob": top1_prob,
    "row_mass": row_mass,
    "segment_mass": segment_mass,
    "received": received,
    "column_mean": column_mean,
    "block_sums": block_sums,
    "offset_sums": offset_sums,
    "last_rows": last_rows,
    "weights": weights,
    "scores": scores,
}


def _between(index: Value, length: Value, start: int | None, stop: int | None) -> Any:
    """Whether the index is in start:stop, where negative numbers count from the end, as in a slice."""
    first, last = (length + x if x is not None and x < 0 else x for x in (start, stop))
    conditions = [] if start in (None, 0) else [index >= first]
    conditions += [] if stop is None else [index < last]
    return functools.reduce(operator.and_, conditions) if conditions else True


def build_output(
    name: str, evaluate: Callable[[dict[str, Any]], Any], base: Mapping[str, Any], span: Span | None
) -> Output:
    """Run an output's formula on the names that it sees. Raises SpecError where it is not over one domain."""
    stage = f"output '{name}'"
    made: list[Made] = []
    env = {**base, "weight": Value(sym.WEIGHT), "score": Value(sym.SCORE), **reducers(made)}
    try:
        expr = number(evaluate(env))
        found = [m for m in made if m.reduction.symbol in expr.free_symbols]
        domains = list(dict.fromkeys(m.domain for m in found))
        if not found:
            fail(
                f"'{formula(expr)}' is not reduced",
                "write row.sum(...), col.sum(...), or pair.sum(...) for one value a pair",
            )
        if len(domains) > 1:
            fail(f"one output reduces over {domains[0]} and over {domains[1]}", "make two outputs of it")
    except SpecError as error:
        raise error.at(span, stage) from None
    reductions, expr = _canonical(*_guarded(domains[0], [m.reduction for m in found], expr))
    return Output(name, domains[0], reductions, expr, span)


def _guarded(domain: Domain, found: list[Reduction], expr: sympy.Expr) -> tuple[list[Reduction], sympy.Expr]:
    """The expression made 0 in a cell without a visible pair, where it might divide by 0 there."""
    if domain.kind == "pair" or not any(_undefined_at_zero(e) for e in sympy.preorder_traversal(expr)):
        return found, expr
    counts = [r for r in found if r.op == "count" and r.when is sympy.true]
    count = counts[0] if counts else Reduction(cell_symbol("count", len(found)), "count", sympy.S.One)
    guarded = voc.where(count.symbol > 0, expr, sympy.S.Zero)
    already = isinstance(expr, voc.where) and expr.args[0] == guarded.args[0]
    return ([*found, count] if not counts else found), (expr if already else guarded)


def _undefined_at_zero(expr: sympy.Basic) -> bool:
    if isinstance(expr, sympy.log):
        return True
    if not isinstance(expr, sympy.Pow) or (expr.exp.is_Integer and expr.exp > 0):
        return False
    at_least = [a for a in expr.base.args if a.is_number and a > 0] if isinstance(expr.base, voc.maximum) else []
    return not at_least


def _canonical(found: list[Reduction], expr: sympy.Expr) -> tuple[tuple[Reduction, ...], sympy.Expr]:
    """Reductions numbered by what they are and not by when the formula mentioned them."""
    ordered = sorted(found, key=lambda r: (r.op, ordered_text(r.expr), ordered_text(r.when)))
    renamed: dict[sympy.Symbol, sympy.Symbol] = {}
    result: list[Reduction] = []
    for r in ordered:
        symbol = cell_symbol(r.op, sum(other.op == r.op for other in result))
        renamed[r.symbol] = symbol
        result.append(Reduction(symbol, r.op, r.expr, r.when))
    return tuple(result), expr.xreplace(renamed)
