"""How a normalizer streams over the keys: the online form, proved by algebra and never looked up by name.

A normalizer is a cascade of row reductions followed by a weight. One pass suffices exactly if

  1. no reduction's term needs a sum that is still running, and
  2. the weight is A(s, m) * G, with G constant in the row, and
  3. for each running term T(s, m) (A, and the term B of every row sum), T(s, m') / T(s, m) does not depend on s.

That ratio is the factor by which a partial accumulator is rescaled when the running maximum moves from m to m'. The
same factor merges two partial results computed over different keys (split-KV).

If one of the three fails, it fails because of certain reductions. These, and the ones they need, are completed by
earlier sweeps over the keys, and are known from then on. A sweep leaves as much as possible to later ones, so that the
number of sweeps is the length of the longest chain of reductions in which each needs the final value of the one before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import sympy

from attncc.errors import UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir.graph import Stage, VariantGraph
from attncc.ir.levels import varies_by_key
from attncc.ir.text import formula
from attncc.ir.vocabulary import Read, attached, maximum
from attncc.passes.algebra import row_ratio

#: the row statistic that a kernel stores: log of the factor that turns a(s) exp(x(s)) into the weight
LSE = sympy.Symbol("lse", real=True)


def renamed(symbol: sympy.Symbol) -> sympy.Symbol:
    """The running maximum after the next tile."""
    return sympy.Symbol(f"{symbol.name}_new", real=True)


@dataclass(frozen=True)
class Running:
    """One accumulator: `term` is added for every visible key; `rescale` multiplies it when the maxima move."""

    symbol: sympy.Symbol
    term: sympy.Expr
    rescale: sympy.Expr


@dataclass(frozen=True)
class Implicit:
    """The t between `lo` and `hi` at which row.sum(term(t)) + rest(t) is 0, where t is `ir.symbols.UNKNOWN`."""

    symbol: sympy.Symbol
    term: sympy.Expr
    rest: sympy.Expr
    lo: sympy.Expr
    hi: sympy.Expr


@dataclass(frozen=True)
class Sweep:
    """One sweep over the keys that completes row statistics for later ones: running maxima and sums beside them, or
    one implicit value, for which the keys are swept until it is found.

    reason: why they must be complete before the next sweep.
    """

    maxes: tuple[tuple[sympy.Symbol, sympy.Expr], ...]
    sums: tuple[Running, ...]
    root: Implicit | None
    proof: tuple[str, ...]
    reason: str

    @property
    def max_symbols(self) -> tuple[sympy.Symbol, ...]:
        return tuple(m for m, _ in self.maxes)


@dataclass(frozen=True)
class Online:
    """The plan of a normalizer: its last pass over the keys, and the sweeps before it.

    maxes: running maxima, in order; numerator: the accumulator of the output row (its term multiplies v);
    sums: the running sums; scale: G, over maxima, sums and row values;
    coefficient: the reduction's factor of the whole row: out = coefficient * G * acc;
    shift: M(m), if the weight is a(s) exp(x(s) - M) * G, else None;
    lse: M - log G, the log of the denominator (None if the row has no statistic); proof: the steps, for `explain`;
    before: the sweeps before the last pass, which reads their row statistics.
    """

    maxes: tuple[tuple[sympy.Symbol, sympy.Expr], ...]
    numerator: Running
    sums: tuple[Running, ...]
    scale: sympy.Expr
    shift: sympy.Expr | None
    lse: sympy.Expr | None
    proof: tuple[str, ...]
    coefficient: sympy.Expr = sympy.S.One
    before: tuple[Sweep, ...] = ()

    @property
    def max_symbols(self) -> tuple[sympy.Symbol, ...]:
        return tuple(m for m, _ in self.maxes)

    @property
    def passes(self) -> int:
        """How many times the forward goes over the keys."""
        return len(self.before) + 1

    def merge(self) -> dict[str, sympy.Expr]:
        """The merge of partial results over different keys: for each accumulator, the factor of a partial whose maxima
        are m, if the joint maxima are m_new. Partials are scaled, then added."""
        return {r.symbol.name: r.rescale for r in (self.numerator, *self.sums)}


class _Blocked(Exception):
    """The reductions that must be complete before a sweep, and why."""

    def __init__(self, rows: set[str], reason: str):
        super().__init__(reason)
        self.rows, self.reason = rows, reason


def stream(graph: VariantGraph) -> Online:
    """Derive the plan with the fewest passes. UnsupportedError says which step fails and why."""
    stages = [Stage(s.name, attached(s.expr), s.op, s.span) for s in graph.rows]
    known: set[str] = set()
    reasons: list[str] = []
    while True:
        try:
            last = _last_pass(graph, [s for s in stages if s.name not in known])
            break
        except _Blocked as blocked:
            known |= _with_ancestors(graph, blocked.rows)
            reasons.append(blocked.reason)
    before: list[Sweep] = []
    while known:
        own = set(known)
        own_reasons: list[str] = []
        while True:
            try:
                sweep = _sweep([s for s in stages if s.name in own])
                break
            except _Blocked as blocked:
                own -= _with_ancestors(graph, blocked.rows)
                own_reasons.append(blocked.reason)
        before.insert(0, replace(sweep, reason="; ".join(dict.fromkeys(reasons))))
        known, reasons = known - own, own_reasons
    if not before:
        return last
    passes = f"the last of {len(before) + 1} passes over the keys"
    proof = tuple(line.replace("one pass over the keys", passes) for line in last.proof)
    return replace(last, proof=proof, before=tuple(before))


def any_shift_serves(online: Online, stored: Iterable[sympy.Expr]) -> bool:
    """Whether the last pass may use another number instead of its running maximum, such as one that lags behind. True
    if the row's factor, and everything `stored` of the row, do not change when that number changes and the accumulators
    are rescaled for it.

    If the formula uses the maximum only as the larger of it and one other row value, such as a sink, the number is that
    combination."""
    if len(online.maxes) != 1 or online.before:
        return False
    (m,) = online.max_symbols
    factors = [online.coefficient * online.scale, online.numerator.rescale, *(r.rescale for r in online.sums)]
    expressions = [*factors, *stored]
    larger = {e for e in sympy.Tuple(*expressions).atoms(maximum) if m in e.args}
    if len(larger) == 1:
        (joint,) = larger
        number = sympy.Symbol("joint", real=True)
        joined = {joint: number, joint.xreplace({m: renamed(m)}): renamed(number)}
        expressions = [e.xreplace(joined) for e in expressions]
        if any(e.has(m, renamed(m)) for e in expressions):
            return False
        m = number
    by = sympy.Symbol("by", real=True)
    factor, rescale, *rescales = (e.xreplace({renamed(m): m + by}) for e in expressions[: len(factors)])
    moved = {r.symbol: r.symbol * e for r, e in zip(online.sums, rescales, strict=True)}
    moved[m] = m + by
    changes = [factor.xreplace(moved) * rescale - factor, *(e.xreplace(moved) - e for e in expressions[len(factors) :])]
    return all(_vanishes(change) for change in changes)


def _vanishes(change: sympy.Expr) -> bool:
    """Whether `change` is 0. For sums of logarithms, their exponential is compared with 1."""
    return bool(sympy.simplify(sympy.expand_log(change, force=True)) == 0 or sympy.simplify(sympy.exp(change)) == 1)


def _with_ancestors(graph: VariantGraph, rows: set[str]) -> set[str]:
    """These reductions, and all reductions that they need."""
    found = set(rows)
    for stage in reversed(graph.rows):
        if stage.name in found:
            found |= _uses(stage)
    return found


def _sweep(stages: list[Stage]) -> Sweep:
    """The sweep that completes these reductions; _Blocked if some of them must come before."""
    roots = [s for s in stages if s.op == "root"]
    if not roots:
        proof: list[str] = []
        return Sweep(*_reductions(stages, proof), None, tuple(proof), "")
    if len(stages) > 1:
        used = {name for s in stages for name in _uses(s)}
        needed = {s.name for s in roots if s.name in used} or {s.name for s in stages if s is not roots[-1]}
        raise _Blocked(needed, f"{roots[-1].name} takes sweeps of its own")
    (stage,) = stages
    term, rest, lo, hi = stage.expr.args
    symbol = sympy.Symbol(stage.name, real=True)
    proof = [f"{stage.name} solves {formula(stage.expr)}: as many sweeps as it takes"]
    return Sweep((), (), Implicit(symbol, term, rest, lo, hi), tuple(proof), "")


def _uses(stage: Stage) -> set[str]:
    """The reductions that a stage needs."""
    return {s.name for s in stage.expr.free_symbols if sym.is_row_name(s.name)}


def _reductions(
    stages: list[Stage], proof: list[str]
) -> tuple[tuple[tuple[sympy.Symbol, sympy.Expr], ...], tuple[Running, ...]]:
    """Maxima and sums that stream together; _Blocked if one needs another's final value, or sweeps of its own."""
    for stage in stages:
        _independent(stage, stages)
    maxes = tuple((sympy.Symbol(s.name, real=True), s.expr) for s in stages if s.op == "max")
    symbols = tuple(m for m, _ in maxes)
    sums = tuple(_running(sympy.Symbol(s.name, real=True), s.expr, symbols, proof) for s in stages if s.op == "sum")
    return maxes, sums


