"""Likely mistakes in a well-formed variant: fully masked rows, overflow, division by zero, no backward.

Each check is a function from the graph to findings. Those that depend on sizes are found by trying small ones, so that
a finding has an example; those that depend on scores, by bounds on their values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import sympy

from attncc.errors import Span, UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir.graph import Stage, VariantGraph
from attncc.ir.similarity import by_distance
from attncc.ir.symbols import scalar_symbol
from attncc.ir.text import formula
from attncc.ir.vocabulary import Read, attached
from attncc.passes.bounds import INF, Extent, extent, numbers
from attncc.passes.differentiate import differentiate
from attncc.passes.phases import is_column_sum, phases
from attncc.passes.recur import Delta, recur
from attncc.passes.running import without_running_sums
from attncc.passes.stream import stream
from attncc.passes.tiles import tile_plan
from attncc.passes.trials import hidden_row, reads_outside

#: error: the variant cannot be compiled; warning: its result may not be what is wanted; note: worth knowing
Level = Literal["error", "warning", "note"]

#: exp of a larger number is infinite in float32
MAX_EXPONENT = 88.0
#: integers in a kernel have 32 bits
INT_LIMIT = 2**31 - 1
#: sequences of up to this many tokens must not overflow
LONGEST = 1 << 20


@dataclass(frozen=True)
class Finding:
    """One finding about a variant: what is wrong, in which stage, where, and what to do."""

    level: Level
    reason: str
    stage: str | None = None
    span: Span | None = None
    remedy: str | None = None

    def __str__(self) -> str:
        place = f"{self.span.location}: " if self.span else ""
        stage = f"{self.stage}: " if self.stage else ""
        lines = [f"{place}{stage}{self.reason}"]
        lines += self.span.pointed().splitlines() if self.span else []
        lines += [self.remedy] if self.remedy else []
        return "\n   ".join(lines)


def lint(graph: VariantGraph) -> tuple[Finding, ...]:
    """All findings, errors first."""
    if graph.recurrent:
        return (*undone_recurrence(graph), *logs_of_what_is_kept(graph))
    try:
        main = without_running_sums(phases(graph).main)
    except UnsupportedError as error:
        return (Finding("error", error.reason, error.stage, error.span, error.remedy),)
    checks = [check for check in CHECKS if check is not hidden_rows or graph.dead_rows == "zero"]
    found = [finding for check in checks for finding in _of_parts(check, main)]
    order = ("error", "warning", "note")
    return tuple(sorted(found, key=lambda f: order.index(f.level)))


def _of_parts(check: Callable[[VariantGraph], Iterator[Finding]], graph: VariantGraph) -> Iterator[Finding]:
    """A check's findings in the branches of a variant, each once."""
    yield from dict.fromkeys(finding for part in graph.parts for finding in check(part))


def undone_recurrence(graph: VariantGraph) -> Iterator[Finding]:
    """Recurrences without a form by chunks."""
    try:
        recur(graph)
    except UnsupportedError as error:
        yield Finding("error", error.reason, error.stage, error.span, error.remedy)


def logs_of_what_is_kept(graph: VariantGraph) -> Iterator[Finding]:
    """Decay factors that may be 0 or negative. Chunks multiply decay factors by adding their logarithms."""
    try:
        plan = recur(graph)
    except UnsupportedError:
        return
    step = plan.linear.step if isinstance(plan, Delta) else plan.step
    logs = () if step is None else sorted(step.atoms(sympy.log), key=str)
    for kept in (log.args[0] for log in logs):
        if extent(kept, numbers(graph)).positive or not kept.atoms(Read):
            continue
        yield Finding(
            "warning",
            f"what is kept of the state, '{formula(kept)}', goes through its logarithm: where it is below 0 the result "
            "is NaN, and where it is 0 its gradient is",
            "state",
            graph["update"].span,
            "write it as exp(g), and pass its logarithm g, or as sigmoid(a)",
        )


def hidden_rows(graph: VariantGraph) -> Iterator[Finding]:
    """Masks that can hide every key from a query."""
    stage = graph["mask"]
    example = hidden_row(graph, more_queries=False)
    if example is not None:
        yield Finding(
            "warning",
            f"a query may see no key: {example}",
            "mask",
            stage.span,
            "such a row gives 0 and lse = -inf; if that is not meant, let it see a key: (...) | (kv_idx == q_idx)",
        )
        return
    example = hidden_row(graph, more_queries=True)
    if example is not None:
        yield Finding(
            "note",
            f"with more queries than keys a query may see no key: {example}; it gives 0 and lse = -inf",
            "mask",
            stage.span,
        )


