"""Template slots of the forward: its last pass over the keys, and the sweeps before it.

The parts of a plan, one per branch, are computed side by side in the last pass; each has its own sweeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy

from attncc.codegen.backward import WHOLE
from attncc.codegen.bounds import BoundLines, bound_lines
from attncc.codegen.chunks import Chunk
from attncc.codegen.lower import Leaf, Lowering
from attncc.codegen.offsets import LEAVES, PLACE, RUNNING, split_distances, uses_tiles
from attncc.codegen.pairs import base_leaves, blank_tile, edge, shown_masks, similarity_slots, take, visible_lines
from attncc.codegen.plan import Plan
from attncc.codegen.similarity import QUERY, SimilaritySlots
from attncc.codegen.statements import set_names
from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc
from attncc.ir.levels import Level
from attncc.ir.text import formula
from attncc.ir.vocabulary import Read
from attncc.passes.distances import NO_TABLES, Tables
from attncc.passes.fold import S, exp2, with_sign
from attncc.passes.reverse import first_at, ties, trimmed
from attncc.passes.stream import LSE, Implicit, Online, Running, Sweep, renamed

#: the initial running maximum: below every score, and finite, so that no difference of two maxima is NaN
NEGATIVE = "-1.0e30"
#: the most sweeps for one implicit value: twice what bisection alone would take to float32's precision
MOST_TURNS = 50
#: the slots of a chain that hold lines
_OF_A_FUNCTION = ("score_lines", "peak_lines", "max_lines", "weight_lines", "rescale_lines", "sum_lines")
#: the name of the part of a score that is the same for all keys of a row in a tile
ROW_OFFSET = "row_offset"


@dataclass(frozen=True)
class _Terms:
    """The expressions of one loop over the keys for one part, in the unit of its score: the `operands` of the running
    maxima, the accumulated `terms` (in the last pass, first that of the output row), and the factors `rescales` that
    rescale the accumulations."""

    part: Plan
    maxima: tuple[sympy.Symbol, ...]
    runnings: tuple[Running, ...]
    score: Any
    operands: list[Any]
    terms: list[Any]
    rescales: list[Any]
    scaled: Any
    #: the part of the score that is the same for all keys of a row in a tile, if it is added to the row's maximum
    #: instead of each score; `score` leaves it out
    row_part: Any = sympy.S.Zero
    #: whether masked pairs may be hidden by -inf in the maximum's operand (`peak`), if that is not the score
    by_peak: bool = False

    @property
    def vanishes(self) -> bool:
        """Whether a score of -inf suffices to mask a pair: every term is exp2(score - m), every maximum a score's."""
        s = sympy.Symbol(self.part.own(S.name), real=True)
        return all(_vanishes(t, s) for t in self.terms) and all(o == self.scaled for o in self.operands)

    @property
    def peak(self) -> Any:
        """The operand of the only maximum, if it is not the score, and -inf in its place hides a pair; else None."""
        if not self.by_peak or len(self.operands) != 1 or self.operands[0] == self.scaled:
            return None
        (peak,) = self.operands
        stand_in = sympy.Dummy("peak", real=True)
        return peak if all(_ends(t.xreplace({peak: stand_in}), stand_in) for t in self.terms) else None

    @property
    def side(self) -> Any:
        """The expression whose sign the weights take, if no sum needs signed weights; else None. The sign is applied
        when weights are rounded for their matmul. Until then only signs are kept, besides the tile of peaks."""
        lead = None if self.peak is None else self.terms[0]
        return lead.args[1] if isinstance(lead, with_sign) else None


def _terms(part: Plan, step: Sweep | Online) -> _Terms:
    folded, maxima = part.folded, step.max_symbols
    to_new = {m: renamed(m) for m in maxima}
    runnings = (step.numerator, *step.sums) if isinstance(step, Online) else step.sums
    return _Terms(
        part,
        maxima,
        runnings,
        part.tagged(folded.score),
        [part.tagged(folded.maximum_of(g)) for _, g in step.maxes],
        [part.tagged(folded.apply_online(r.term.xreplace(to_new), maxima)) for r in runnings],
        [part.tagged(folded.apply_online(r.rescale, maxima)) for r in runnings],
        part.tagged(folded.unit * S),
    )


