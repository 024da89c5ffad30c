"""The slots of each kernel's template, filled with lines from the passes' facts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy

from attncc.codegen.bounds import BoundLines, bound_lines, summary_offset
from attncc.codegen.chunks import Chunk
from attncc.codegen.lower import Leaf, Lowering
from attncc.codegen.offsets import LEAVES, RUNNING, split_distances, uses_tiles
from attncc.codegen.plan import InputGradient, Plan
from attncc.codegen.similarity import KEY, QUERY, Side, SimilaritySlots
from attncc.ir import symbols as sym
from attncc.ir.levels import Level
from attncc.ir.text import formula
from attncc.passes.differentiate import DELTA, DP
from attncc.passes.fold import LN2, S, exp2
from attncc.passes.stream import LSE, renamed
from attncc.passes.tiles import TilePlan

#: where a running maximum starts: below every score, and finite, so that no difference of two is NaN
NEGATIVE = "-1.0e30"


#: the name of what a score adds to all keys of a row in a tile
ROW_OFFSET = "row_offset"


def base_leaves(plan: Plan, extra: dict[str, Leaf]) -> dict[str, Leaf]:
    """What every kernel's formulas may use: indices, lengths, scalars, and the sums over the head dimension."""
    program = {"b": "b", "h": "h", "h_kv": "h_kv", "q_len": "q_len", "kv_len": "kv_len", "num_heads": "heads"}
    leaves = {name: Leaf(text, Level.PROGRAM) for name, text in program.items()}
    leaves["scale"] = Leaf("scale", Level.PROGRAM)
    leaves[LN2.name] = Leaf("ln2", Level.PROGRAM)
    for scalar in plan.graph.scalars:
        leaves[scalar.name] = Leaf(scalar.name, Level.PROGRAM)
    leaves["q_idx"] = Leaf("q_idx", Level.ROW)
    leaves["kv_idx"] = Leaf("kv_idx", Level.COL)
    for part in plan.parts:
        for name in ("qk", S.name, *(dot.name for dot in part.similarity.dots)):
            leaves[part.own(name)] = Leaf(part.own(name), Level.PAIR)
    return {**leaves, **extra}


def _visible(lowering: Lowering, mask: Any, edges: list[str], name: str = "visible") -> list[str]:
    """Lines that compute `visible` in a tile that the mask, or the edge of a tensor, cuts."""
    scope = lowering.branch()
    conditions = list(edges)
    if mask is not sympy.true:
        conditions.append(scope.emit(mask, Level.PAIR))
    return [*scope.body, f"{name} = {' & '.join(conditions)}"]


def _shown(plan: Plan) -> list[tuple[Plan, str, bool]]:
    """Each part with the name of what its mask shows, and whether that is computed for it: equal masks share it."""
    own = len(plan.masks) > 1
    return [(part, part.own("visible") if own else "visible", own or i == 0) for i, part in enumerate(plan.parts)]


def _edge(axis: str, rows_first: bool) -> str:
    length = {"q_idx": "q_len", "kv_idx": "kv_len"}[axis]
    first = (axis == "q_idx") == rows_first
    return f"({axis} < {length}){'[:, None]' if first else '[None, :]'}"


@dataclass(frozen=True)
class _Terms:
    """What the forward computes for one part, in the unit of its score: operands of the running maxima, accumulated
    terms (that of the output row first) and the factors that rescale them."""

    part: Plan
    score: Any
    operands: list[Any]
    terms: list[Any]
    rescales: list[Any]
    scaled: Any
    #: what the score adds to all keys of a row in a tile, where that joins the row's maximum; `score` is without it
    row_part: Any = sympy.S.Zero

    @property
    def vanishes(self) -> bool:
        """Where everything is exp2(score - m), a hidden score of -inf does all that a mask must do."""
        s = sympy.Symbol(self.part.own(S.name), real=True)
        return all(_vanishes(t, s) for t in self.terms) and all(o == self.scaled for o in self.operands)