def overflowing_exponentials(graph: VariantGraph) -> Iterator[Finding]:
    """Exponentials of scores without an upper bound."""
    known = {**numbers(graph), sym.SCORE: _score_extent(graph)}
    operands = {sympy.Symbol(s.name, real=True): s.expr for s in graph.rows if s.op == "max"}
    seen: set[Any] = set()
    for stage in graph.stages:
        for e in sorted(stage.expr.atoms(sympy.exp), key=str):
            exponent = attached(e.args[0])
            if exponent in seen or not exponent.free_symbols & {sym.SCORE, sym.RAW_SCORE}:
                continue
            seen.add(exponent)
            # a row maximum is at least each of its operands, and it only lowers the exponent
            bounded = sympy.expand(exponent.xreplace({m: g for m, g in operands.items() if _falls_with(exponent, m)}))
            if any(bounded == sym.SCORE - read for read in bounded.atoms(Read) if is_column_sum(read.input)):
                continue  # a log of a sum is at least the log of each of its terms
            if extent(bounded, known).hi > MAX_EXPONENT:
                yield Finding(
                    "warning",
                    f"exp({formula(exponent)}) overflows float32 where the exponent exceeds {MAX_EXPONENT:.0f}",
                    _stage_of(stage),
                    stage.span,
                    "subtract the row's maximum, exp(score - row.max(score)): a factor that cancels in a quotient",
                )


def _falls_with(exponent: sympy.Expr, maximum: sympy.Symbol) -> bool:
    terms = [t for t in sympy.Add.make_args(sympy.expand(exponent)) if maximum in t.free_symbols]
    return bool(terms) and all(t.as_coeff_Mul()[0].is_negative for t in terms)


def vanishing_denominators(graph: VariantGraph) -> Iterator[Finding]:
    """Divisions by a row sum that may be zero."""
    known = {**numbers(graph), sym.SCORE: _score_extent(graph)}
    sums: dict[Any, Stage] = {}
    for stage in graph.rows:
        if stage.op == "sum":
            term = extent(stage.expr, known)
            if term.lo >= 0 and any(extent(e, known).positive for e in _at_maxima(graph, stage.expr)):
                term = Extent(term.lo, term.hi, positive=True)
            symbol = sympy.Symbol(stage.name, real=True)
            sums[symbol] = stage
            # a row that sees no key gives 0 whatever it is divided by, so the sum has at least one term
            known[symbol] = Extent(0 if term.lo >= 0 else -INF, INF, positive=term.positive)
    for name in ("weight", "out"):
        stage = graph[name]
        for power in sorted(stage.expr.atoms(sympy.Pow), key=str):
            base = power.base
            if not power.exp.is_negative or not base.free_symbols & set(sums) or extent(base, known).positive:
                continue
            shown = base.xreplace({s: sympy.Symbol(f"row.sum({formula(r.expr)})", real=True) for s, r in sums.items()})
            signed = extent(base, known).lo < 0
            yield Finding(
                "warning",
                f"the weight is divided by {formula(shown)}, which may be 0"
                f"{' or change its sign' if signed else ''}: the row is then infinite or NaN",
                _stage_of(stage),
                stage.span,
                "add a small constant to the denominator, or divide by a sum of positive terms",
            )


def _at_maxima(graph: VariantGraph, term: sympy.Expr) -> Iterator[sympy.Expr]:
    """The term of a row sum at a key that attains a row maximum of the score: every row that sees a key has one."""
    scalars = {scalar_symbol(s.name, s.is_int): sympy.Number(s.default) for s in graph.scalars}
    for stage in graph.rows:
        symbol = sympy.Symbol(stage.name, real=True)
        if stage.op == "max" and stage.expr == sym.SCORE and symbol in term.free_symbols:
            yield term.xreplace(scalars).xreplace({sym.SCORE: symbol})


def overflowing_indices(graph: VariantGraph) -> Iterator[Finding]:
    """Integer expressions that exceed 32 bits at lengths that occur."""
    seen: set[Any] = set()
    for stage in graph.stages:
        for e in sympy.preorder_traversal(stage.expr):
            if e in seen or isinstance(e, sympy.Symbol) or not getattr(e, "is_integer", False):
                continue
            seen.add(e)
            length = _overflow_length(e, graph)
            if length is not None:
                yield Finding(
                    "warning",
                    f"{formula(e)} leaves 32-bit integers from {length:,} tokens on",
                    _stage_of(stage),
                    stage.span,
                    "make it a float where precision allows, e.g. float(q_idx) * kv_len, or divide before multiplying",
                )
                break