def _by_tile(t: _Terms, lowering: Lowering) -> _Terms:
    """The same terms with distances split by tile, and with `row_part` split off if `vanishes` holds."""
    score = split_distances(lowering.tables.apart(t.score, PLACE))
    if not t.vanishes:
        return replace(t, score=score, by_peak=True)
    shared = [e for e in sympy.Add.make_args(score) if lowering.level_of(e) in (Level.PROGRAM, Level.ROW)]
    row_part = sympy.Add(*shared)
    if row_part == 0:
        return replace(t, score=score)
    s = sympy.Symbol(t.part.own(S.name), real=True)
    offset = sympy.Symbol(t.part.own(ROW_OFFSET), real=True)
    terms = [exp2(sympy.expand(term.args[0].xreplace({s: s + offset}))) for term in t.terms]
    return replace(t, score=score - row_part, row_part=row_part, terms=terms)


def forward_slots(
    plan: Plan,
    qk_chunks: tuple[Chunk, ...],
    hopper: bool = False,
    own: dict[str, Leaf] | None = None,
    tables: Tables = NO_TABLES,
    fades: bool = False,
) -> dict[str, Any]:
    """Slots of forward.py.j2. own: leaves that this kernel has at another level than most kernels; tables: functions of
    the distance that it reads from tables; fades: maxima also change for keys that another warpgroup weighs.

    hopper: for kernels in which several warpgroups share a block of rows. Bounds that need a whole block are then found
    by a separate kernel, distances are split by tile, and the part of a score that is the same for all keys of a row is
    added to the row's maximum. Values per key are listed in `streamed`, so that another warp can read them early; loads
    per pair are listed in `ahead`, to be issued before the scores.
    """
    own = own or {}
    steps = [(part, i) for part in plan.parts for i in range(len(part.online.before))]
    running = [_running_names(part, part.online.before[i]) for part, i in steps]
    last = frozenset().union(*(_running_names(part, part.online) for part in plan.parts))
    running.append(last | {part.own(ROW_OFFSET) for part in plan.parts})
    rows = {name: Leaf(name, Level.ROW) for names in running for name in names}
    similarity = SimilaritySlots(plan)
    leaves = {**base_leaves(plan, rows), **(LEAVES if hopper else {}), **own}
    lowering = first = Lowering(plan.core, leaves, running=running[0] | RUNNING, tables=tables)
    if hopper:
        lowering.streamed, lowering.ahead, lowering.maps, lowering.whole = [], [], [], "whole"
        lowering.fragments = True
    elif not own:
        lowering.whole = WHOLE
    sweeps: list[dict[str, Any]] = []
    bounds: BoundLines | None = None
    for (part, i), following in zip(steps, running[1:], strict=True):
        if bounds is None:
            lowering.count([part.tagged(part.folded.score), part.graph["mask"].expr])
            bounds = bound_lines(plan.over_keys, lowering, "BLOCK_N", "q_idx < q_len", hopper)
        lowering.blank = blank_tile(similarity, True, part)
        sweeps.append(_sweep_slots(part, i, lowering, between=lowering.outer if sweeps else []))
        lowering = lowering.next_sweep(following | RUNNING)
    computed = [_terms(part, part.online) for part in plan.parts]
    if hopper:
        computed = [_by_tile(t, lowering) for t in computed]
    for t in computed:
        lowering.count([t.score, t.row_part, t.part.graph["mask"].expr, *t.operands, *t.terms])
        lowering.count(t.terms[1:])  # equal terms are one value however often they are accumulated
    if bounds is None:
        bounds = bound_lines(plan.over_keys, lowering, "BLOCK_N", "q_idx < q_len", hopper)
    chains = []
    for t, (part, visible, fresh) in zip(computed, shown_masks(plan), strict=True):
        lowering.blank = blank_tile(similarity, True, part)
        chains.append(_chain(t, lowering, visible, fresh, "p"))
        if hopper and part.tag:  # each branch is a function, which does not see the others' names
            own_lines = [x for key in _OF_A_FUNCTION for x in chains[-1][key]]
            lowering.forget(set_names(own_lines))
    if fades:  # in a scope of its own, because it runs separately from the lines of a tile
        alone = lowering.next_sweep(running[-1])
        for chain, t in zip(chains, computed, strict=True):
            chain["fade_lines"] = _fade_lines(t, alone)
        lowering.outer += alone.outer
    after = lowering.after_loop()
    for chain, t in zip(chains, computed, strict=True):
        chain.update(end_slots(t.part, after))
    return {
        "bounds": bounds,
        **similarity_slots(similarity, QUERY, qk_chunks, first, base_leaves(plan, own)),
        "outer": first.outer,
        "streamed": first.streamed,
        "ahead": first.ahead,
        "maps": first.maps or [],
        "tables": tables.count,
        "sweeps": sweeps,
        "between": lowering.outer if sweeps else [],
        "chains": chains,
        "negative": NEGATIVE,
        "helpers": first.helpers,
    }