def _terms(part: Plan) -> _Terms:
    online, folded = part.online, part.folded
    maxima = online.max_symbols
    to_new = {m: renamed(m) for m in maxima}
    accumulated = (online.numerator, *online.sums)
    return _Terms(
        part,
        part.tagged(folded.score),
        [part.tagged(folded.maximum_of(g)) for _, g in online.maxes],
        [part.tagged(folded.apply_online(r.term.xreplace(to_new), maxima)) for r in accumulated],
        [part.tagged(folded.apply_online(r.rescale, maxima)) for r in accumulated],
        part.tagged(folded.unit * S),
    )


def _by_tile(t: _Terms, lowering: Lowering) -> _Terms:
    """The same with distances taken apart by tile, and with `row_part` split off where that is enough."""
    score = split_distances(t.score)
    if not t.vanishes:
        return replace(t, score=score)
    shared = [e for e in sympy.Add.make_args(score) if lowering.level_of(e) in (Level.PROGRAM, Level.ROW)]
    row_part = sympy.Add(*shared)
    if row_part == 0:
        return replace(t, score=score)
    s = sympy.Symbol(t.part.own(S.name), real=True)
    offset = sympy.Symbol(t.part.own(ROW_OFFSET), real=True)
    terms = [exp2(sympy.expand(term.args[0].xreplace({s: s + offset}))) for term in t.terms]
    return replace(t, score=score - row_part, row_part=row_part, terms=terms)


def forward_slots(plan: Plan, qk_chunks: tuple[Chunk, ...], hopper: bool = False) -> dict[str, Any]:
    """Slots of forward.py.j2. hopper: for kernels in which several groups of warps share a block of rows.

    There, bounds that need a whole block are found apart, distances are taken apart by tile, and what a score adds to
    all keys of a row joins the row's maximum.
    """
    extra = {}
    for part in plan.parts:
        for m in part.online.max_symbols:
            extra[part.own(m.name)] = Leaf(part.own(m.name), Level.ROW)
            extra[part.own(renamed(m).name)] = Leaf(part.own(renamed(m).name), Level.ROW)
        for r in part.online.sums:
            extra[part.own(r.symbol.name)] = Leaf(part.own(r.symbol.name), Level.ROW)
        extra[part.own(ROW_OFFSET)] = Leaf(part.own(ROW_OFFSET), Level.ROW)
    similarity, running = SimilaritySlots(plan), frozenset(extra) | RUNNING
    leaves = {**base_leaves(plan, extra), **(LEAVES if hopper else {})}
    lowering = Lowering(plan.core, leaves, running=running, blank=_blank(similarity, rows_first=True))
    computed = [_terms(part) for part in plan.parts]
    if hopper:
        computed = [_by_tile(t, lowering) for t in computed]
    for t in computed:
        lowering.count([t.score, t.row_part, t.part.graph["mask"].expr, *t.operands, *t.terms])
        _prefer_shared(lowering, t.terms)
    bounds = bound_lines(plan.over_keys, lowering, "BLOCK_N", "q_idx < q_len", hopper)
    chains = [
        _forward_chain(t, lowering, visible, fresh)
        for t, (_, visible, fresh) in zip(computed, _shown(plan), strict=True)
    ]
    after = lowering.after_loop()
    for chain, t in zip(chains, computed, strict=True):
        chain.update(_forward_end(t.part, after))
    return {
        "bounds": bounds,
        **_similarity_slots(similarity, QUERY, qk_chunks, lowering, base_leaves(plan, {})),
        "outer": lowering.outer,
        "chains": chains,
        "negative": NEGATIVE,
        "helpers": lowering.helpers,
    }