def _last_pass(graph: VariantGraph, stages: list[Stage]) -> Online:
    """The pass that accumulates the output, with these reductions in it and all others known."""
    weight, out = attached(graph["weight"].expr), attached(graph["out"].expr)
    running = {sympy.Symbol(s.name, real=True) for s in stages}
    sums = {sympy.Symbol(s.name, real=True) for s in stages if s.op == "sum"}
    for stage in stages:
        if stage.op == "root":
            raise _Blocked({stage.name}, f"{stage.name} takes sweeps of its own")
        _independent(stage, stages)
    pair, scale = _split(weight, sums, running)
    if pair is None:
        sticking = {s.name for s in weight.free_symbols & sums}
        raise _Blocked(sticking, f"the weight needs {_names(sticking)} before the first key is weighted")
    factor = out.coeff(sym.V_VEC)
    if not _linear_in_weight(factor):
        raise UnsupportedError(
            f"the reduction weighs v by '{formula(factor)}', which is not the weight times a factor",
            stage="reduction",
            span=graph["out"].span,
            remedy="write row.sum(weight * factor * v_vec)",
        )
    coefficient, inner = _row_and_pair(factor.diff(sym.WEIGHT))
    symbols = tuple(sympy.Symbol(s.name, real=True) for s in stages if s.op == "max")
    proof: list[str] = []
    numerator = _running(sympy.Symbol("acc", real=True), inner * pair, symbols, proof)
    maxes, running_sums = _reductions(stages, proof)
    shift = _shift(pair)
    lse = _log_denominator(pair, scale, shift)
    if lse is not None:
        proof.append(f"lse = {formula(lse)}")
    proof.append(f"weight = ({formula(pair)}) * ({formula(scale)}): one pass over the keys")
    if coefficient != 1:
        proof.append(f"out = ({formula(coefficient)}) * ({formula(scale)}) * acc: a factor of the row comes last")
    return Online(maxes, numerator, running_sums, scale, shift, lse, tuple(proof), coefficient)