def _chain(t: _Terms, lowering: Lowering, visible: str, fresh: bool, lead: str) -> dict[str, Any]:
    """The slots of one part for a tile of scores, up to the accumulated terms, of which `lead` names the first."""
    part, own = t.part, t.part.own
    score = lowering.tile(t.score)
    shown = visible_lines(lowering, part.graph["mask"].expr, [edge("kv_idx", True)], visible) if fresh else []
    score_lines = take(lowering)
    peak_lines: list[str] = []
    peak, hidden = t.peak, own("s") if t.vanishes else None
    if peak is not None:
        hidden = own("shown")
        lowering.assign(hidden, peak, Level.PAIR)
        peak_lines = take(lowering)
    terms, sign_lines = list(t.terms), []
    if t.side is not None:
        lowering.helpers |= {"_side", "_on_side"}
        terms[0] = terms[0].args[0]
        peak_lines.append(f"{own('side')} = _side({lowering.tile(t.side)})")
        sign_lines = [f"{own(lead)} = _on_side({own(lead)}.to(DOT), {own('side')})"]
    max_lines, places, raises = _maximum_lines(t, lowering, visible, hidden is not None)
    weight_lines: list[str] = []
    names: dict[Any, str] = {}
    for k, term in enumerate(terms):
        if term not in names:
            names[term] = own(f"term_{k - 1}" if k else lead)
            lowering.assign(names[term], term, Level.PAIR)
            weight_lines += take(lowering)
    hide = [] if hidden is not None else [f"{n} = tl.where({visible}, {n}, 0.0)" for n in names.values()]
    factor_names, rescale_lines = _factors(t, lowering)
    sums = [
        (own(r.symbol.name), term, rescale)
        for r, term, rescale in zip(t.runnings, terms, t.rescales, strict=True)
        if sym.is_row_name(r.symbol.name)
    ]
    sum_lines = []
    for name, term, rescale in sums:
        kept = f"{name} * {factor_names[rescale]}" if rescale != 1 else name
        sum_lines.append(f"{name} = {kept} + tl.sum({names[term]}, 1)")
    return {
        "tag": part.tag,
        "by_tile": uses_tiles(t.score, t.row_part),
        "text": {k: formula(part.graph[k].expr) for k in ("score", "mask", "weight")},
        "score": score,
        "score_lines": score_lines,
        "visible": visible,
        "show": shown,
        "vanishes": hidden is not None,
        "hidden": hidden,
        "peak_lines": peak_lines,
        "max_lines": max_lines,
        "raises": raises,
        "weight_lines": weight_lines,
        "hide": hide,
        "rescale_lines": rescale_lines,
        "acc_rescale": factor_names.get(t.rescales[0]) if t.rescales else None,
        "sum_lines": sum_lines,
        "sign_lines": sign_lines,
        "moves": [(own(m.name), own(renamed(m).name)) for m in t.maxima],
        "sums": [*(name for name, _, _ in sums), *places],
    }