def _forward_chain(t: _Terms, lowering: Lowering, visible: str, fresh: bool) -> dict[str, Any]:
    """What one part does with a tile of its scores, up to its share of the accumulation."""
    part, online, unit = t.part, t.part.online, t.part.tagged(t.part.folded.unit)
    own = part.own
    score = lowering.tile(t.score)
    shown = _visible(lowering, part.graph["mask"].expr, [_edge("kv_idx", True)], visible) if fresh else []
    score_lines = _take(lowering)
    max_lines = []
    if t.row_part != 0:
        offset = lowering.emit(t.row_part, Level.ROW)
        max_lines = [*_take(lowering), f"{own(ROW_OFFSET)} = {offset}"]
    for number, ((m, _), operand) in enumerate(zip(online.maxes, t.operands, strict=True)):
        # unit is positive, so it can multiply the row's maximum and not every pair
        by_unit = operand == t.scaled and unit != 1
        text = own("s") if operand == t.scaled else lowering.tile(operand)
        factor = f" * {lowering.hoisted(unit)}" if by_unit else ""
        if t.row_part != 0:
            factor += f" + {lowering.hoisted(unit * sympy.Symbol(own(ROW_OFFSET), real=True))}"
        max_lines += _take(lowering)
        if not t.vanishes:
            name = own(f"shown_{number}")
            max_lines += [f"{name} = {text}", "if phase == 0:"]
            max_lines.append(f'    {name} = tl.where({visible}, {text}, float("-inf"))')
            text = name
        max_lines.append(f"{own(renamed(m).name)} = tl.maximum({own(m.name)}, tl.max({text}, 1){factor})")
    lowering.assign(own("p"), t.terms[0], Level.PAIR)
    weight_lines = _take(lowering)
    names = {t.terms[0]: own("p")}
    for k, term in enumerate(t.terms[1:]):
        if term not in names:
            names[term] = own(f"term_{k}")
            lowering.assign(names[term], term, Level.PAIR)
            weight_lines += _take(lowering)
    hide = [] if t.vanishes else [f"{n} = tl.where({visible}, {n}, 0.0)" for n in names.values()]
    factor_names: dict[Any, str] = {}
    rescale_lines = []
    for rescale in t.rescales:
        if rescale != 1 and rescale not in factor_names:
            name = own("alpha" if not factor_names else f"alpha_{len(factor_names)}")
            factor_names[rescale] = name
            text = lowering.emit(rescale)
            rescale_lines += _take(lowering)
            if not isinstance(rescale, exp2):  # only exp2 is known to be finite at the start, when m is still NEGATIVE
                text = f"tl.where({own(online.max_symbols[0].name)} > {NEGATIVE}, {text}, 0.0)"
            rescale_lines.append(f"{name} = {text}")
    sum_lines = []
    for r, term, rescale in zip(online.sums, t.terms[1:], t.rescales[1:], strict=True):
        name = own(r.symbol.name)
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
        "vanishes": t.vanishes,
        "max_lines": max_lines,
        "weight_lines": weight_lines,
        "hide": hide,
        "rescale_lines": rescale_lines,
        "acc_rescale": factor_names.get(t.rescales[0]),
        "sum_lines": sum_lines,
        "moves": [(own(m.name), own(renamed(m).name)) for m in online.max_symbols],
        "sums": [own(r.symbol.name) for r in online.sums],
    }


