"""How a normalizer streams over the keys: the online form, proved by algebra and never looked up by name.

A normalizer is a cascade of row reductions followed by a weight. One pass suffices exactly when

  1. no reduction's term needs a sum that is still running, and
  2. the weight is A(s, m) * G, with G the same for the whole row, and
  3. for each running term T(s, m) (A, and the term B of every row sum), T(s, m') / T(s, m) does not depend on s.

That ratio is the factor by which a partial accumulator is rescaled when the running maximum moves from m to m', and
the same factor merges two partial results computed over different keys (split-KV).
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from attncc.errors import UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir.graph import Stage, VariantGraph
from attncc.ir.levels import varies_by_key
from attncc.ir.text import formula
from attncc.ir.vocabulary import Read

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
class Online:
    """The one-pass plan of a normalizer.

    maxes: running maxima, in order; numerator: the accumulator of the output row (its term multiplies v);
    sums: the running sums; scale: G, over maxima, sums and row values;
    coefficient: what the reduction multiplies a whole row by: out = coefficient * G * acc;
    shift: M(m), where the weight is a(s) exp(x(s) - M) * G, else None;
    lse: M - log G, the log of the denominator (None where the row has no statistic); proof: the steps, for `explain`.
    """

    maxes: tuple[tuple[sympy.Symbol, sympy.Expr], ...]
    numerator: Running
    sums: tuple[Running, ...]
    scale: sympy.Expr
    shift: sympy.Expr | None
    lse: sympy.Expr | None
    proof: tuple[str, ...]
    coefficient: sympy.Expr = sympy.S.One

    @property
    def max_symbols(self) -> tuple[sympy.Symbol, ...]:
        return tuple(m for m, _ in self.maxes)

    def merge(self) -> dict[str, sympy.Expr]:
        """How two partial results over different keys combine: for each accumulator, the factor of a partial whose
        maxima were m when the joint maxima are m_new. Partials are scaled, then added."""
        return {r.symbol.name: r.rescale for r in (self.numerator, *self.sums)}


def stream(graph: VariantGraph) -> Online:
    """Derive the one-pass form of the graph's normalizer, or raise UnsupportedError that says which step fails and
    why."""
    maxes = [s for s in graph.rows if s.op == "max"]
    sums = [s for s in graph.rows if s.op == "sum"]
    proof: list[str] = []
    for stage in graph.rows:
        _independent(stage, maxes, sums)
    weight = graph["weight"].expr
    pair, scale = _split(weight, sums)
    if pair is None:
        raise UnsupportedError(
            f"the weight '{formula(weight)}' needs its row sums before the first key is weighted: "
            "two passes over the keys",
            stage="normalizer",
            span=graph["weight"].span,
            remedy="write the weight as f(score) times a factor of the row; multi-pass plans are not generated yet",
        )
    factor = graph["out"].expr.coeff(sym.V_VEC)
    if not _linear_in_weight(factor):
        raise UnsupportedError(
            f"the reduction weighs v by '{formula(factor)}', which is not the weight times a factor",
            stage="reduction",
            span=graph["out"].span,
            remedy="write row.sum(weight * factor * v_vec)",
        )
    coefficient, inner = _row_and_pair(factor.diff(sym.WEIGHT))
    symbols = tuple(sympy.Symbol(s.name, real=True) for s in maxes)
    numerator = _running(sympy.Symbol("acc", real=True), inner * pair, symbols, graph["weight"], proof)
    running = tuple(_running(sympy.Symbol(s.name, real=True), s.expr, symbols, s, proof) for s in sums)
    shift = _shift(pair)
    sums_used = any(sympy.Symbol(s.name, real=True) in scale.free_symbols for s in sums)
    lse = _log_denominator(pair, scale, shift, symbols) if shift is not None or sums_used else None
    if lse is not None:
        proof.append(f"lse = {formula(lse)}")
    proof.append(f"weight = ({formula(pair)}) * ({formula(scale)}): one pass over the keys")
    if coefficient != 1:
        proof.append(f"out = ({formula(coefficient)}) * ({formula(scale)}) * acc: a factor of the row comes last")
    operands = tuple(zip(symbols, (s.expr for s in maxes), strict=True))
    return Online(operands, numerator, running, scale, shift, lse, tuple(proof), coefficient)


def _independent(stage: Stage, maxes: list[Stage], sums: list[Stage]) -> None:
    names = {s.name for s in stage.expr.free_symbols}
    earlier = [s for s in (*maxes, *sums) if s.name in names]
    blocking = [s for s in earlier if stage.op == "max" or s.op == "sum"]
    if blocking:
        raise UnsupportedError(
            f"row.{stage.op}({formula(stage.expr)}) needs {blocking[0].name} over all keys first: "
            "two passes over the keys",
            stage="normalizer",
            span=stage.span,
            remedy="a sum may use row maxima, nothing else; multi-pass plans are not generated yet",
        )


def _split(weight: sympy.Expr, sums: list[Stage]) -> tuple[sympy.Expr | None, sympy.Expr]:
    """The weight as (what varies by key) * (what is the row's), or (None, 1) where a sum sticks in the first part."""
    running = {sympy.Symbol(s.name, real=True) for s in sums}
    for candidate in (weight, sympy.factor_terms(weight), sympy.together(weight), sympy.factor(weight)):
        pair, scale = sympy.S.One, sympy.S.One
        for f in sympy.Mul.make_args(candidate):
            if varies_by_key(f) or not (f.free_symbols & running):
                pair *= f
            else:
                scale *= f
        if not pair.free_symbols & running:
            constant, rest = _row_factors(pair)
            return rest, scale * constant
    return None, sympy.S.One


def _row_factors(pair: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """Move factors that are the same for the whole row and know no maximum out of the accumulated term."""
    out, rest = sympy.S.One, sympy.S.One
    for f in sympy.Mul.make_args(pair):
        if varies_by_key(f) or any(s.name.startswith("row_max_") for s in f.free_symbols):
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


def _running(
    symbol: sympy.Symbol, term: sympy.Expr, maxes: tuple[sympy.Symbol, ...], stage: Stage, proof: list[str]
) -> Running:
    used = [m for m in maxes if m in term.free_symbols]
    if not used:
        return Running(symbol, term, sympy.S.One)
    ratio = term.subs({m: renamed(m) for m in used}, simultaneous=True) / term
    for simplify in (lambda e: e, sympy.powsimp, sympy.cancel, sympy.simplify):
        ratio = simplify(ratio)
        if not varies_by_key(ratio):
            proof.append(f"{symbol.name}: f(s, m') / f(s, m) = {formula(ratio)}, free of s")
            return Running(symbol, term, ratio)
    raise UnsupportedError(
        f"'{formula(term)}' cannot be rescaled when the running maximum moves: f(s, m') / f(s, m) = {formula(ratio)} "
        "depends on the key: two passes over the keys",
        stage="normalizer",
        span=stage.span,
        remedy="multi-pass plans are not generated yet; a form such as exp(score - row.max(score)) streams",
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


def _log_denominator(
    pair: sympy.Expr, scale: sympy.Expr, shift: sympy.Expr | None, maxes: tuple[sympy.Symbol, ...]
) -> sympy.Expr | None:
    """log Z, where the weight is a(pair) exp(x(pair)) / Z; None where a maximum is tied to the pair in another way."""
    result = (shift if shift is not None else sympy.S.Zero) - _log(scale)
    for f in sympy.Mul.make_args(pair):
        if not varies_by_key(f):
            result -= _log(f)
        elif not isinstance(f, sympy.exp) and f.free_symbols & set(maxes):
            return None
    return result


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