def _maximum_lines(
    t: _Terms, lowering: Lowering, visible: str, hides_scores: bool
) -> tuple[list[str], list[str], list[tuple[str, str, str]]]:
    """The update of the running maxima by a tile: its lines; the names of the first positions and numbers of ties that
    it updates; and for each other maximum its operand's tile, with the unit (a factor) and the offset that convert it.

    hides_scores: masked pairs have a score of -inf; else each operand is masked here."""
    part, unit = t.part, t.part.tagged(t.part.folded.unit)
    own = part.own
    max_lines, places, raises = list[str](), list[str](), list[tuple[str, str, str]]()
    if t.row_part != 0:
        row_part = lowering.emit(t.row_part, Level.ROW)
        if lowering.level_of(t.row_part) != Level.ROW:  # it is the same for all rows of a head
            row_part = f"tl.full([ROWS], {row_part}, tl.float32, layout=BY_ROW)"
        max_lines = [*take(lowering), f"{own(ROW_OFFSET)} = {row_part}"]
    for number, (m, operand) in enumerate(zip(t.maxima, t.operands, strict=True)):
        # unit is positive, so it can multiply the row's maximum and not every pair
        by_unit = operand == t.scaled and unit != 1
        text = own("s") if operand == t.scaled else lowering.tile(operand)
        factor = f" * {lowering.hoisted(unit)}" if by_unit else ""
        offset = lowering.hoisted(unit * sympy.Symbol(own(ROW_OFFSET), real=True)) if t.row_part != 0 else ""
        factor += f" + {offset}" if offset else ""
        max_lines += take(lowering)
        if not hides_scores:
            name = own(f"shown_{number}")
            max_lines += [f"{name} = {text}", "if phase == 0:"]
            max_lines.append(f'    {name} = tl.where({visible}, {text}, float("-inf"))')
            text = name
        if first_at(m).name in dict(part.stored):
            max_lines += _place_lines(part, m, text, factor)
            places += [own(first_at(m).name), own(ties(m).name)]
        else:
            raises.append((text, lowering.hoisted(unit) if by_unit else "1.0", offset))
            max_lines.append(f"{own(renamed(m).name)} = tl.maximum({own(m.name)}, tl.max({text}, 1){factor})")
    return max_lines, places, raises


def _factors(t: _Terms, lowering: Lowering) -> tuple[dict[Any, str], list[str]]:
    """The names of the factors that rescale accumulations when a maximum changes, and the lines that compute them."""
    own, names, made = t.part.own, dict[Any, str](), list[str]()
    for rescale in t.rescales:
        if rescale != 1 and rescale not in names:
            names[rescale] = own("alpha" if not names else f"alpha_{len(names)}")
            text = lowering.emit(rescale)
            made += take(lowering)
            if not isinstance(rescale, exp2):  # only exp2 is known to be finite at the start, when m is still NEGATIVE
                text = f"tl.where({own(t.maxima[0].name)} > {NEGATIVE}, {text}, 0.0)"
            made.append(f"{names[rescale]} = {text}")
    return names, made


def _fade_lines(t: _Terms, lowering: Lowering) -> list[str]:
    """Lines that rescale a row's sums when a maximum changes because of keys that another warpgroup weighs."""
    names, made = _factors(t, lowering)
    for running, rescale in zip(t.runnings, t.rescales, strict=True):
        if rescale != 1 and sym.is_row_name(running.symbol.name):
            name = t.part.own(running.symbol.name)
            made.append(f"{name} = {name} * {names[rescale]}")
    return made


def end_slots(part: Plan, after: Lowering) -> dict[str, Any]:
    """Slots that finish a part after its last key: the factor of its output row, and the stored row statistics."""
    online, folded, guard = part.online, part.folded, _needs_guard(part)
    maxima = online.max_symbols
    scale = part.tagged(folded.apply_online(online.coefficient * online.scale, maxima))
    stored = [(n, part.tagged(folded.apply_online(e, maxima))) for n, e in part.stored]
    after.count([scale, *(e for _, e in stored)])
    final = after.emit(scale) if scale != 1 else None
    if final is not None and not guard and after.level_of(scale) == Level.ROW:
        final = f"({final})[:, None]"
    final_lines = take(after)
    stores = []
    for name, e in stored:
        text = after.emit(e)
        stores += take(after)
        empty = 'float("-inf")' if name == LSE.name or part.by_reverse else "0.0"
        if guard:
            text = f"tl.where({part.own('alive')}, {text}, {empty})"
        stores.append(f"tl.store({part.own(name).upper()}_PTR + bh * q_len + q_idx, {text}, mask=q_idx < q_len)")
    alive = None if online.before else _alive(part, online) or (f"{part.own('seen')} > 0" if guard else None)
    return {
        "final_lines": final_lines,
        "final": final,
        "guard": guard,
        "alive": alive,
        "count_seen": alive is not None and not maxima,
        "stores": stores,
    }


