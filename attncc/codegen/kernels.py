"""The slots of each kernel's template, filled with lines from the passes' facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from attncc.codegen.bounds import BoundLines, bound_lines, summary_offset
from attncc.codegen.lower import Leaf, Lowering
from attncc.codegen.offsets import LEAVES, RUNNING, split_distances, uses_tiles
from attncc.codegen.plan import InputGradient, Plan
from attncc.ir import symbols as sym
from attncc.ir.levels import Level
from attncc.ir.text import formula
from attncc.ir.vocabulary import Read
from attncc.passes.differentiate import DELTA, DP
from attncc.passes.fold import LN2, S, exp2
from attncc.passes.stream import renamed
from attncc.passes.tiles import TilePlan
from attncc.schedule.problem import head_chunks

#: where a running maximum starts: below every score, and finite, so that no difference of two is NaN
NEGATIVE = "-1.0e30"


@dataclass(frozen=True)
class Chunk:
    """A power-of-two piece of a head dimension: columns [start, start + real), held in a tile `width` wide."""

    index: int
    start: int
    width: int
    real: int

    @property
    def partial(self) -> bool:
        return self.real < self.width


def chunks(dim: int) -> tuple[Chunk, ...]:
    """A head dimension as tiles, as the scheduler counts them."""
    found: list[Chunk] = []
    start = 0
    for width in head_chunks(dim):
        found.append(Chunk(len(found), start, width, min(width, dim - start)))
        start += width
    return tuple(found)


def _leaves(plan: Plan, extra: dict[str, Leaf]) -> dict[str, Leaf]:
    program = {"b": "b", "h": "h", "h_kv": "h_kv", "q_len": "q_len", "kv_len": "kv_len", "num_heads": "heads"}
    leaves = {name: Leaf(text, Level.PROGRAM) for name, text in program.items()}
    leaves["scale"] = Leaf("scale", Level.PROGRAM)
    leaves[LN2.name] = Leaf("ln2", Level.PROGRAM)
    for scalar in plan.graph.scalars:
        leaves[scalar.name] = Leaf(scalar.name, Level.PROGRAM)
    leaves["q_idx"] = Leaf("q_idx", Level.ROW)
    leaves["kv_idx"] = Leaf("kv_idx", Level.COL)
    leaves["qk"] = Leaf("qk", Level.PAIR)
    leaves[S.name] = Leaf("s", Level.PAIR)
    return {**leaves, **extra}


def _visible(lowering: Lowering, mask: Any, edges: list[str]) -> list[str]:
    """Lines that compute `visible` in a tile that the mask, or the edge of a tensor, cuts."""
    scope = lowering.branch()
    conditions = list(edges)
    if mask is not sympy.true:
        conditions.append(scope.emit(mask, Level.PAIR))
    return [*scope.body, f"visible = {' & '.join(conditions)}"]


def _edge(axis: str, rows_first: bool) -> str:
    length = {"q_idx": "q_len", "kv_idx": "kv_len"}[axis]
    first = (axis == "q_idx") == rows_first
    return f"({axis} < {length}){'[:, None]' if first else '[None, :]'}"


def forward_slots(plan: Plan, bounds_apart: bool = False) -> dict[str, Any]:
    """Slots of forward.py.j2; `bounds_apart` is that of `bound_lines`."""
    online, folded = plan.online, plan.folded
    maxima = online.max_symbols
    extra = {}
    for m in maxima:
        extra[m.name] = Leaf(m.name, Level.ROW)
        extra[renamed(m).name] = Leaf(renamed(m).name, Level.ROW)
    for r in online.sums:
        extra[r.symbol.name] = Leaf(r.symbol.name, Level.ROW)
    lowering = Lowering(plan.graph, _leaves(plan, extra), running=frozenset(extra))
    to_new = {m: renamed(m) for m in maxima}
    operands = [folded.maximum_of(g) for _, g in online.maxes]
    terms = [folded.apply_online(r.term.xreplace(to_new), maxima) for r in (online.numerator, *online.sums)]
    rescales = [folded.apply_online(r.rescale, maxima) for r in (online.numerator, *online.sums)]
    scaled = folded.unit * S
    # where everything is exp2(score - m), a hidden score of -inf does all that a mask must do
    vanishes = all(_vanishes(t, scaled) for t in terms) and all(o == scaled for o in operands)
    lowering.count([folded.score, plan.graph["mask"].expr, *operands, *terms])
    _prefer_shared(lowering, terms)
    bounds = bound_lines(plan.over_keys, lowering, "BLOCK_N", "q_idx < q_len", bounds_apart)
    score = lowering.tile(folded.score)
    visible = _visible(lowering, plan.graph["mask"].expr, [_edge("kv_idx", True)])
    score_lines = _take(lowering)
    max_lines = []
    for number, ((m, _), operand) in enumerate(zip(online.maxes, operands, strict=True)):
        # unit is positive, so it can multiply the row's maximum and not every pair
        by_unit = operand == scaled and folded.unit != 1
        text = "s" if operand == scaled else lowering.tile(operand)
        unit = f" * {lowering.hoisted(folded.unit)}" if by_unit else ""
        max_lines += _take(lowering)
        if not vanishes:
            max_lines += [f"shown_{number} = {text}", "if phase == 0:"]
            max_lines.append(f'    shown_{number} = tl.where(visible, {text}, float("-inf"))')
            text = f"shown_{number}"
        max_lines.append(f"{renamed(m).name} = tl.maximum({m.name}, tl.max({text}, 1){unit})")
    lowering.assign("p", terms[0], Level.PAIR)
    weight_lines = _take(lowering)
    names = {terms[0]: "p"}
    for k, term in enumerate(terms[1:]):
        if term not in names:
            names[term] = f"term_{k}"
            lowering.assign(names[term], term, Level.PAIR)
            weight_lines += _take(lowering)
    hide = [] if vanishes else [f"{n} = tl.where(visible, {n}, 0.0)" for n in names.values()]
    factor_names: dict[Any, str] = {}
    rescale_lines = []
    for factor in rescales:
        if factor != 1 and factor not in factor_names:
            name = "alpha" if not factor_names else f"alpha_{len(factor_names)}"
            factor_names[factor] = name
            text = lowering.emit(factor)
            rescale_lines += _take(lowering)
            if not isinstance(factor, exp2):  # only exp2 is known to be finite at the start, when m is still NEGATIVE
                text = f"tl.where({maxima[0].name} > {NEGATIVE}, {text}, 0.0)"
            rescale_lines.append(f"{name} = {text}")
    sum_lines = []
    for r, term, factor in zip(online.sums, terms[1:], rescales[1:], strict=True):
        kept = f"{r.symbol.name} * {factor_names[factor]}" if factor != 1 else r.symbol.name
        sum_lines.append(f"{r.symbol.name} = {kept} + tl.sum({names[term]}, 1)")
    after = lowering.after_loop()
    scale = folded.apply_online(online.coefficient * online.scale, maxima)
    stored = [(n, folded.apply_online(e, maxima)) for n, e in plan.stored]
    after.count([scale, *(e for _, e in stored)])
    final = after.emit(scale) if scale != 1 else None
    if final is not None and not _needs_guard(plan) and after.level_of(scale) == Level.ROW:
        final = f"({final})[:, None]"
    final_lines = _take(after)
    stores = []
    for name, e in stored:
        text = after.emit(e)
        stores += _take(after)
        empty = 'float("-inf")' if name == "lse" else "0.0"
        if _needs_guard(plan):
            text = f"tl.where(alive, {text}, {empty})"
        stores.append(f"tl.store({name.upper()}_PTR + bh * q_len + q_idx, {text}, mask=q_idx < q_len)")
    alive = None
    if maxima:
        alive = f"{maxima[0].name} > {NEGATIVE}"
    elif _needs_guard(plan):
        alive = "seen > 0"
    return {
        "bounds": bounds,
        "outer": lowering.outer,
        "score": score,
        "score_lines": score_lines,
        "visible": visible,
        "vanishes": vanishes,
        "max_lines": max_lines,
        "weight_lines": weight_lines,
        "hide": hide,
        "rescale_lines": rescale_lines,
        "acc_rescale": factor_names.get(rescales[0]),
        "sum_lines": sum_lines,
        "moves": [(m.name, renamed(m).name) for m in maxima],
        "sums": [r.symbol.name for r in online.sums],
        "final_lines": final_lines,
        "final": final,
        "guard": _needs_guard(plan),
        "alive": alive,
        "count_seen": _needs_guard(plan) and not maxima,
        "stores": stores,
        "negative": NEGATIVE,
        "helpers": lowering.helpers,
    }


def _take(lowering: Lowering) -> list[str]:
    lines = list(lowering.body)
    lowering.body.clear()
    return lines


def _prefer_shared(lowering: Lowering, terms: list[Any]) -> None:
    """Equal terms are one value however often they are accumulated."""
    lowering.count(terms[1:])


def _vanishes(term: Any, scaled: Any) -> bool:
    """Is the term exp2(k * score - a row value), which is 0 at a score of -inf?"""
    if not isinstance(term, exp2):
        return False
    coefficient = sympy.expand(term.args[0]).coeff(S)
    rest = sympy.expand(term.args[0] - coefficient * S)
    return bool(coefficient.is_positive) and S not in rest.free_symbols and sym.KV_IDX not in rest.free_symbols


def _needs_guard(plan: Plan) -> bool:
    """Can finishing an empty row divide by zero, or must its statistic be -inf?"""
    return bool(plan.stored) or bool(plan.online.sums)


def backward_leaves(plan: Plan) -> dict[str, Leaf]:
    extra = {name: Leaf(name, Level.ROW) for name in plan.saved_names}
    extra[DP.name] = Leaf("dp", Level.PAIR)
    extra[DELTA.name] = Leaf("delta", Level.ROW)
    return _leaves(plan, extra)


def _pair_slots(
    plan: Plan,
    rows_first: bool,
    wanted: list[InputGradient],
    tile: TilePlan,
    block: str,
    edges: list[str],
    inside: str,
    in_loop: bool = True,
) -> dict[str, Any]:
    """What every backward kernel computes for a tile: the weight p, ds, and the cotangents of element reads.

    in_loop: the kernel loops over tiles and wants ds; else it has one, and wants cotangents of reads alone.
    """
    folded, backward = plan.folded, plan.backward
    lowering = Lowering(plan.graph, {**backward_leaves(plan), **LEAVES}, rows_first, running=RUNNING)
    weight = folded.apply(backward.weight)
    score = split_distances(folded.score) if in_loop else folded.score
    raw = {sym.RAW_SCORE: plan.graph["raw_score"].expr}
    dqk = folded.apply(backward.dqk.xreplace(raw))
    summed = [g for g in wanted if not plan.row_only(g)]
    dreads = [folded.apply(g.expr.xreplace(raw)) for g in summed]
    mask = plan.graph["mask"].expr
    weight_alone = sympy.Dummy("weight")
    others = [e.xreplace({weight: weight_alone}) for e in (dqk, *dreads)]
    inlined = in_loop and score.is_Add and not any(S in e.free_symbols for e in others)
    if inlined:
        # the weight alone reads the score: what both have of a row, or of a column, adds up before it meets a pair
        whole = weight.xreplace({S: score})
        weight, dqk, *dreads = (whole, *(e.xreplace({weight_alone: whole}) for e in others))
    scores = [] if inlined else [score]
    lowering.count([*scores, mask, weight, *([dqk] if in_loop else []), *dreads])
    bounds = bound_lines(tile, lowering, block, inside)
    score_text = None if inlined else lowering.tile(score)
    visible = _visible(lowering, mask, edges)
    score_lines = _take(lowering)
    lowering.assign("p", weight, Level.PAIR)
    weight_lines = _take(lowering)
    grad_lines: list[str] = []
    hide = []
    if in_loop:
        lowering.assign("ds", dqk, Level.PAIR)
        hide.append("ds = tl.where(visible, ds, 0.0)")
    for gradient, expr in zip(summed, dreads, strict=True):
        lowering.assign(f"{gradient.name}_tile", expr, Level.PAIR)
        hide.append(f"{gradient.name}_tile = tl.where(visible, {gradient.name}_tile, 0.0)")
    grad_lines += _take(lowering)
    after = lowering.after_loop()
    dqk_scale = after.emit(backward.dqk_scale)
    final_lines = _take(after)
    row_lines = []
    for gradient in wanted:
        if plan.row_only(gradient):
            text = after.emit(folded.apply(gradient.expr), Level.ROW)
            row_lines += _take(after)
            row_lines.append(f"{gradient.name}_row = tl.where(alive, {text}, 0.0)")
    return {
        "bounds": bounds,
        "outer": lowering.outer,
        "by_tile": uses_tiles(*scores, weight),
        "score": score_text,
        "score_lines": score_lines,
        "visible": visible,
        "weight_lines": weight_lines,
        "grad_lines": grad_lines,
        "hide": hide,
        "dqk_scale": dqk_scale,
        "final_lines": final_lines,
        "row_lines": row_lines,
        "saved": plan.saved_names,
        "needs_delta": backward.needs_delta,
        "rows": (*plan.saved_names, *(("delta",) if backward.needs_delta else ())),
        "gradients": wanted,
        "summed": summed,
        "helpers": lowering.helpers,
        "alive": f'{plan.saved_names[0]} > float("-inf")' if "lse" in plan.saved_names else _alive(plan),
    }


def _alive(plan: Plan) -> str:
    """In the backward, whether a row saw any key: stored statistics of an empty row are 0."""
    return " | ".join(f"({n} != 0.0)" for n in plan.saved_names) or "q_idx < q_len"


def dkdv_slots(plan: Plan) -> dict[str, Any]:
    """Slots of dkdv.py.j2."""
    wanted = [g for g in plan.gradients if g.kind == "col"]
    edges = [_edge("q_idx", False), _edge("kv_idx", False)]
    return _pair_slots(plan, False, wanted, plan.over_queries, "BLOCK_M", edges, "kv_idx < kv_len")


def dq_slots(plan: Plan) -> dict[str, Any]:
    """Slots of dq.py.j2."""
    wanted = [g for g in plan.gradients if g.kind in ("program", "row")]
    return _pair_slots(plan, True, wanted, plan.over_keys, "BLOCK_N", [_edge("kv_idx", True)], "q_idx < q_len")


def pair_slots(plan: Plan, gradient: InputGradient) -> dict[str, Any]:
    """Slots of pair_grad.py.j2, for one element read that varies by pair."""
    edges = [_edge("q_idx", True), _edge("kv_idx", True)]
    return {
        **_pair_slots(plan, True, [gradient], plan.over_keys, "BLOCK_N", edges, "q_idx < q_len", in_loop=False),
        "gradient": gradient,
        "by_b": sym.B in gradient.read.free_symbols,
        "by_h": bool({sym.H, sym.H_KV} & gradient.read.free_symbols),
    }


def summary_slots(plan: Plan, read: Read, axis: sympy.Symbol) -> dict[str, Any]:
    """Slots of summary.py.j2: the block minima and maxima of a 1-D integer read along an axis."""
    along = axis.name
    leaves = _leaves(plan, {})
    lowering = Lowering(plan.graph, leaves, rows_first=axis == sym.Q_IDX)
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
        "by_head": bounds.line != "b",
        "summaries": [{"index": i} for i, _ in enumerate(tile.summaries)],
    }