def _overflow_length(e: sympy.Expr, graph: VariantGraph) -> int | None:
    """The shortest sequence at which |e| exceeds 32 bits; None up to LONGEST tokens, or if the size of e is unknown."""

    def overflows(length: int) -> bool:
        known = {**numbers(graph), **{s: Extent(0, 1023) for s in (sym.B, sym.H, sym.H_KV)}}
        known |= {s: Extent(0, length - 1) for s in (sym.Q_IDX, sym.KV_IDX)}
        known |= {s: Extent(1, length) for s in (sym.Q_LEN, sym.KV_LEN)} | {sym.NUM_HEADS: Extent(1, 1024)}
        found = extent(e, known)
        return max(-found.lo, found.hi) > INT_LIMIT and max(-found.lo, found.hi) < INF

    if not overflows(LONGEST):
        return None
    low, high = 0, LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if middle > 0 and overflows(middle) else (middle, high)
    return high


def indices_out_of_range(graph: VariantGraph) -> Iterator[Finding]:
    """Reads outside an input's dimensions for visible pairs. Such reads give 0."""
    for read, level, reason in reads_outside(graph):
        stage = next(s for s in graph.stages if read in s.expr.atoms(type(read)))
        remedy = "a read outside an input gives 0, and no gradient" if level == "warning" else None
        yield Finding(level, f"{formula(read)}: {reason}", _stage_of(stage), stage.span, remedy)


def derivations(graph: VariantGraph) -> Iterator[Finding]:
    """Reasons why there is no plan, or no backward."""
    try:
        online = stream(graph)
    except UnsupportedError as error:
        yield Finding("error", error.reason, error.stage, error.span, error.remedy)
        return
    try:
        differentiate(graph, online)
    except UnsupportedError as error:
        yield Finding("warning", f"there is no backward: {error.reason}", error.stage, error.span, error.remedy)


def dense_gradients(graph: VariantGraph) -> Iterator[Finding]:
    """Gradients of small inputs that need a number for every pair."""
    wanted = {d.name for d in graph.inputs if d.grad}
    for read in graph.reads:
        plain = {sym.Q_IDX, sym.KV_IDX} <= set(read.index)
        if (
            read.input in wanted
            and {sym.Q_IDX, sym.KV_IDX} <= read.free_symbols
            and not plain
            and not by_distance(read)
        ):
            stage = next(s for s in graph.stages if read in s.expr.atoms(type(read)))
            yield Finding(
                "note",
                f"the gradient of {formula(read)} is collected from one float32 a pair, q_len x kv_len of each head",
                _stage_of(stage),
                stage.span,
                "an index that depends on the pair through kv_idx - q_idx alone needs no such memory",
            )


def unbounded_masks(graph: VariantGraph) -> Iterator[Finding]:
    """Masks that give no bounds, so that every tile is visited."""
    stage = graph["mask"]
    if stage.expr in (sympy.true, sympy.false):
        return
    plan = tile_plan(stage.expr, sym.KV_IDX)
    whole = [s.live.lo == 0 and s.live.hi == sym.KV_LEN - 1 and s.may is sympy.true for s in plan.segments]
    if any(whole) and not plan.scanned:
        yield Finding("note", "no tile can be skipped: the mask has no bounds in closed form", "mask", stage.span)


def _score_extent(graph: VariantGraph) -> Extent:
    """The range of the score for any q and k: tanh bounds it, and positive features make it positive."""
    known = numbers(graph)
    for stage in graph.sums_d:
        summand = extent(stage.expr, known)
        positive = summand.positive
        known[sympy.Symbol(stage.name, real=True)] = Extent(0 if summand.lo >= 0 else -INF, INF, positive=positive)
    known[sym.RAW_SCORE] = extent(graph["raw_score"].expr, known)
    return extent(graph["score"].expr, known)


def _stage_of(stage: Stage) -> str:
    """The name of a stage as the user knows it."""
    if stage.name == "weight" or sym.is_row_name(stage.name):
        return "normalizer"
    return {"raw_score": "score", "out": "reduction"}.get(stage.name, stage.name)


CHECKS = (
    derivations,
    dense_gradients,
    hidden_rows,
    overflowing_exponentials,
    vanishing_denominators,
    overflowing_indices,
    indices_out_of_range,
    unbounded_masks,
)
