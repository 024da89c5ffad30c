"""The backward of a cascade: reverse mode over row statistics that the one-pass rules do not cover.

Write out = sum_j w_j v_j with w_j = w(s_j, r), where r are row statistics, each a reduction over the same keys:

    a maximum  r = max_j g_j          dr = the mean of dg_j over the keys that attain it, as in PyTorch's amax
    a sum      r = sum_j g_j          dr = sum_j dg_j
    a root     sum_j g_j(r) + e(r) = 0    dr = -(sum_j dg_j + de) / (sum_j g_j'(r) + e'(r)), with r itself held fixed

With dp_j = do . v_j, the cotangent of r is linear in dp:  c_r = sum_j dp_j E_rj,  where E_r is dw/dr plus the terms
through later statistics, E_l (dr_l/dr) f_l. So one sweep over the keys computes every sum that any cotangent needs, and
each cotangent is then arithmetic per row. Most need no sweep:

    E_r = 0             the statistic is only a shift, and no gradient passes through it
    E_r = k(row) w      c_r = k delta, with delta = do . o as usual

Both cases are found by algebra. The cotangent of a score is dp_j dw_j/ds + sum_l a_l dg_lj/ds, with a_l = c_l f_l.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from attncc.errors import UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc
from attncc.ir.graph import Stage, VariantGraph
from attncc.ir.levels import varies_by_key
from attncc.ir.text import formula
from attncc.ir.vocabulary import Read, attached, detach
from attncc.passes.algebra import held_at_zero, is_zero, row_ratio
from attncc.passes.calculus import derivative as diff
from attncc.passes.ties import TIE

#: do . v, one value per pair
DP = sympy.Symbol("dp", real=True)
#: do . o - dlse, one value per row
DELTA = sympy.Symbol("delta", real=True)
#: the cotangent of lse, one value per row
DLSE = sympy.Symbol("dlse", real=True)


def first_at(symbol: sympy.Symbol) -> sympy.Symbol:
    """The index of the first key that attains a row maximum, as the forward stores it."""
    return sympy.Symbol(f"{symbol.name}_at", real=True)


def ties(symbol: sympy.Symbol) -> sympy.Symbol:
    """The number of keys that attain a row maximum."""
    return sympy.Symbol(f"{symbol.name}_ties", real=True)


def cotangent_of(symbol: sympy.Symbol) -> sympy.Symbol:
    """The multiplier of a statistic's term in the cotangent of a pair."""
    return sympy.Symbol(f"{symbol.name}_grad", real=True)


@dataclass(frozen=True)
class Adjoint:
    """The result of reverse mode.

    saved: row statistics that the forward stores; parts: row sums of pair expressions over DP and saved rows, which one
    sweep of the backward computes; cotangents: row expressions over saved rows, DELTA, parts and earlier cotangents;
    weight: the factor of v at a pair; dscore, dreads: the cotangents of a pair's score and of element reads;
    row_dreads: the cotangents of reads in row expressions, one value per row.
    """

    saved: tuple[tuple[sympy.Symbol, sympy.Expr], ...]
    weight: sympy.Expr
    dscore: sympy.Expr
    dreads: dict[Read, sympy.Expr]
    row_dreads: dict[Read, sympy.Expr]
    parts: tuple[tuple[sympy.Symbol, sympy.Expr], ...] = ()
    cotangents: tuple[tuple[sympy.Symbol, sympy.Expr], ...] = ()


def reverse(
    graph: VariantGraph, wanted: set[str], lse: dict[Read, sympy.Expr] | None, of_weight: sympy.Expr = sympy.S.Zero
) -> Adjoint:
    """Differentiate the weight through all row statistics. `wanted` names the inputs that want a gradient.

    lse: the derivative of lse by each read that shifts all exponents of a row; None if there is no lse.
    of_weight: the cotangent of a pair's weight besides that from the output row. DELTA includes its row sum, and the
    cotangent of lse, because with an lse the weight depends on its row only by the factor exp(-lse).
    UnsupportedError if that cannot be proved.
    """
    return _Reverse(graph, wanted, lse, of_weight).run()