def _names(rows: set[str]) -> str:
    return " and ".join(sorted(rows))


def _independent(stage: Stage, among: list[Stage]) -> None:
    blocking = {s.name for s in among if s.name in _uses(stage) and (stage.op == "max" or s.op == "sum")}
    if blocking:
        raise _Blocked(blocking, f"{stage.name} = row.{stage.op}({formula(stage.expr)}) needs {_names(blocking)} whole")


def _split(
    weight: sympy.Expr, sums: set[sympy.Symbol], running: set[sympy.Symbol]
) -> tuple[sympy.Expr | None, sympy.Expr]:
    """The weight as (part that varies by key, factor of the row); (None, 1) if a sum remains in the first part."""
    for candidate in (weight, sympy.factor_terms(weight), sympy.together(weight), sympy.factor(weight)):
        pair, scale = sympy.S.One, sympy.S.One
        for f in sympy.Mul.make_args(candidate):
            if varies_by_key(f) or not (f.free_symbols & sums):
                pair *= f
            else:
                scale *= f
        if not pair.free_symbols & sums:
            constant, rest = _row_factors(pair, running)
            return rest, scale * constant
    return None, sympy.S.One


def _row_factors(pair: sympy.Expr, running: set[sympy.Symbol]) -> tuple[sympy.Expr, sympy.Expr]:
    """Move factors that are the same for the whole row, without running maxima, out of the accumulated term."""
    out, rest = sympy.S.One, sympy.S.One
    for f in sympy.Mul.make_args(pair):
        if varies_by_key(f) or f.free_symbols & running:
            rest *= f
        else:
            out *= f
    return out, rest