def _forward_end(part: Plan, after: Lowering) -> dict[str, Any]:
    """What is left of a part when its last key is seen: its row's factor, and the statistics that are stored."""
    online, folded, guard = part.online, part.folded, _needs_guard(part)
    maxima = online.max_symbols
    scale = part.tagged(folded.apply_online(online.coefficient * online.scale, maxima))
    stored = [(n, part.tagged(folded.apply_online(e, maxima))) for n, e in part.stored]
    after.count([scale, *(e for _, e in stored)])
    final = after.emit(scale) if scale != 1 else None
    if final is not None and not guard and after.level_of(scale) == Level.ROW:
        final = f"({final})[:, None]"
    final_lines = _take(after)
    stores = []
    for name, e in stored:
        text = after.emit(e)
        stores += _take(after)
        empty = 'float("-inf")' if name == "lse" else "0.0"
        if guard:
            text = f"tl.where({part.own('alive')}, {text}, {empty})"
        stores.append(f"tl.store({part.own(name).upper()}_PTR + bh * q_len + q_idx, {text}, mask=q_idx < q_len)")
    alive = None
    if maxima:
        alive = f"{part.own(maxima[0].name)} > {NEGATIVE}"
    elif guard:
        alive = f"{part.own('seen')} > 0"
    return {
        "final_lines": final_lines,
        "final": final,
        "guard": guard,
        "alive": alive,
        "count_seen": guard and not maxima,
        "stores": stores,
    }


def _blank(similarity: SimilaritySlots, rows_first: bool) -> str:
    """A tile of zeros."""
    if similarity.has_dot:
        return "tl.zeros_like(qk)"
    return f"tl.zeros([{'BLOCK_M, BLOCK_N' if rows_first else 'BLOCK_N, BLOCK_M'}], tl.float32)"


def _similarity_slots(
    similarity: SimilaritySlots, resident: Side, qk_chunks: tuple[Chunk, ...], kernel: Lowering, base: dict[str, Leaf]
) -> dict[str, Any]:
    """The matmuls of a tile's scores. `resident` is the side whose tile stays while the other streams."""
    streamed = KEY if resident is QUERY else QUERY
    return {
        "has_dot": similarity.has_dot,
        "reads_q": similarity.loads(QUERY),
        "reads_k": similarity.loads(KEY),
        "resident_operands": similarity.operands(resident, qk_chunks, kernel, base),
        "streamed_operands": similarity.operands(streamed, qk_chunks, kernel, base),
        "dots": similarity.dots(qk_chunks, rows_first=resident is QUERY),
    }


def _after_slots(
    similarity: SimilaritySlots, side: Side, qk_chunks: tuple[Chunk, ...], kernel: Lowering, base: dict[str, Leaf]
) -> dict[str, Any]:
    """What the kernel that owns a side's gradient accumulates, and what it adds after the loop."""
    return {
        "accumulators": similarity.accumulators(side, qk_chunks),
        "accumulate": similarity.accumulate(side, qk_chunks),
        "epilogue": similarity.epilogue(side, qk_chunks, kernel, base),
        "passes_on": similarity.passes_on(side),
        "vector_gradients": [g for g in similarity.gradients if g.side is side],
    }


def _take(lowering: Lowering) -> list[str]:
    lines = list(lowering.body)
    lowering.body.clear()
    return lines


def _prefer_shared(lowering: Lowering, terms: list[Any]) -> None:
    """Equal terms are one value however often they are accumulated."""
    lowering.count(terms[1:])


def _vanishes(term: Any, s: sympy.Symbol) -> bool:
    """Is the term exp2(k * s - a row value), which is 0 at a score of -inf?"""
    if not isinstance(term, exp2):
        return False
    coefficient = sympy.expand(term.args[0]).coeff(s)
    rest = sympy.expand(term.args[0] - coefficient * s)
    return bool(coefficient.is_positive) and s not in rest.free_symbols and sym.KV_IDX not in rest.free_symbols


def _needs_guard(plan: Plan) -> bool:
    """Can finishing an empty row divide by zero, or must its statistic be -inf?"""
    return bool(plan.stored) or bool(plan.online.sums)


def backward_leaves(plan: Plan) -> dict[str, Leaf]:
    extra = {name: Leaf(name, Level.ROW) for name in plan.saved_names}
    extra[DP.name] = Leaf("dp", Level.PAIR)
    extra |= {part.own(DELTA.name): Leaf(part.own(DELTA.name), Level.ROW) for part in plan.parts}
    return base_leaves(plan, extra)


