"""Derive the backward from the one-pass form.

With o = G * sum_j A(s_j) v_j and G a function of the sums L_k = sum_j B_k(s_j), let dp_j = do . v_j and delta = do . o.
Then for any y that a pair depends on (the score, or an element read from an input)

    dy_j = G * dA/dy * dp_j  +  (delta - dlse) * sum_k (d log G / d L_k) * dB_k/dy

because lse = M - log G, so that a cotangent of lse is one more term of delta. A factor of the whole row in the
reduction belongs to A here, since o contains it. The running maximum M is treated as a constant: `shift_invariant`
proves that the weight does not change when it moves. Inputs that M reads directly, as in exp(-rate (i - j)) whose row
part is in M, get their cotangent from dlse. If the weight has an exponential, the proof allows to set the maximum to
lse itself, where G = 1: then lse is the only row statistic that the backward needs. Otherwise the forward stores the
sums themselves.

If a gradient does pass through a maximum, or through a statistic of an earlier sweep, `passes.reverse` derives it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import sympy

from attncc.ir import symbols as sym
from attncc.ir.graph import VariantGraph
from attncc.ir.levels import Level, level, level_of_name, varies_by_key
from attncc.ir.vocabulary import Read, attached
from attncc.passes.algebra import held_at_zero, row_ratio
from attncc.passes.calculus import derivative as _diff
from attncc.passes.columns import Column, column, reads_of_shares
from attncc.passes.phases import is_column_sum, shares
from attncc.passes.reverse import DELTA, DLSE, DP, Adjoint, detaches, reverse
from attncc.passes.stream import LSE, Online, exponent, reads_of, renamed

__all__ = ["DELTA", "DP", "Backward", "Normal", "PairCotangents", "differentiate", "normal_form"]


@dataclass(frozen=True)
class Backward:
    """The backward of a graph, as expressions.

    saved: the row statistics that the forward stores, as (symbol, expression at the end of the forward);
    weight: the final weight of a pair, in terms of the score and the saved rows;
    dqk: the cotangent of dot(q, k) without `dqk_scale`, its factor that is the same for the whole program;
    dsums: the cotangent of every other sum over the head dimension with a value per pair, with all factors;
    dreads: for each element read whose input wants a gradient, its cotangent (a pair expression, over DP and DELTA);
    row_dreads: the same for reads in row expressions such as a sink: one value per row;
    parts, cotangents: if a gradient passes through row statistics, the row sums that a separate sweep computes, and the
    row values that it stores for the other kernels (see `passes.reverse`);
    columns: the column sums that a gradient passes through (see `passes.columns`).
    """

    saved: tuple[tuple[sympy.Symbol, sympy.Expr], ...]
    weight: sympy.Expr
    dqk: sympy.Expr
    dqk_scale: sympy.Expr
    dsums: tuple[tuple[sympy.Symbol, sympy.Expr], ...]
    dreads: tuple[tuple[Read, sympy.Expr], ...]
    row_dreads: tuple[tuple[Read, sympy.Expr], ...]
    parts: tuple[tuple[sympy.Symbol, sympy.Expr], ...] = ()
    cotangents: tuple[tuple[sympy.Symbol, sympy.Expr], ...] = ()
    columns: tuple[Column, ...] = ()

    @property
    def needs_delta(self) -> bool:
        """Whether DELTA occurs in a pair expression."""
        return any(DELTA in e.free_symbols for e in self._of_pairs())

    @property
    def sweep_needs_delta(self) -> bool:
        """Whether DELTA occurs in a stored cotangent."""
        return any(DELTA in e.free_symbols for _, e in self.cotangents)

    @property
    def pair_rows(self) -> tuple[str, ...]:
        """The saved rows and stored cotangents that pair expressions use; all saved rows if there is no sweep."""
        names = [s.name for s, _ in (*self.saved, *self.cotangents)]
        if not self.cotangents:
            return tuple(names)
        used = {s.name for e in (self.weight, *self._of_pairs()) for s in e.free_symbols}
        if self.row_dreads:  # these recognize a row without keys by the first saved row
            used.add(names[0])
        return tuple(n for n in names if n in used)

    def _of_pairs(self) -> list[sympy.Expr]:
        columns = (c.value for c in self.columns)
        return [self.dqk, *columns, *(e for _, e in (*self.dsums, *self.dreads, *self.row_dreads))]


@dataclass(frozen=True)
class Normal:
    """The weight of a plan, rewritten so that it needs only the `saved` rows."""

    saved: tuple[tuple[sympy.Symbol, sympy.Expr], ...]
    numerator: sympy.Expr
    scale: sympy.Expr
    sums: tuple[tuple[sympy.Expr, sympy.Expr], ...]  # (term, d log G / d sum)
    row_reads: tuple[tuple[Read, sympy.Expr], ...]  # (read, d log G / d read)


@dataclass(frozen=True)
class PairCotangents:
    """The cotangents at a pair that come from auxiliary outputs, besides those from `out` and lse.

    weight: the final weight, over the score and the stored rows; of_weight, of_score, of_reads: the cotangents of the
    weight, of the score, and of element reads, as pair expressions.
    """

    weight: sympy.Expr
    of_weight: sympy.Expr
    of_score: sympy.Expr
    of_reads: tuple[tuple[Read, sympy.Expr], ...]

    def by(self, wrt: sympy.Expr) -> sympy.Expr:
        """The cotangent of the score, or of an element read, without the part through the row's sums, which is a term
        of delta."""
        return self.of_weight * _diff(self.weight, wrt) + self.direct(wrt)

    def direct(self, wrt: sympy.Expr) -> sympy.Expr:
        """The part of it that does not come through the weight."""
        return self.of_score if wrt == sym.SCORE else dict(self.of_reads).get(wrt, sympy.S.Zero)

    def xreplace(self, symbols: Mapping[sympy.Symbol, sympy.Symbol]) -> PairCotangents:
        """The same over other symbols."""
        of_reads = tuple((read.xreplace(symbols), expr.xreplace(symbols)) for read, expr in self.of_reads)
        weight, of_weight, of_score = (e.xreplace(symbols) for e in (self.weight, self.of_weight, self.of_score))
        return PairCotangents(weight, of_weight, of_score, of_reads)

    @property
    def reads(self) -> set[Read]:
        """Element reads that these cotangents reach."""
        return self.weight.atoms(Read) | {read for read, _ in self.of_reads}


def normal_form(online: Online) -> Normal:
    """The plan over as few stored rows as determine the weight: only lse, if the maximum may be replaced by it."""
    settled = _at_lse(online) if not online.before and online.maxes and shift_invariant(online) else None
    return settled or _with_sums(online)


def needs_reverse(graph: VariantGraph, online: Online) -> bool:
    """Whether the rules above do not suffice, because the gradient passes through a maximum or an earlier sweep's
    statistic, or because a value is detached."""
    return bool(online.before) or detaches(graph) or bool(online.maxes and not shift_invariant(online))


def differentiate(graph: VariantGraph, online: Online, extra: PairCotangents | None = None) -> Backward:
    """Derive the backward, or raise UnsupportedError with the reason.

    With `extra`, DELTA has one more term, the row's sum of weight * extra.of_weight, which the caller supplies.
    """
    of_columns = shares(graph)
    wanted = {d.name for d in graph.inputs if d.grad} | {read.input for read, _ in of_columns}
    if needs_reverse(graph, online):
        lse = None if online.lse is None else _of_shift(online)
        found = reverse(graph, wanted, lse, extra.of_weight if extra is not None else sympy.S.Zero)
        direct = extra.direct if extra is not None else None
    else:
        found = _one_pass(online, wanted)
        direct = extra.by if extra is not None else None
    dscore, to_reads = found.dscore, dict(found.dreads)
    if direct is not None:
        dscore = sympy.factor_terms(dscore + direct(sym.SCORE))
        assert extra is not None
        for read in sorted((r for r in extra.reads if r.input in wanted), key=str):
            to_reads[read] = to_reads.get(read, sympy.S.Zero) + direct(read)
    columns = tuple(
        column(i, sympy.factor_terms(to_reads.pop(read)), share)
        for i, (read, share) in enumerate(of_columns)
        if to_reads.get(read, 0) != 0
    )
    if columns:
        dscore = sympy.factor_terms(sympy.Add(dscore, *(c.to(sym.SCORE) for c in columns)))
        for read in reads_of_shares(columns):
            if read.input in wanted and not is_column_sum(read.input):
                to_reads[read] = sympy.Add(to_reads.get(read, sympy.S.Zero), *(c.to(read) for c in columns))
    score, raw = graph["score"].expr, graph["raw_score"].expr
    draw = attached(_diff(score, sym.RAW_SCORE))
    by_qk = attached(_diff(raw, sym.QK))
    scale, local = _program_factor(draw * by_qk) if graph.has_dot else (sympy.S.One, sympy.S.Zero)
    sums = sorted((s for s in raw.free_symbols if level_of_name(s.name) == Level.PAIR and s != sym.QK), key=str)
    dsums = tuple((s, sympy.factor_terms(dscore * draw * attached(_diff(raw, s)))) for s in sums)
    dreads: dict[Read, sympy.Expr] = {}

    def add(read: Read, cotangent: sympy.Expr) -> None:
        if read.input in wanted:
            dreads[read] = dreads.get(read, sympy.S.Zero) + cotangent

    for outer, expr in ((dscore, score), (dscore * draw, raw)):
        for read in reads_of(expr):
            add(read, outer * attached(_diff(expr, read)))
    for read, e in to_reads.items():
        add(read, e)
    saved = found.saved
    if LSE not in dict(saved) and any(e.has(DLSE) for e in found.row_dreads.values()):
        assert online.lse is not None
        saved = (*saved, (LSE, online.lse))  # it distinguishes a row without keys from one whose weights are all 0
    return Backward(
        saved,
        found.weight,
        sympy.factor_terms(dscore * local),
        scale,
        dsums,
        tuple((r, sympy.factor_terms(e)) for r, e in dreads.items() if e != 0),
        tuple((r, e) for r, e in found.row_dreads.items() if e != 0),
        found.parts,
        found.cotangents,
        columns,
    )


def _one_pass(online: Online, wanted: set[str]) -> Adjoint:
    """The backward of a plan whose weight does not change when its maxima move."""
    normal = normal_form(online)
    by_row = dict(normal.row_reads)
    of_lse: dict[Read, sympy.Expr] = {}
    shifts = {} if online.lse is None or (normal.saved and normal.saved[0][0] == LSE) else _of_shift(online)
    for read in reads_of(normal.numerator):
        slope = None if read in reads_of(online.coefficient) else _log_slope(normal, online, read)
        if slope is not None:
            by_row[read] = by_row.get(read, sympy.S.Zero) + slope
        elif read in shifts:
            of_lse[read] = DLSE * shifts[read]
    whole = {r for r in by_row if r in reads_of(normal.numerator)}
    normal = replace(normal, numerator=online.coefficient * normal.numerator)
    terms = (normal.numerator, *(t for t, _ in normal.sums))
    reads = sorted(set().union(*(t.atoms(Read) for t in terms)) - whole, key=str)
    return Adjoint(
        normal.saved,
        normal.numerator * normal.scale,
        _cotangent(normal, sym.SCORE),
        {r: _cotangent(normal, r) for r in reads if r.input in wanted},
        {r: DELTA * e for r, e in by_row.items() if r.input in wanted and e != 0}
        | {r: e for r, e in of_lse.items() if r.input in wanted},
    )


def _of_shift(online: Online) -> dict[Read, sympy.Expr]:
    """The derivative of lse by each read in its shift M, with everything else constant."""
    shift = online.shift if online.shift is not None else sympy.S.Zero
    return {read: attached(_diff(shift, read)) for read in reads_of(shift)}


def _log_slope(normal: Normal, online: Online, read: Read) -> sympy.Expr | None:
    """d log(A G) / d read, without the reads of G, if it is the same for all keys of a row, as in exp(s -
    given[q_idx]); else None. The derivative of lse is the negative of it, so that both cotangents together are a
    multiple of DELTA."""
    if varies_by_key(read) or (normal.saved and normal.saved[0][0] == LSE):
        return None
    total = row_ratio(_diff(normal.numerator, read), normal.numerator)
    for running, (term, dlog) in zip(online.sums, normal.sums, strict=True):
        slope = row_ratio(_diff(term, read), term)
        if total is None or slope is None:
            return None
        total += slope * running.symbol * dlog
    return None if total is None else sympy.cancel(total)


def _cotangent(normal: Normal, wrt: sympy.Expr) -> sympy.Expr:
    total = DP * normal.scale * _diff(normal.numerator, wrt)
    for term, dlog in normal.sums:
        total += DELTA * dlog * _diff(term, wrt)
    return sympy.factor_terms(total)


def _program_factor(expr: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """(factors that are the same for the whole program, the rest). A program of dK/dV has all query heads of a key
    head."""
    scale, rest = sympy.S.One, sympy.S.One
    if expr == 0:  # a score that depends on neither q nor k has cotangent 0, not a factor 0
        return scale, expr
    for f in sympy.Mul.make_args(expr):
        if level(f) == Level.PROGRAM and not f.atoms(Read) and sym.H not in f.free_symbols:
            scale *= f
        else:
            rest *= f
    return scale, rest


def _positive(online: Online) -> dict[sympy.Symbol, sympy.Symbol]:
    """Stand-ins for the sums, declared positive, so that sympy splits powers of products."""
    return {r.symbol: sympy.Symbol(r.symbol.name, positive=True) for r in online.sums}


@lru_cache(maxsize=256)
def shift_invariant(online: Online) -> bool:
    """Whether A(s, m') G(L', m') = A(s, m) G(L, m), where L' is L rescaled from m to m'."""
    positive = _positive(online)
    move = {m: renamed(m) for m in online.max_symbols}
    scale = online.scale.xreplace(positive)
    rescaled = {positive[r.symbol]: positive[r.symbol] * r.rescale for r in online.sums}
    moved = scale.xreplace(move).subs(rescaled, simultaneous=True)
    ratio = moved * online.numerator.rescale / scale
    for simplify in (sympy.powsimp, sympy.expand_power_base, _exp_cancel, sympy.simplify):
        ratio = simplify(ratio)
        if ratio == 1 or (ratio.is_number and abs(float(ratio) - 1) < 1e-12):
            return True
    return False


def _exp_cancel(ratio: sympy.Expr) -> sympy.Expr:
    return sympy.cancel(sympy.expand(ratio, power_exp=True, power_base=True))


def _at_lse(online: Online) -> Normal | None:
    """The plan with M := lse, where G = 1. Possible with one sum, if every maximum occurs only in a multiple of M."""
    if online.shift is None or online.lse is None or len(online.sums) > 1 or not online.max_symbols:
        return None
    terms = (online.numerator.term, *(r.term for r in online.sums))
    moved = [_move_exponent(t, online) for t in terms]
    scale = online.scale.subs(online.shift, LSE)
    if any(t is None for t in moved) or scale.free_symbols & set(online.max_symbols):
        return None
    numerator, *sums = moved
    assert numerator is not None
    at_one: dict[sympy.Symbol, sympy.Expr] = {}
    for r in online.sums:
        solution = _solve_for_one(scale, r.symbol)
        if solution is None:
            return None
        at_one[r.symbol] = solution

    def settle(e: sympy.Expr) -> sympy.Expr:
        # powsimp: exp(-lse) * exp(sink) would overflow where exp(sink - lse) does not
        return sympy.powsimp(sympy.cancel(e.subs(at_one))) if at_one else e

    pairs = tuple(
        (t, settle(sympy.log(scale).diff(r.symbol))) for t, r in zip(sums, online.sums, strict=True) if t is not None
    )
    reads = tuple((r, settle(_diff(sympy.log(scale), r))) for r in reads_of(scale))
    return Normal(((LSE, online.lse),), numerator, sympy.S.One, pairs, reads)


def _move_exponent(term: sympy.Expr, online: Online) -> sympy.Expr | None:
    """The term with its maxima replaced so that M is lse; None if some maximum is not part of M."""
    if not term.free_symbols & set(online.max_symbols):
        return term
    e = exponent(term)
    if e is None or online.shift is None:
        return None
    pair = sympy.Add(*(t for t in sympy.Add.make_args(e) if varies_by_key(t)))
    ratio = sympy.cancel((pair - e) / online.shift)
    if not ratio.is_number:
        return None
    rest = sympy.Mul(*(f for f in sympy.Mul.make_args(term) if not (isinstance(f, sympy.exp) and varies_by_key(f))))
    if rest.free_symbols & set(online.max_symbols):
        return None
    return rest * sympy.exp(pair - ratio * LSE)


def _solve_for_one(scale: sympy.Expr, symbol: sympy.Symbol) -> sympy.Expr | None:
    """The sum at which G is 1, if there is exactly one such positive value."""
    inverse = 1 / scale
    slope = inverse.diff(symbol)
    if symbol not in slope.free_symbols:
        return (1 - inverse.subs(symbol, 0)) / slope
    unknown = sympy.Symbol("L", positive=True)
    solutions = sympy.solve(sympy.nsimplify(inverse.subs(symbol, unknown)) - 1, unknown)
    return solutions[0] if len(solutions) == 1 else None


def _cancelled(expr: sympy.Expr) -> sympy.Expr:
    """`sympy.cancel`, but with integral floats as integers: if any number is no integer, cancel writes 1.0 * x for x,
    which then equals no other term."""
    found = sympy.cancel(expr)
    return found.xreplace({f: sympy.Integer(int(f)) for f in found.atoms(sympy.Float) if float(f).is_integer()})


def _with_sums(online: Online) -> Normal:
    """The plan unchanged: the forward stores the maxima and the sums that the weight needs."""
    symbols = [*online.max_symbols, *(r.symbol for r in online.sums)]
    for sweep in online.before:
        symbols += [*sweep.max_symbols, *(r.symbol for r in sweep.sums)]
        symbols += [sweep.root.symbol] if sweep.root is not None else []
    used = set().union(
        online.numerator.term.free_symbols, online.scale.free_symbols, *(r.term.free_symbols for r in online.sums)
    )
    saved = tuple((s, s) for s in symbols if s in used)
    log_scale = sympy.log(online.scale)
    slopes = {r.symbol: _cancelled(log_scale.diff(r.symbol)) for r in online.sums}
    pairs = tuple((r.term, held_at_zero(slopes[r.symbol], online.scale)) for r in online.sums)
    reads = tuple((r, held_at_zero(sympy.cancel(_diff(log_scale, r)), online.scale)) for r in reads_of(online.scale))
    return Normal(saved, online.numerator.term, online.scale, pairs, reads)
