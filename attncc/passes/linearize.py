"""Prove that a variant has a linear-time form: its weights separate into factors of the query and of the key.

Attention costs N^2 because every pair has its own weight. If the weight is a polynomial in a dot product, times factors
of the row and of the column, times a decay exp(D_i - D_j) from token to token, the sum over the keys is a product with
a state that is carried along:

    out_i = G(total_i) * sum_{j <= i} (c a_i.b_j + alpha_i beta_j) exp(D_i - D_j) v_j        D_t = step_0 + ... + step_t
    a_i = row_i * left(q_vec_i),  b_j = col_j * right(k_vec_j),  total_i = the same sum without v_j

    state_t = exp(step_t) state_{t-1} + [b_t, beta_t] [v_t, 1]'        out_t = G(...) [c a_t, alpha_t] state_t

A weight p_0 + p_1 s + p_2 s^2 of s = a_i.b_j, without decay, has the same form over the features of degree 2,
[1, x, x (x) x], with a state of 1 + Dqk + Dqk^2 rows.

`linearize` proves the form by algebra on the variant's formulas, factor by factor, and refuses with the name of the
first factor that does not separate. It does not look at the name of a variant.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Literal

import sympy

from attncc.errors import UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir.graph import VariantGraph
from attncc.ir.levels import Level, join, level
from attncc.ir.similarity import kind_of
from attncc.ir.text import formula
from attncc.ir.vocabulary import Read, detach, maximum, sum_d, to_float
from attncc.passes.decays import Monomial, T, channel_decay, decay_step, monomial, refuse, token
from attncc.passes.diagonal import Parts, apart, own_product, positions
from attncc.passes.differentiate import shift_invariant
from attncc.passes.phases import phases
from attncc.passes.similarity import Dot, similarity, whole
from attncc.passes.stream import Online, Running, stream

#: total_i: the row's sum of weights, without G
TOTAL = sympy.Symbol("total", real=True)

Decay = Literal["none", "head", "token", "channel"]
#: the terms of an expanded weight, by powers of dot products: ((dot, exponent), ...)
_Monomials = dict[tuple[tuple[sympy.Symbol, int], ...], list[Monomial]]


@dataclass(frozen=True)
class Linear:
    """The chunk plan of a variant: the form in this module's docstring, as expressions.

    left, right: one component of the features, over q_vec and over k_vec.
    constant: c, the same for the whole call.
    row, col: factors of a token (over `T` if causal; the row's over q_idx otherwise), 1 if there are none.
    bias: (alpha, beta) or None.
    powers: (p_0, p_1, p_2) of a weight of degree 2, the same for the whole call, or None.
    step: the log of the decay by a token, None without decay.
    gain, scale: G = gain * scale, where gain is a factor of a token and scale depends on TOTAL alone.
    proof: the steps of the proof, as text.
    own: the additional weight of a token's own value, over sums over the head dimension and the token's inputs.
    late: the state is read before the token's own step, without its own k and v; `own` is then the whole weight of the
    token's own value.
    """

    causal: bool
    left: sympy.Expr
    right: sympy.Expr
    constant: sympy.Expr
    row: sympy.Expr
    col: sympy.Expr
    bias: tuple[sympy.Expr, sympy.Expr] | None
    step: sympy.Expr | None
    gain: sympy.Expr
    scale: sympy.Expr
    proof: tuple[str, ...]
    powers: tuple[sympy.Expr, sympy.Expr, sympy.Expr] | None = None
    own: sympy.Expr | None = None
    late: bool = False

    @property
    def decay(self) -> Decay:
        """What the decay of the state depends on."""
        if self.step is None:
            return "none"
        if sym.COMPONENT in self.step.free_symbols:
            return "channel"
        return "token" if T in self.step.free_symbols else "head"

    @property
    def alike(self) -> bool:
        """Whether all decay steps of a head are the same number."""
        return self.decay == "head"

    @property
    def diagonal(self) -> sympy.Expr | None:
        """The factor per channel of a token's own product q.k in `own`, if each channel has a decay of its own: the
        kernels of pairs apply it. Else None."""
        product = own_product(self.own) if self.decay == "channel" else None
        factor = sympy.S.Zero if product is None else sympy.Mul(*product)
        plain = self.late and factor == 1
        return factor if plain or sym.COMPONENT in factor.free_symbols else None

    @property
    def product(self) -> tuple[sympy.Expr, sympy.Expr] | None:
        """(factor, weight) if `own` is weight * sum_d(factor * q_vec * k_vec), which a kernel of its own adds; None if
        it has another form, or `diagonal` is not None, or the weight has degree 2."""
        return own_product(self.own) if self.diagonal is None and self.powers is None else None

    @property
    def degree(self) -> int:
        """The degree of the weight as a polynomial of the dot product."""
        return 1 if self.powers is None else 2

    @property
    def total(self) -> bool:
        """Whether the output depends on the row's sum of weights."""
        return TOTAL in self.scale.free_symbols


def linearize(graph: VariantGraph) -> Linear:
    """The chunk plan of a graph. UnsupportedError: a factor of the weight does not separate, or the variant has a
    feature that no chunk plan has."""
    _refuse_features(graph)
    found = whole(similarity(graph))
    core = found.core
    _refuse_sums(graph)
    causal, itself = _mask(graph)
    online = stream(core)
    if online.passes > 1:
        refuse(graph, "weight", f"it takes {online.passes} passes over the keys")
    proof = [f"mask = {formula(graph['mask'].expr)}: " + ("a prefix of the keys" if causal else "every key")]
    if online.maxes:
        online = _without_maxima(graph, online)
        proof.append("row.max: the output does not depend on it, and it is 0 here")
    online = _counted(online, causal, itself)
    base = _base(graph, online)
    weight, parts = _apart(graph, _weight(core, base), causal, itself)
    monomials = _monomials(graph, weight, causal, parts is not None)
    decay, late = _one_decay(graph, monomials)
    dot, degree = _one_dot(graph, weight, monomials)
    left, right = next(((d.left, d.right) for d in found.dots if d.symbol == dot), (sym.Q_VEC, sym.K_VEC))
    left, right, of_channel, late_channels = channel_decay(graph, left, right, causal, parts is not None)
    bias, powers = None, None
    if degree == 2:
        if decay + of_channel != 0:
            refuse(graph, "weight", f"'{formula(weight)}' has degree 2 in the score, and decays")
        row, col, powers = _squared(graph, {sum(n for _, n in power): m for power, m in monomials.items()})
        constant = sympy.S.One
    else:
        row, col = _factored(graph, monomials[((dot, 1),)])
        constant, row = _program(row)
        bias = _factored(graph, monomials[()]) if () in monomials else None
    of = sorted((sum(n for _, n in power) for power in monomials), reverse=True)
    proof.append(
        f"weight*total = {formula(weight)}: "
        + (f"of degree 1 in {dot}" if of == [1] else f"{dot} to the power {', '.join(map(str, of[:-1]))}, and {of[-1]}")
    )
    if dot != sym.QK:
        proof.append(f"{dot} = sum_d(({formula(left)}) * ({formula(right)})): features of the query, and of the key")
    if (row, col) != (1, 1):
        proof.append(f"factors: ({formula(constant * row)}) of the query * ({formula(col)}) of the key")
    step = None
    if decay != 0 and of_channel != 0 and late != late_channels:
        refuse(graph, "weight", "one decay is of the token's own step, the other is not")
    decay, late = decay + of_channel, late or late_channels
    if decay != 0:
        step = decay_step(graph, decay)
        proof.append(f"decay = exp(D[i] - D[j]) with D[t] = {formula(decay)} at t = kv_idx")
        proof.append(f"D[t] - D[t-1] = {formula(step)}: the log of what token t leaves of the state")
    gain, scale = _scale(graph, online, base, causal)
    own = None
    if parts is not None:
        if scale != 1:
            refuse(graph, "weight", f"'{formula(scale)}' is of a row sum with a part of the token's own")
        own = _own(parts, found.dots, gain, late)
        proof.append(f"of itself a token has the weight {formula(parts.own)}, one value a token")
        if late:
            proof.append("what is before it is read before its own step: D[i-1] in the place of D[i]")
    if scale == 1 and powers is None:  # without a row sum, G is part of the query's factor
        more, rest = _program(gain)
        constant, row, gain = constant * more, row * rest, sympy.S.One
        bias = None if bias is None else (bias[0] * more * rest, bias[1])
    plan = Linear(causal, left, right, constant, row, col, bias, step, gain, scale, (), powers, own, late)
    plain = (left, right, row, col, bias, gain, scale) == (sym.Q_VEC, sym.K_VEC, 1, 1, None, 1, 1)
    if plan.decay == "channel" and not plain:
        refuse(graph, "weight", "each channel decays on its own, beside features, factors or a denominator")
    return replace(plan, proof=(*proof, *_recurrence(plan)))


def _refuse_features(graph: VariantGraph) -> None:
    """Raise UnsupportedError if the variant has a feature that no chunk plan supports, whatever its weight."""
    if graph.branches > 1:
        refuse(graph, "score", f"there are {graph.branches} branches, each with weights of its own")
    if phases(graph).made:
        refuse(graph, "weight", "it reads what another op makes of all queries first")
    if graph.value is not None:
        refuse(graph, "out", "v is a part of k, whose gradient has both parts")
    if any(s.expr.has(detach) for s in graph.stages):
        refuse(graph, "weight", "a part of it is held constant for the gradient")


def _refuse_sums(graph: VariantGraph) -> None:
    """Raise UnsupportedError if a sum over the head dimension is neither a dot product nor a factor of one token."""
    for stage in graph.sums_d:
        if kind_of(stage) in ("pair", "band"):
            refuse(graph, "raw_score", f"sum_d({formula(stage.expr)}) does not split into a query's and a key's part")
    for stage in graph.sums_d:
        if kind_of(stage) in ("q_term", "k_term") and stage.expr.atoms(Read):
            refuse(graph, "raw_score", f"sum_d({formula(stage.expr)}) reads an input: no factor of a token does")
        places = sorted({s.name for s in stage.expr.free_symbols} & set(sym.INDICES))
        if kind_of(stage) in ("q_term", "k_term") and places:
            refuse(graph, "raw_score", f"sum_d({formula(stage.expr)}) reads '{places[0]}' beside the vector")


def _one_decay(graph: VariantGraph, monomials: _Monomials) -> tuple[sympy.Expr, bool]:
    """The decay D(t) that all terms of the weight share, and whether it is read late. UnsupportedError: they differ."""
    decays = {(m.decay, m.late) for terms in monomials.values() for m in terms}
    if len(decays) > 1:
        texts = " and ".join(sorted(f"exp({formula(d)})" for d, _ in decays))
        refuse(graph, "weight", f"terms of the weight decay differently: {texts}")
    return decays.pop()


def _one_dot(graph: VariantGraph, weight: sympy.Expr, monomials: _Monomials) -> tuple[sympy.Symbol, int]:
    """The dot product that the weight is a polynomial of, and its degree. UnsupportedError: there are several or none,
    or the degree is above 2."""
    degree = max(sum(n for _, n in power) for power in monomials)
    if degree > 2:
        refuse(
            graph, "weight", f"'{formula(weight)}' has degree {degree} in the score, whose state is Dqk^{degree} x Dv"
        )
    dots = sorted({dot for power in monomials for dot, _ in power}, key=str)
    if len(dots) != 1:
        what = f"the dot products {', '.join(map(str, dots))}, a state each" if dots else "no dot product"
        refuse(graph, "weight", f"'{formula(weight)}' has {what}")
    return dots[0], degree


def at_origin(graph: VariantGraph, error: UnsupportedError) -> UnsupportedError:
    """The refusal of a weight, attributed to the first stage at which the formula no longer separates."""
    core = whole(similarity(graph)).core
    raw = core["raw_score"].expr
    made = {"raw_score": raw, "score": core["score"].expr.xreplace({sym.RAW_SCORE: raw})}
    if error.stage == "normalizer":
        for stage, expr in made.items():
            if not _splits(graph, _seen_through(expr)):
                name = "similarity" if stage == "raw_score" else stage
                return UnsupportedError(error.reason, stage=name, span=graph[stage].span, remedy=error.remedy)
    return error


def _splits(graph: VariantGraph, expr: sympy.Expr) -> bool:
    """Whether it is a polynomial of dot products, with factors that depend on the query or on the key."""
    try:
        monomials = _monomials(graph, expr, _mask(graph)[0], strict=False)
        for terms in monomials.values():
            _factored(graph, terms)
    except UnsupportedError:
        return False
    return max(sum(n for _, n in power) for power in monomials) <= 2


def _mask(graph: VariantGraph) -> tuple[bool, bool]:
    """(causal, whether a query sees its own token), for a mask that shows the keys up to the query, those before it, or
    every key. Raises UnsupportedError for others."""
    mask = graph["mask"].expr
    if mask is sympy.true:
        return False, True
    ends = sym.Q_IDX + sym.KV_LEN - sym.Q_LEN
    for end in (ends, sym.Q_IDX):
        if mask in (sympy.Le(sym.KV_IDX, end), sympy.Ge(end, sym.KV_IDX)):
            return True, True
        if mask in (sympy.Lt(sym.KV_IDX, end), sympy.Gt(end, sym.KV_IDX)):
            return True, False
    refuse(graph, "mask", f"'{formula(mask)}' shows neither every key nor the keys up to the query")


def _apart(graph: VariantGraph, weight: sympy.Expr, causal: bool, itself: bool) -> tuple[sympy.Expr, Parts | None]:
    """The weight of the tokens before a token; and both parts, if the token itself has another weight, else None."""
    if not causal or (itself and not positions(weight)):
        return weight, None
    parts = apart(weight)
    if not isinstance(parts, Parts):
        refuse(graph, "weight", f"the condition '{formula(parts)}' is neither of the token itself nor of all before it")
    return parts.past, parts if itself else Parts(parts.past, sympy.S.Zero)


def _own(parts: Parts, dots: tuple[Dot, ...], gain: sympy.Expr, late: bool) -> sympy.Expr:
    """The weight of a token's own value, minus its weight in the sum over the keys, unless this leaves it out."""
    sums = {dot.symbol: sum_d(token(dot.left * dot.right, True)) for dot in dots}
    sums[sym.QK] = sum_d(sym.Q_VEC * sym.K_VEC)

    def at_itself(weight: sympy.Expr) -> sympy.Expr:
        return token(weight, True).xreplace(sums)

    return gain * (at_itself(parts.own) - (0 if late else at_itself(parts.past)))


def _without_maxima(graph: VariantGraph, online: Online) -> Online:
    """The same output with every row maximum replaced by 0: they only keep exp in range."""
    if not shift_invariant(online):
        text = formula(graph["weight"].expr)
        refuse(graph, "weight", f"'{text}' depends on the row maximum, which is no sum over the keys")
    nothing = dict.fromkeys(online.max_symbols, sympy.S.Zero)

    def settled(r: Running) -> Running:
        return replace(r, term=r.term.subs(nothing), rescale=sympy.S.One)

    numerator, sums = settled(online.numerator), tuple(map(settled, online.sums))
    return replace(online, maxes=(), numerator=numerator, sums=sums, scale=online.scale.subs(nothing))


def _counted(online: Online, causal: bool, itself: bool) -> Online:
    """The same with the number of keys that a query sees, row.count(), computed from the query's position. It is 1 for
    a query without keys, where the dividend is 0."""
    counts = [r for r in online.sums if r.term == 1]
    count = sym.Q_IDX + sym.KV_LEN - sym.Q_LEN + int(itself) if causal else sym.KV_LEN
    seen = {r.symbol: count if causal and itself else maximum(count, 1) for r in counts}
    sums = tuple(r for r in online.sums if r not in counts)
    return replace(online, sums=sums, scale=online.scale.xreplace(seen), coefficient=online.coefficient.xreplace(seen))


def _weight(core: VariantGraph, term: sympy.Expr) -> sympy.Expr:
    """The factor of v, as an expression over dot products and inputs."""
    score = core["score"].expr.xreplace({sym.RAW_SCORE: core["raw_score"].expr})
    return _seen_through(term.xreplace({sym.SCORE: score}))


def _seen_through(weight: sympy.Expr) -> sympy.Expr:
    """The weight rewritten for algebra: powers that vary as exponentials, without conversions of integers to float."""
    weight = weight.replace(lambda e: isinstance(e, to_float) and e.args[0].is_integer, lambda e: e.args[0])
    # gamma ** (i - j) is a decay, too; the root of a nonnegative product is a product of roots
    return sympy.expand_power_base(weight).replace(
        lambda e: e.is_Pow and e.base is not sympy.E and level(e.exp) != Level.PROGRAM,
        lambda e: sympy.exp(e.exp * sympy.log(e.base)),
    )


def _monomials(graph: VariantGraph, weight: sympy.Expr, causal: bool, strict: bool) -> _Monomials:
    """The weight expanded: the terms of each power of dot products."""
    found: _Monomials = defaultdict(list)
    for term in sympy.Add.make_args(sympy.expand(weight, log=False, basic=False, power_exp=False)):
        powers: list[tuple[sympy.Symbol, int]] = []
        row, col, exponent = sympy.S.One, sympy.S.One, sympy.S.Zero
        for factor in sympy.Mul.make_args(term):
            base, power = factor.as_base_exp()
            at = level(factor)
            if isinstance(factor, sympy.exp):
                exponent += factor.args[0]
            elif at == Level.COL:
                col *= factor
            elif at != Level.PAIR:
                row *= factor
            elif isinstance(base, sympy.Symbol) and power.is_Integer and power > 0:
                powers.append((base, int(power)))
            else:
                refuse(graph, "weight", f"the factor '{formula(factor)}' depends on query and key together")
        found[tuple(sorted(powers, key=str))].append(monomial(graph, exponent, row, col, causal, strict))
    return found


def _factored(graph: VariantGraph, terms: list[Monomial]) -> tuple[sympy.Expr, sympy.Expr]:
    """A sum of row * col as one product (row's, column's)."""
    if len(terms) == 1:
        return terms[0].row, terms[0].col
    rows, cols = {m.row for m in terms}, {m.col for m in terms}
    if len(cols) == 1:
        return sympy.Add(*(m.row for m in terms)), cols.pop()
    if len(rows) == 1:
        return rows.pop(), sympy.Add(*(m.col for m in terms))
    query = sympy.Dummy("query", integer=True, nonnegative=True)
    # if the mask is causal, a query's position is over T
    place = sym.Q_IDX if any(sym.Q_IDX in m.row.free_symbols for m in terms) else T
    total = sympy.factor(sympy.Add(*(m.row.subs(place, query) * m.col for m in terms)))
    row, col = sympy.S.One, sympy.S.One
    for factor in sympy.Mul.make_args(total):
        if {query, T} <= factor.free_symbols:
            shown = formula(total.subs(query, sym.Q_IDX))
            refuse(graph, "weight", f"the factor '{shown}' is no product of a query's and a key's part")
        if T in factor.free_symbols:
            col *= factor
        else:
            row *= factor.subs(query, place)
    return row, col


def _squared(
    graph: VariantGraph, terms: dict[int, list[Monomial]]
) -> tuple[sympy.Expr, sympy.Expr, tuple[sympy.Expr, sympy.Expr, sympy.Expr]]:
    """row, col and (p_0, p_1, p_2): the weight as a polynomial in s = row * col * dot, the same for the whole call."""
    first, col = _factored(graph, terms[1]) if 1 in terms else (sympy.S.One, sympy.S.One)
    p_1, row = _program(first)
    found = []
    for degree, factor in ((0, sympy.S.One), (2, row**2 * col**2)):
        ratio = sympy.S.Zero
        if degree in terms:
            of_row, of_col = _factored(graph, terms[degree])
            ratio = sympy.powsimp(of_row * of_col / factor)
            ratio = ratio if level(ratio) == Level.PROGRAM else sympy.cancel(ratio)
        if level(ratio) != Level.PROGRAM or ratio.atoms(Read):
            of_first = f", where the part of degree 1 has '{formula(first * col)}'" if 1 in terms else ""
            refuse(
                graph, "weight", f"the part of degree {degree} has the factor '{formula(of_row * of_col)}'{of_first}"
            )
        found.append(ratio)
    return row, col, (found[0], p_1 if 1 in terms else sympy.S.Zero, found[1])


def _program(row: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """A factor as (the part that is the same for the whole call, the rest)."""
    constant, rest = sympy.S.One, sympy.S.One
    for f in sympy.Mul.make_args(row):
        varies = {s.name for s in f.free_symbols} & {"b", "h", "h_kv", "q_idx", "kv_idx"}
        if varies or f.atoms(Read):
            rest *= f
        else:
            constant *= f
    return constant, rest


def _base(graph: VariantGraph, online: Online) -> sympy.Expr:
    """The summand of TOTAL: the term of the row sum in G, or the factor of v if there is none."""
    used = [r for r in online.sums if r.symbol in (online.coefficient * online.scale).free_symbols]
    for running in used:
        if _multiple(online.numerator.term, running.term) is None:
            refuse(
                graph,
                "weight",
                f"row.sum({formula(running.term)}) is no multiple of the sum of '{formula(online.numerator.term)}'",
            )
    return used[0].term if used else online.numerator.term


def _multiple(term: sympy.Expr, of: sympy.Expr) -> sympy.Expr | None:
    """term / of, if it is the same for a whole row, else None."""
    ratio = sympy.cancel(sympy.expand(term) / sympy.expand(of))
    return ratio if join(level(ratio), Level.ROW) == Level.ROW else None


def _scale(graph: VariantGraph, online: Online, base: sympy.Expr, causal: bool) -> tuple[sympy.Expr, sympy.Expr]:
    """G as (a factor of a token, a function of TOTAL)."""
    scale = online.coefficient * online.scale * _multiple(online.numerator.term, base)
    for running in online.sums:
        if running.symbol in scale.free_symbols:
            scale = scale.subs(running.symbol, TOTAL * _multiple(running.term, base))
    gain, rest = sympy.S.One, sympy.S.One
    for factor in sympy.Mul.make_args(scale):
        if TOTAL in factor.free_symbols:
            rest *= factor
        else:
            gain *= factor
    if rest.free_symbols - {TOTAL}:
        refuse(graph, "weight", f"'{formula(rest)}' has the row sum and other values in one factor")
    return token(gain, causal), rest


def _recurrence(plan: Linear) -> tuple[str, ...]:
    """The recurrent form, as text."""
    decay = f"exp({_show(plan.step)})"
    factor = {"none": "", "channel": f"diag({decay}) "}.get(plan.decay, f"{decay} * ")
    key = "k" if plan.right == sym.K_VEC else "f(k)"
    key = key if plan.col == 1 else f"({formula(plan.col)}) * {key}"
    query = "q" if plan.left == sym.Q_VEC else "f(q)"
    ones = ("[{}, 1]" if plan.bias else "{}").format(key), "[v, 1]" if plan.total else "v"
    state = "state_(t-1)" if plan.late else "state_t"
    read = f"{query} {state}" if not plan.bias else f"[{query}, 1] {state}"
    if plan.powers is not None:
        query = query if plan.row == 1 else f"({formula(plan.row)}) * {query}"
        ones = f"features({key})", "[v, 1]"
        numbers = ", ".join(map(formula, plan.powers))
        read = f"(p . features({query})) state_t, features(x) = [1, x, x (x) x], p = [{numbers}]"
    if not plan.causal:
        return (f"state = sum over the keys of {ones[0]} {ones[1]}'", f"out_t = {_times(plan)}{read}")
    return (
        f"state_t = {factor}state_(t-1) + {ones[0]} {ones[1]}'",
        f"out_t = {_times(plan)}{read}" + ("" if plan.own in (None, 0) else f" + ({formula(plan.own)}) * v_t"),
    )


def _times(plan: Linear) -> str:
    factor = plan.gain * plan.scale * (plan.constant * plan.row if plan.powers is None else 1)
    return "" if factor == 1 else f"({formula(factor)}) * "


def _show(expr: sympy.Expr | None) -> str:
    return "" if expr is None else formula(expr)