def _pair_slots(
    plan: Plan,
    qk_chunks: tuple[Chunk, ...],
    rows_first: bool,
    wanted: list[InputGradient],
    tile: TilePlan,
    block: str,
    edges: list[str],
    inside: str,
    in_loop: bool = True,
    many_heads: bool = False,
    settle: bool = False,
    by_tile: bool = False,
) -> dict[str, Any]:
    """What every backward kernel computes for a tile: the weight p, ds, and the cotangents of element reads.

    settle: the kernel has whole rows, so that the sums that depend on delta can be had for the exact one. The stored
    delta is that of a rounded output, and where a cotangent is a small sum of large terms, that shows.

    in_loop: the kernel loops over tiles and wants ds; else it has one, and wants cotangents of reads alone, for which
    only their own parts are computed. by_tile: distances are taken apart by tile.
    """
    similarity, base = SimilaritySlots(plan), backward_leaves(plan)
    leaves, blank = {**base, **LEAVES}, _blank(similarity, rows_first)
    lowering = Lowering(plan.core, leaves, rows_first, running=RUNNING, many_heads=many_heads, blank=blank)
    shown = [s for i, s in enumerate(_shown(plan)) if in_loop or any(g.part == i for g in wanted)]
    own = [[g for g in wanted if plan.parts[g.part] is part] for part, _, _ in shown]
    one_scale = len({part.backward.dqk_scale for part in plan.parts}) == 1
    computed = [
        _backward_exprs(part, gradients, in_loop, one_scale, by_tile)
        for (part, _, _), gradients in zip(shown, own, strict=True)
    ]
    settle = settle and len(plan.parts) == 1
    settled = [g for g in own[0] if not g.row_only and not g.own and g.expr.has(DELTA)] if settle else []
    for gradient in settled:
        slope = _over_raw(plan, gradient.expr.diff(DELTA))
        computed[0].dreads.append(slope.xreplace(computed[0].inlined))
        computed[0].names.append(f"{gradient.name}_by_delta_tile")
    if settled:
        computed[0].dreads.append(computed[0].weight * DP)
        computed[0].names.append("out_dot_tile")
    for (part, _, _), e in zip(shown, computed, strict=True):
        lowering.count([*e.score, part.graph["mask"].expr, e.weight, *e.dsums.values(), *e.dreads])
    bounds = bound_lines(tile, lowering, block, inside)
    chains = []
    for i, ((part, visible, fresh), e) in enumerate(zip(shown, computed, strict=True)):
        chains.append(_backward_chain(part, e, lowering, visible, edges if fresh or i == 0 else None))
    after = lowering.after_loop()
    final_lines, row_lines = [], []
    for chain, (part, _, _), gradients in zip(chains, shown, own, strict=True):
        chain["dqk_scale"] = after.emit(part.tagged(part.backward.dqk_scale)) if one_scale else "1"
        final_lines += _take(after)
        row_only = [g for g in gradients if g.row_only]
        if row_only:
            row_lines.append(f"{part.own('alive')} = {_alive(part)}")
        for gradient in row_only:
            text = after.emit(part.tagged(part.folded.apply(gradient.expr)), Level.ROW)
            row_lines += _take(after)
            row_lines.append(f"{gradient.name}_row = tl.where({part.own('alive')}, {text}, 0.0)")
    deltas = [part.own("delta") for part, _, _ in shown] if plan.needs_delta else []
    saved = [part.own(s.name) for part, _, _ in shown for s, _ in part.backward.saved]
    resident = QUERY if rows_first else KEY
    return {
        "bounds": bounds,
        **_similarity_slots(similarity, resident, qk_chunks, lowering, base),
        **(_after_slots(similarity, resident, qk_chunks, lowering, base) if in_loop else {}),
        "outer": lowering.outer,
        "by_head": lowering.by_head,
        "by_tile": uses_tiles(*(x for e in computed for x in (*e.score, e.weight))),
        "chains": chains,
        "final_lines": final_lines,
        "row_lines": row_lines,
        "saved": saved,
        "deltas": deltas,
        "rows": (*saved, *deltas),
        "gradients": [g for g in wanted if not g.own],
        "summed": [g for g in wanted if not g.row_only],
        "settled": settled,
        "helpers": lowering.helpers,
    }