def _row_and_pair(factor: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """A product as (factors that are the same for the whole row, the rest)."""
    row, pair = sympy.S.One, sympy.S.One
    for f in sympy.Mul.make_args(factor):
        if varies_by_key(f):
            pair *= f
        else:
            row *= f
    return row, pair


def _linear_in_weight(factor: sympy.Expr) -> bool:
    other = sympy.expand(factor).coeff(sym.WEIGHT)
    return sympy.expand(factor - other * sym.WEIGHT) == 0 and not other.has(sym.WEIGHT)


def _running(symbol: sympy.Symbol, term: sympy.Expr, maxes: tuple[sympy.Symbol, ...], proof: list[str]) -> Running:
    used = [m for m in maxes if m in term.free_symbols]
    if not used:
        return Running(symbol, term, sympy.S.One)
    moved = term.subs({m: renamed(m) for m in used}, simultaneous=True)
    ratio = moved / term
    for simplify in (lambda e: e, sympy.powsimp, sympy.cancel, sympy.simplify):
        ratio = simplify(ratio)
        if not varies_by_key(ratio):
            break
    else:
        cases = row_ratio(moved, term)
        # merge into one exponential of a difference: one of two separate ones may overflow
        ratio = ratio if cases is None else sympy.powsimp(cases)
    if not varies_by_key(ratio):
        proof.append(f"{symbol.name}: f(s, m') / f(s, m) = {formula(ratio)}, free of s")
        return Running(symbol, term, ratio)
    names = {m.name for m in used}
    raise _Blocked(
        names,
        f"'{formula(term)}' cannot be rescaled when {_names(names)} moves: f(s, m') / f(s, m) = {formula(ratio)} "
        "depends on the key",
    )


def exponent(term: sympy.Expr) -> sympy.Expr | None:
    """The sum of the exponents of a product's exp factors that vary by key, expanded; None if there is no such
    factor."""
    found = [f.args[0] for f in sympy.Mul.make_args(term) if isinstance(f, sympy.exp) and varies_by_key(f)]
    return sympy.expand(sympy.Add(*found)) if found else None


def _shift(pair: sympy.Expr) -> sympy.Expr | None:
    e = exponent(pair)
    if e is None:
        return None
    return -sympy.Add(*(t for t in sympy.Add.make_args(e) if not varies_by_key(t)))


def _log_denominator(pair: sympy.Expr, scale: sympy.Expr, shift: sympy.Expr | None) -> sympy.Expr | None:
    """log Z, if the weight is a(pair) exp(x(pair)) / Z; None if a row statistic is combined with the pair in another
    way, or no row statistic is part of Z."""
    result = (shift if shift is not None else sympy.S.Zero) - _log(scale)
    for f in sympy.Mul.make_args(pair):
        if not varies_by_key(f):
            result -= _log(f)
        elif any(sym.is_row_name(s.name) for t in _varying(f) for s in t.free_symbols):
            return None
    return result if any(sym.is_row_name(s.name) for s in result.free_symbols) else None


def _varying(factor: sympy.Expr) -> tuple[sympy.Expr, ...]:
    """The part of a factor of the weight that varies by key; of an exponential, the terms of its exponent that do."""
    if not isinstance(factor, sympy.exp):
        return (factor,)
    return tuple(t for t in sympy.Add.make_args(sympy.expand(factor.args[0])) if varies_by_key(t))


def _log(scale: sympy.Expr) -> sympy.Expr:
    """log of a product of powers, as a sum of logs."""
    total = sympy.S.Zero
    for f in sympy.Mul.make_args(scale):
        base, power = f.as_base_exp()
        total += power if base is sympy.E else power * sympy.log(base)
    return total


def reads_of(expr: sympy.Expr) -> tuple[Read, ...]:
    """The input elements an expression reads, in a fixed order."""
    return tuple(sorted(expr.atoms(Read), key=str))