def _sweep_slots(part: Plan, number: int, lowering: Lowering, between: list[str]) -> dict[str, Any]:
    """Slots of one sweep of a part, for sweep.py.j2. `between`: lines hoisted out of this sweep's loop, which run after
    the previous sweep."""
    sweep, first = part.online.before[number], number == 0
    if sweep.root is not None:
        slots = _root_slots(part, lowering, sweep.root)
    else:
        t = _terms(part, sweep)
        lowering.count([t.score, part.graph["mask"].expr, *t.operands, *t.terms])
        slots = _chain(t, lowering, "visible", True, "term")
        slots |= {"root": None, "after": []}
        if part.folded.log2:  # running maxima are in the score's unit; row statistics are plain numbers
            after = lowering.after_loop()
            for m in sweep.max_symbols:
                text = after.emit(part.tagged(part.folded.apply_online(m, sweep.max_symbols)))
                slots["after"].append(f"{part.own(m.name)} = {text}")
    alive = _alive(part, sweep) or f"{part.own('seen')} > 0"
    return {
        **slots,
        "why": _why(part, number),
        "branch": part.branch,
        "between": between,
        "alive": alive if first else None,
        "count_seen": first and not sweep.max_symbols,
        "negative": NEGATIVE,
    }


def _root_slots(part: Plan, lowering: Lowering, root: Implicit) -> dict[str, Any]:
    """Slots of one step of the search for an implicit value: the sum of its equation, and the sum's derivative."""
    folded, mask, at = part.folded, part.graph["mask"].expr, {sym.UNKNOWN: root.symbol}
    score = part.tagged(folded.score)

    def own(expr: sympy.Expr) -> Any:
        return part.tagged(folded.apply(expr.xreplace(at)))

    factor, slope = trimmed(root.term.diff(sym.UNKNOWN)).as_coeff_Mul()
    term, slope, lo, hi = (own(e) for e in (root.term, slope, root.lo, root.hi))
    lowering.count([score, mask, term, slope, lo, hi])
    ends = [lowering.emit(e, Level.ROW) for e in (lo, hi)]
    score_text = lowering.tile(score)
    visible = visible_lines(lowering, mask, [edge("kv_idx", True)])
    score_lines = take(lowering)
    lowering.assign("term", term, Level.PAIR)
    lowering.assign("slope", slope, Level.PAIR)
    weight_lines = take(lowering)
    after = lowering.after_loop()
    equation_lines = []
    for n, e in zip(_sums_of(root), _equation(root, factor), strict=True):  # the slope reads the sum: compute it first
        text = after.emit(own(e), Level.ROW)
        equation_lines += [*take(after), f"{part.own(n)} = {text}"]
    return {
        "tag": part.tag,
        "score": score_text,
        "score_lines": score_lines,
        "visible": "visible",
        "show": visible,
        "vanishes": False,
        "weight_lines": weight_lines,
        "root": part.own(root.symbol.name),
        "value": part.own(_sums_of(root)[1]),
        "slope": part.own(_sums_of(root)[0]),
        "ends": ends,
        "equation_lines": equation_lines,
        "turns": MOST_TURNS,
        "after": [],
    }


def _sums_of(root: Implicit) -> tuple[str, str]:
    """The names of the derivative of an equation's sum, and of the sum."""
    return f"{root.symbol.name}_slope", f"{root.symbol.name}_value"