@dataclass(frozen=True)
class _Cotangents:
    """What a backward kernel computes for one part, in the unit of its score. There is no score where the weight has it
    inlined; `dsums` are the cotangents of qk (`ds`) and of other sums over the head dimension, by their names in a
    kernel, and `names` those of the summed cotangents `dreads`."""

    score: list[Any]
    weight: Any
    dsums: dict[str, Any]
    dreads: list[Any]
    names: list[str]
    inlined: dict[Any, Any]


def _backward_exprs(
    part: Plan, gradients: list[InputGradient], in_loop: bool, one_scale: bool, by_tile: bool
) -> _Cotangents:
    """The expressions of one part. dqk is without its scale only where all parts have the same: they may share an
    accumulator."""
    folded, backward = part.folded, part.backward
    weight = folded.apply(backward.weight)
    score = split_distances(folded.score) if by_tile else folded.score
    sums = {f"d{s.name}": e for s, e in backward.dsums}
    if SimilaritySlots(part).has_dot:
        sums = {part.own("ds"): backward.dqk if one_scale else backward.dqk * backward.dqk_scale, **sums}
    names = list(sums) if in_loop else []
    dsums = [_over_raw(part, sums[name]) for name in names]
    summed = [g for g in gradients if not g.row_only]
    dreads = [_over_raw(part, g.expr) for g in summed]
    weight_alone = sympy.Dummy("weight")
    outer = weight
    others = [e.xreplace({weight: weight_alone}) for e in (*dsums, *dreads)]
    inlined = in_loop and score.is_Add and not any(S in e.free_symbols for e in others)
    if inlined:
        # the weight alone reads the score: what both have of a row, or of a column, adds up before it meets a pair
        whole = weight.xreplace({S: score})
        weight, *others = (whole, *(e.xreplace({weight_alone: whole}) for e in others))
        dsums, dreads = others[: len(names)], others[len(names) :]
    return _Cotangents(
        [] if inlined else [part.tagged(score)],
        part.tagged(weight),
        dict(zip(names, map(part.tagged, dsums), strict=True)),
        [part.tagged(e) for e in dreads],
        [f"{g.name}_tile" for g in summed],
        {outer: weight},
    )


def _over_raw(part: Plan, expr: Any) -> Any:
    """A formula over the raw score in terms of q k and the kernel's score."""
    return part.folded.apply(expr.xreplace({sym.RAW_SCORE: part.core["raw_score"].expr}))


def _backward_chain(
    part: Plan, exprs: _Cotangents, lowering: Lowering, visible: str, edges: list[str] | None
) -> dict[str, Any]:
    """What one part does with a tile of its scores and of dp. `edges` is None where what it shows is known already."""
    score = next((lowering.tile(e) for e in exprs.score), None)
    mask = part.graph["mask"].expr
    shown = _visible(lowering, mask, edges, visible) if edges is not None else []
    score_lines = _take(lowering)
    lowering.assign(part.own("p"), exprs.weight, Level.PAIR)
    weight_lines = _take(lowering)
    hide = []
    for name, expr in (*exprs.dsums.items(), *zip(exprs.names, exprs.dreads, strict=True)):
        lowering.assign(name, expr, Level.PAIR)
        hide.append(f"{name} = tl.where({visible}, {name}, 0.0)")
    return {
        "tag": part.tag,
        "text": {k: formula(part.graph[k].expr) for k in ("score", "mask", "weight")},
        "score": score,
        "score_lines": score_lines,
        "visible": visible,
        "show": shown,
        "weight_lines": weight_lines,
        "grad_lines": _take(lowering),
        "hide": hide,
    }