def detaches(graph: VariantGraph) -> bool:
    """Whether the normalizer or the reduction excludes a value from differentiation."""
    return any(s.expr.has(detach) for s in (*graph.rows, graph["weight"], graph["out"]))


@dataclass
class _Reverse:
    graph: VariantGraph
    wanted: set[str]
    lse: dict[Read, sympy.Expr] | None
    of_weight: sympy.Expr
    parts: dict[sympy.Expr, sympy.Symbol] = field(default_factory=dict)
    #: by statistic: the factor f of its cotangent (see `_factor`), and the product a = c f of both
    factors: dict[str, sympy.Expr] = field(default_factory=dict)
    multipliers: dict[str, sympy.Expr] = field(default_factory=dict)

    def run(self) -> Adjoint:
        out = self.graph["out"].expr.coeff(sym.V_VEC)
        self.weight = self.graph["weight"].expr
        self.factor = out.diff(sym.WEIGHT)
        self.known = attached(self.weight)
        #: the cotangent of a pair's weight: dp times the factor of the reduction, plus `of_weight`
        self.source = DP * attached(self.factor) + self.of_weight
        self.moving = self._moving()
        through: dict[str, sympy.Expr] = {}
        for stage in reversed(self.graph.rows):
            if stage.name in self.moving:
                self._cotangent(stage, through)
        dscore = self._of_pair(sym.SCORE)
        reads = sorted(set().union(*(e.atoms(Read) for e in self._expressions())), key=str)
        dreads: dict[Read, sympy.Expr] = {}
        row_dreads: dict[Read, sympy.Expr] = {}
        for read in reads:
            if read.input in self.wanted:
                by_row, by_pair = self._of_read(read)
                dreads |= {read: by_pair} if by_pair != 0 else {}
                row_dreads |= {read: by_row} if by_row != 0 else {}
        return self._finished(dscore, dreads, row_dreads)

    def _moving(self) -> set[str]:
        """The statistics that depend on a score, or on an input that wants a gradient, unlike the number of keys."""
        found: set[str] = set()
        for stage in self.graph.rows:
            exprs = stage.expr.args[:2] if stage.op == "root" else (stage.expr,)
            reads = {r.input for e in exprs for r in e.atoms(Read)}
            names = {s.name for e in exprs for s in e.free_symbols}
            if sym.SCORE.name in names or names & found or reads & self.wanted:
                found.add(stage.name)
        return found

    def _expressions(self) -> list[sympy.Expr]:
        """The expressions that are differentiated; the ends of a root's bracket are not."""
        rows = [s.expr.args[:2] if s.op == "root" else (s.expr,) for s in self.graph.rows]
        return [self.factor, self.weight, *(e for exprs in rows for e in exprs)]

    def _cotangent(self, stage: Stage, through: dict[str, sympy.Expr]) -> None:
        """Compute the multiplier of one statistic, given those of all later ones."""
        symbol = _symbol(stage)
        direct = attached(diff(self.weight, symbol))
        total, later = direct, sympy.S.Zero
        for user in self.graph.rows:
            if user.name in through:
                slope = self._row_slope(user, symbol)
                total += through[user.name] * self.factors[user.name] * slope
                later += self.multipliers.get(user.name, sympy.S.Zero) * slope
        if total == 0 or is_zero(total):
            return
        factor = self._factor(stage)
        through[stage.name], self.factors[stage.name] = total, factor
        ratio = row_ratio(total, self.known)
        if ratio is not None:
            cotangent = held_at_zero(ratio, self.known) * DELTA
        else:
            cotangent = later + self._summed(direct)
        self.multipliers[stage.name] = sympy.factor_terms(factor * cotangent)

    def _summed(self, direct: sympy.Expr) -> sympy.Expr:
        """sum_j dp_j E_j as a row expression."""
        if direct == 0 or is_zero(direct):
            return sympy.S.Zero
        ratio = row_ratio(direct, self.known)
        if ratio is None and self.lse is not None:
            raise UnsupportedError(
                f"the gradient of lse is not derived: '{formula(direct)}' is no multiple of the weight",
                stage="normalizer",
                span=self.graph["weight"].span,
            )
        return self._part(self.source * direct) if ratio is None else held_at_zero(ratio, self.known) * DELTA

    def _part(self, expr: sympy.Expr) -> sympy.Expr:
        """A row sum that the backward's sweep computes, or a multiple of one that it computes already.

        Factors that are the same for the whole row are not part of the sum: they may be 0 in some rows, and no other
        sum is a multiple of 0."""
        factors = sympy.Mul.make_args(sympy.factor_terms(expr))
        outside = sympy.Mul(*(f for f in factors if not (varies_by_key(f) or f.is_number)))
        inside = trimmed(sympy.Mul(*(f for f in factors if varies_by_key(f) or f.is_number)))
        for known, symbol in self.parts.items():
            ratio = row_ratio(inside, known)
            if ratio is not None:
                return outside * ratio * symbol
        symbol = sym.row_symbol("part", len(self.parts))
        self.parts[inside] = symbol
        return outside * symbol

    def _factor(self, stage: Stage) -> sympy.Expr:
        """f: the factor between a statistic's cotangent and the cotangent of the statistic's term."""
        if stage.op != "root":
            return sympy.S.One
        term, rest = (e.xreplace({sym.UNKNOWN: _symbol(stage)}) for e in stage.expr.args[:2])
        slope = self._row_sum(attached(diff(term, _symbol(stage)))) + attached(diff(rest, _symbol(stage)))
        return -voc.where(sympy.Eq(slope, 0), 0, 1 / slope)

    def _row_slope(self, stage: Stage, wrt: sympy.Expr) -> sympy.Expr:
        """The derivative of a statistic's reduction by another statistic, one value per row."""
        if stage.op == "root":
            term, rest = (e.xreplace({sym.UNKNOWN: _symbol(stage)}) for e in stage.expr.args[:2])
            return self._row_sum(attached(diff(term, wrt))) + attached(diff(rest, wrt))
        slope = attached(diff(stage.expr, wrt))
        if stage.op == "max":  # a mean over the keys that attain it
            return slope if not varies_by_key(slope) else self._row_sum(self._hits(stage) * slope)
        return self._row_sum(slope)

    def _row_sum(self, expr: sympy.Expr) -> sympy.Expr:
        """sum_j expr_j as a row expression: a multiple of a sum of the forward, or another sum of the sweep."""
        if expr == 0 or is_zero(expr):
            return sympy.S.Zero
        known = self._known_sum(expr)
        if known is None:
            terms = [self._known_sum(t) for t in sympy.Add.make_args(sympy.expand(expr))]
            if all(t is not None for t in terms):
                known = sympy.simplify(sympy.Add(*terms))
        return self._part(expr) if known is None else known

    def _known_sum(self, expr: sympy.Expr) -> sympy.Expr | None:
        """sum_j expr_j as a multiple of a sum of the forward; None if it is no such multiple."""
        for stage in self.graph.rows:
            if stage.op == "sum":
                ratio = row_ratio(expr, attached(stage.expr))
                if ratio is not None:
                    return ratio * _symbol(stage)
        return None

    def _hits(self, stage: Stage) -> sympy.Expr:
        """1 / (number of keys that attain a maximum) at those keys, 0 elsewhere.

        A score that is recomputed need not have the same last bit, so a single such key is identified by its index.
        """
        symbol, value = _symbol(stage), attached(stage.expr)
        close = voc.absolute(value - symbol) <= TIE * voc.absolute(symbol)
        alone = sympy.Eq(voc.to_float(sym.KV_IDX), first_at(symbol))
        return voc.to_float(sympy.Or(sympy.And(ties(symbol) > 1, close), sympy.And(ties(symbol) <= 1, alone))) / ties(
            symbol
        )

    def _of_pair(self, wrt: sympy.Expr) -> sympy.Expr:
        """The cotangent of a value that a pair depends on, such as the score."""
        total = self.source * attached(diff(self.weight, wrt))
        for stage in self.graph.rows:
            if stage.name in self.multipliers:
                total += self._multiplier(stage) * self._term_slope(stage, wrt)
        return sympy.factor_terms(total)

    def _term_slope(self, stage: Stage, wrt: sympy.Expr) -> sympy.Expr:
        """The derivative, by `wrt`, of a statistic through its term at one pair."""
        if stage.op == "root":
            return attached(diff(stage.expr.args[0].xreplace({sym.UNKNOWN: _symbol(stage)}), wrt))
        slope = attached(diff(stage.expr, wrt))
        return self._hits(stage) * slope if stage.op == "max" and slope != 0 else slope

    def _of_read(self, read: Read) -> tuple[sympy.Expr, sympy.Expr]:
        """The cotangent of an element read: (the part per row, the part per pair)."""
        by_row, by_pair = sympy.S.Zero, sympy.S.Zero
        # a factor of the reduction is no part of the weight, and so neither of lse nor of delta
        slope = attached(diff(self.weight, read))
        ratio = None if slope == 0 or varies_by_key(read) else row_ratio(slope, self.known)
        if ratio is not None:
            by_row = held_at_zero(ratio, self.known) * DELTA
        else:
            by_row, by_pair = DLSE * (self.lse or {}).get(read, sympy.S.Zero), self.source * slope
        by_pair += DP * attached(diff(self.factor, read) * self.weight)
        for stage in self.graph.rows:
            if stage.name not in self.multipliers:
                continue
            multiplier, slope = self._multiplier(stage), self._term_slope(stage, read)
            if stage.op == "root":
                rest = stage.expr.args[1].xreplace({sym.UNKNOWN: _symbol(stage)})
                by_row += multiplier * attached(diff(rest, read))
            ratio = None
            if stage.op == "sum" and slope != 0 and not varies_by_key(read):
                ratio = row_ratio(slope, attached(stage.expr))
            if ratio is not None:
                by_row += multiplier * ratio * _symbol(stage)
            else:
                by_pair += multiplier * slope
        return by_row, sympy.factor_terms(by_pair)

    def _multiplier(self, stage: Stage) -> sympy.Expr:
        """A statistic's multiplier in pair expressions: its name if the sweep stores it, else the whole expression."""
        return cotangent_of(_symbol(stage))

    def _finished(
        self, dscore: sympy.Expr, dreads: dict[Read, sympy.Expr], row_dreads: dict[Read, sympy.Expr]
    ) -> Adjoint:
        cotangents = tuple(
            (cotangent_of(_symbol(s)), self.multipliers[s.name])
            for s in reversed(self.graph.rows)
            if s.name in self.multipliers
        )
        if not self.parts:  # without a sweep, each multiplier is arithmetic of the row
            inline = dict(cotangents)
            dscore = sympy.factor_terms(dscore.xreplace(inline))
            dreads = {r: sympy.factor_terms(e.xreplace(inline)) for r, e in dreads.items()}
            row_dreads = {r: e.xreplace(inline) for r, e in row_dreads.items()}
            cotangents = ()
        dscore = trimmed(dscore)
        used: set[sympy.Symbol] = set()
        weight = attached(self.factor) * self.known
        for e in (weight, dscore, *dreads.values(), *row_dreads.values(), *self.parts, *(e for _, e in cotangents)):
            used |= {s for s in e.free_symbols if sym.is_row_name(s.name)}
        own = {s for s, _ in cotangents} | set(self.parts.values())
        saved = tuple((s, s) for s in sorted(used - own, key=lambda s: s.name))
        parts = tuple((symbol, e) for e, symbol in self.parts.items())
        return Adjoint(saved, weight, dscore, dreads, row_dreads, parts, cotangents)


def trimmed(expr: sympy.Basic) -> sympy.Basic:
    """The expression with relu(x) * step(x) simplified to relu(x)."""
    if not expr.args or isinstance(expr, Read):
        return expr
    args = [trimmed(a) for a in expr.args]
    if expr.is_Mul:
        bases = [a.as_base_exp()[0] for a in args]
        positive = {b.args[0] for b in bases if isinstance(b, voc.relu)}
        args = [a for a in args if not (isinstance(a, voc.step) and a.args[0] in positive)]
    return expr.func(*args)


def _symbol(stage: Stage) -> sympy.Symbol:
    return sympy.Symbol(stage.name, real=True)