def _equation(root: Implicit, factor: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """The equation's derivative and value, given the sum of the term's derivative divided by `factor`, and of the term.

    The equation "a sum of p-th powers is c" is replaced by "its p-th root, a norm, is c^(1/p)": the norm is nearly
    linear, so that Newton's method takes few steps, while the sum of powers would need many.
    """
    slope, total = (sympy.Symbol(n, real=True) for n in _sums_of(root))
    slope = factor * slope + root.rest.diff(sym.UNKNOWN)
    base, power = root.term.as_base_exp()
    if power.is_number and power > 1 and base.is_nonnegative and root.rest.is_number and root.rest < 0:
        return slope * total ** (1 / power - 1) / power, total ** (1 / power) - (-root.rest) ** (1 / power)
    return slope, total + root.rest


def _place_lines(part: Plan, m: sympy.Symbol, text: str, factor: str) -> list[str]:
    """Lines that update a running maximum, the first key that attains it, and the number of keys that do. They are kept
    if a gradient passes through the maximum."""
    first, count, new, old = (part.own(s.name) for s in (first_at(m), ties(m), renamed(m), m))
    return [
        f"best = tl.max({text}, 1)",
        f"attains = {text} == best[:, None]",
        f"{new} = tl.maximum({old}, best{factor})",
        "attained_at = tl.min(tl.where(attains, kv_idx[None, :], 2147483647), 1).to(tl.float32)",
        "attained = tl.sum(tl.where(attains, 1.0, 0.0), 1)",
        f"{first} = tl.where({new} > {old}, attained_at, {first})",
        f"{count} = tl.where({new} > {old}, 0.0, {count}) + tl.where(best{factor} == {new}, attained, 0.0)",
    ]


def _why(part: Plan, number: int) -> str:
    """The purpose of one of several passes over the keys, as a comment."""
    sweep, passes = part.online.before[number], part.online.passes
    names: Sequence[str] = [s.name for s in (*sweep.max_symbols, *(r.symbol for r in sweep.sums))]
    what = f"{sweep.root.symbol.name}, swept for until it is found" if sweep.root else ", ".join(names)
    return f"pass {number + 1} of {passes} over the keys: {what}"


def _running_names(part: Plan, step: Sweep | Online) -> frozenset[str]:
    """The row values that change inside a step's loop, by their names in the kernel."""
    names = {r.symbol.name for r in step.sums}
    for m in step.max_symbols:
        names |= {m.name, renamed(m).name, *({first_at(m).name, ties(m).name} & dict(part.stored).keys())}
    if isinstance(step, Sweep) and step.root is not None:
        names |= {step.root.symbol.name, *_sums_of(step.root)}
    return frozenset(map(part.own, names))


def _alive(part: Plan, step: Sweep | Online) -> str | None:
    """The condition that a row has seen a key, if a running maximum tells; else None."""
    return f"{part.own(step.max_symbols[0].name)} > {NEGATIVE}" if step.max_symbols else None


def vanishes(part: Plan) -> bool:
    """Whether a score of -inf, or a peak of -inf without a score kept beside it, hides a pair in the last pass."""
    t = _terms(part, part.online)
    return t.vanishes or replace(t, by_peak=True).side is not None


def _ends(term: Any, peak: sympy.Symbol) -> bool:
    """Whether the term is 0 if `peak` is -inf, whatever the other values are."""
    if isinstance(term, with_sign):
        return _ends(term.args[0], peak)
    number, rest = term.as_coeff_Mul()
    return number == 0 or _vanishes(rest, peak)


def _vanishes(term: Any, s: sympy.Symbol) -> bool:
    """Whether the term is exp2(k * s - a row value), which is 0 at a score s of -inf."""
    if not isinstance(term, exp2):
        return False
    coefficient = sympy.expand(term.args[0]).coeff(s)
    rest = sympy.expand(term.args[0] - coefficient * s)
    if any(e.atoms(Read) for e in sympy.Add.make_args(rest) if not _is_subtracted_maximum(e)):
        return False  # an input's value may be infinite, too
    return bool(coefficient.is_positive) and s not in rest.free_symbols and sym.KV_IDX not in rest.free_symbols


def _is_subtracted_maximum(e: Any) -> bool:
    """Whether e is a negative multiple of a maximum of two values, of which one is never infinite. Then e is never plus
    infinity, whatever the other value is."""
    for f in sympy.Mul.make_args(e):
        if isinstance(f, voc.maximum):
            return bool((e / f).is_negative) and any(not a.atoms(Read) for a in f.args)
    return False


def _needs_guard(plan: Plan) -> bool:
    """Whether a row that has seen no key needs a guard: finishing it may divide by 0, or its statistic must be -inf."""
    return bool(plan.stored) or bool(plan.online.sums) or bool(plan.online.before)