def _alive(part: Plan) -> str:
    """In the backward, whether a row saw any key: its lse is finite, or its other statistics are not all 0."""
    names = part.saved_names
    if part.own(LSE.name) in names:
        return f'{names[0]} > float("-inf")'
    return " | ".join(f"({n} != 0.0)" for n in names) or "q_idx < q_len"


def dkdv_slots(plan: Plan, qk_chunks: tuple[Chunk, ...], by_tile: bool) -> dict[str, Any]:
    """Slots of dkdv.py.j2; `by_tile`: distances are taken apart by tile, which is exact enough for 16 bits."""
    wanted = [g for g in plan.gradients if g.kind == "col"]
    edges = [_edge("q_idx", False), _edge("kv_idx", False)]
    inside = "kv_idx < kv_len"
    slots = _pair_slots(
        plan, qk_chunks, False, wanted, plan.over_queries, "BLOCK_M", edges, inside, many_heads=True, by_tile=by_tile
    )
    return {**slots, "one_loop": plan.one_loop and not SimilaritySlots(plan).own_accumulators(KEY)}


def dq_slots(plan: Plan, qk_chunks: tuple[Chunk, ...], by_tile: bool) -> dict[str, Any]:
    """Slots of dq.py.j2; `by_tile` is that of `dkdv_slots`."""
    wanted = [g for g in plan.gradients if g.kind in ("program", "row")]
    edges = [_edge("kv_idx", True)]
    inside = "q_idx < q_len"
    return _pair_slots(
        plan, qk_chunks, True, wanted, plan.over_keys, "BLOCK_N", edges, inside, settle=True, by_tile=by_tile
    )


def pair_slots(plan: Plan, qk_chunks: tuple[Chunk, ...], gradient: InputGradient) -> dict[str, Any]:
    """Slots of pair_grad.py.j2, for one element read that varies by pair."""
    edges = [_edge("q_idx", True), _edge("kv_idx", True)]
    common = _pair_slots(
        plan, qk_chunks, True, [gradient], plan.over_keys, "BLOCK_N", edges, "q_idx < q_len", in_loop=False
    )
    return {
        **common,
        "gradient": gradient,
        "by_b": sym.B in gradient.read.free_symbols,
        "by_h": bool({sym.H, sym.H_KV} & gradient.read.free_symbols),
    }


def summary_slots(plan: Plan, read: sympy.Expr, axis: sympy.Symbol) -> dict[str, Any]:
    """Slots of summary.py.j2: the block minima and maxima of a 1-D integer read along an axis."""
    along = axis.name
    leaves = base_leaves(plan, {})
    lowering = Lowering(plan.core, leaves, rows_first=axis == sym.Q_IDX)
    value = lowering.emit(read)
    return {
        "axis": along,
        "length": "q_len" if axis == sym.Q_IDX else "kv_len",
        "lines": [*lowering.outer, *lowering.body],
        "value": value,
        "offset": summary_offset(read),
        "by_head": summary_offset(read) != "b",
        "helpers": lowering.helpers,
        "what": formula(read),
    }


def bounds_slots(tile: TilePlan, bounds: BoundLines) -> dict[str, Any]:
    """Slots of bounds.py.j2: the scan of a mask that reads its inputs, for the blocks of one axis."""
    by_rows = tile.outer == sym.Q_IDX
    return {
        "bounds": bounds,
        "outer": tile.outer.name,
        "inner": tile.inner.name,
        "length": "q_len" if by_rows else "kv_len",
        "block": "BLOCK_M" if by_rows else "BLOCK_N",
        "inner_block": "BLOCK_N" if by_rows else "BLOCK_M",
        "stored": bounds.stored,
        "by_head": tile.by_head,
        "summaries": [{"index": i} for i, _ in enumerate(tile.summaries)],
    }
