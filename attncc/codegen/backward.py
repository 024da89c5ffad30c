"""Template slots of the backward kernels: the code for a tile of (query, key) pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from attncc.codegen.bounds import bound_lines
from attncc.codegen.chunks import Chunk
from attncc.codegen.components import band_slots, gradient_slots
from attncc.codegen.loads import MapTile
from attncc.codegen.lower import Leaf, Lowering
from attncc.codegen.offsets import LEAVES, PLACE, RUNNING, uses_tiles
from attncc.codegen.pair_exprs import DS, PairExprs, of_k, pair_exprs, settle_delta, write_over_ds
from attncc.codegen.pairs import base_leaves, blank_tile, edge, shown_masks, similarity_slots, take, visible_lines
from attncc.codegen.plan import InputGradient, Plan
from attncc.codegen.similarity import KEY, QUERY, Side, SimilaritySlots, VectorGradient
from attncc.codegen.slopes import SLOPE, over_raw, over_slope, same_slope
from attncc.codegen.statements import set_names
from attncc.ir.levels import Level
from attncc.ir.text import formula
from attncc.passes.differentiate import DELTA, DP
from attncc.passes.distances import INDICES
from attncc.passes.reverse import DLSE
from attncc.passes.stream import LSE
from attncc.passes.tiles import TilePlan

#: the name of a tile that a Gluon kernel holds in registers
HELD = "float_{tile}_{chunk}"
#: the condition that a tile lies inside the tensors, in a loop that visits cut tiles first (phase 0)
WHOLE = "phase == 1"


def _after_slots(
    similarity: SimilaritySlots,
    side: Side,
    qk_chunks: tuple[Chunk, ...],
    kernel: Lowering,
    base: dict[str, Leaf],
    in_gluon: bool,
) -> dict[str, Any]:
    """Slots of the kernel that computes dQ or dK (`side`): what it accumulates, and what it adds after the loop."""
    looped = [(g.name, g.expr, g.vector) for g in similarity.looped(side)]
    return {
        "loop_back": gradient_slots(similarity.plan, similarity.flowing_loops, side is QUERY, looped, kernel, base),
        "accumulators": similarity.accumulators(side, qk_chunks),
        "accumulate": similarity.accumulate(side, qk_chunks),
        "epilogue": similarity.epilogue(side, qk_chunks, kernel, base),
        "passed_on": [similarity.epilogue(side, (c,), kernel, base) for c in qk_chunks] if in_gluon else [],
        "passes_on": similarity.passes_on(side),
        "vector_gradients": [g for g in similarity.gradients if g.side is side],
    }


def _band_slots(
    similarity: SimilaritySlots,
    band: VectorGradient | None,
    qk_chunks: tuple[Chunk, ...],
    kernel: Lowering,
    base: dict[str, Leaf],
) -> dict[str, Any]:
    """Slots that turn the cotangents of a sum over components into those of a table of distances, by a matmul with
    `operand` or by a loop over `components`."""
    if band is None or band.loop is None:
        return {"operand": [], "components": None}
    if not band.looped:
        return {"operand": similarity.made("operand", band.expr, QUERY, qk_chunks, kernel, base), "components": None}
    slots = band_slots(similarity.plan, band.loop, band.read, f"{band.name}_tile", kernel, base)
    return {"operand": [], "components": slots}


def _boxed(tile: MapTile) -> dict[str, Any]:
    """A map's tile as the templates load it; `at`: offsets along all dimensions but the last two."""
    at = [f"_entry({index}, stride_{tile.input}_{d})" for d, index in enumerate(tile.at)]
    return {"name": tile.name, "input": tile.input, "upper": tile.input.upper(), "text": tile.text, "at": at}


def backward_leaves(plan: Plan) -> dict[str, Leaf]:
    extra = {name: Leaf(name, Level.ROW) for name in plan.saved_names}
    for part in plan.parts:
        swept = (*part.backward.parts, *part.backward.cotangents)
        extra |= {part.own(s.name): Leaf(part.own(s.name), Level.ROW) for s, _ in swept}
    extra[DP.name] = Leaf("dp", Level.PAIR)
    extra |= {part.own(DELTA.name): Leaf(part.own(DELTA.name), Level.ROW) for part in plan.parts}
    extra |= {name: Leaf(name, Level.COL) for name in plan.columns}
    extra[DLSE.name] = Leaf("dlse", Level.ROW)
    return base_leaves(plan, extra)


def tile_slots(
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
    hopper: bool = False,
    streams: bool = False,
    band: VectorGradient | None = None,
    boxes: bool = False,
) -> dict[str, Any]:
    """The slots that all backward kernels share: the weight p, ds, and the cotangents of element reads for a tile.

    - rows_first: tiles are [queries, keys], not [keys, queries];
    - settle: the kernel sums over whole rows, so it can correct sums that depend on delta, also those of terms of the
      similarity, to the exact delta. The stored delta comes from a rounded output, which shows where a cotangent is a
      small sum of large terms;
    - in_loop: the kernel loops over tiles and needs ds; else it has one tile, and computes only the cotangents of
      reads;
    - by_tile: distances are split by tile (see `offsets`);
    - hopper: as in `forward_slots`; also, dp is multiplied by a single value, so that of each pair only one value waits
      for dp in registers;
    - streams: values read along the axis of the loop are listed in `streamed`, so that another warp can read them
      early;
    - band: a table of distances read by a sum over components: its gradient is a matmul of the cotangents with a
      function of the query, or a loop over components;
    - boxes: tiles are loaded through descriptors, also those of inputs with an entry per pair where possible (`maps`).
    """
    tables, place = plan.tables if hopper else plan.tables.read, PLACE if by_tile else INDICES
    by_k = of_k(plan, wanted) if hopper and in_loop and not rows_first else {}
    wanted = [g for g in wanted if g not in by_k]
    similarity = SimilaritySlots(plan, *([HELD] if hopper else []))
    base = backward_leaves(plan)
    slopes = [part.own(name) for part in plan.parts for name in (SLOPE, "p")]
    leaves = {**base, **LEAVES, **{name: Leaf(name, Level.PAIR) for name in (*slopes, DS.name)}}
    lowering = Lowering(
        plan.core,
        leaves,
        rows_first,
        running=RUNNING | set(plan.columns),
        many_heads=many_heads,
        tables=tables,
    )
    lowering.whole = WHOLE if in_loop and not hopper else ""
    lowering.maps = [] if boxes else None
    lowering.streamed = [] if streams else None
    shown = [s for i, s in enumerate(shown_masks(plan)) if in_loop or any(g.part == i for g in wanted)]
    own = [[g for g in wanted if plan.parts[g.part] is part] for part, _, _ in shown]
    # if v is part of k, one accumulator sums dk and dv, so that ds must contain its scale
    one_scale = len({part.backward.dqk_scale for part in plan.parts}) == 1 and plan.graph.value is None
    computed = [
        pair_exprs(part, gradients, in_loop, one_scale, by_tile, tables, hopper)
        for (part, _, _), gradients in zip(shown, own, strict=True)
    ]
    settles = []
    for (part, _, _), e, gradients in zip(shown, computed, own, strict=True):
        moved = tuple(g for g in gradients if not g.row_only and g.expr.has(DELTA)) if settle else ()
        if moved:
            settles.append(settle_delta(part, e, moved, tables, place))
        if hopper:
            write_over_ds(plan, part, e, gradients, tables, place)
    for (part, _, _), e in zip(shown, computed, strict=True):
        lowering.count([*e.score, part.graph["mask"].expr, e.weight, *e.dsums.values(), *e.dreads])
    bounds = bound_lines(tile, lowering, block, inside, hopper)
    weighs = [
        _Weighed(
            *(part, e, lowering, blank_tile(similarity, rows_first, part)),
            *(visible, edges if fresh or i == 0 else None, hopper),
        )
        for i, ((part, visible, fresh), e) in enumerate(zip(shown, computed, strict=True))
    ]
    # a value that two parts share is computed at its first use, so lower them in the order of the template's lines: the
    # kernels of dK and dV compute the weights of all parts before the first part's gradients
    if rows_first:
        chains = [w.weight() | w.gradients() for w in weighs]
    else:
        chains = [a | b for a, b in zip([w.weight() for w in weighs], [w.gradients() for w in weighs], strict=True)]
    after = lowering.after_loop()
    final_lines, row_lines, sums_of_k = [], list[str](), []
    for chain, (part, _, _), gradients in zip(chains, shown, own, strict=True):
        chain["dqk_scale"] = after.emit(part.tagged(part.backward.dqk_scale)) if one_scale else "1"
        final_lines += take(after)
        sums_of_k = [(g.name, after.emit(over_raw(part, rest), Level.COL)) for g, rest in by_k.items()]
        row_lines += _row_lines(part, [g for g in gradients if g.row_only], after)
    deltas = [part.own("delta") for part, _, _ in shown] if plan.needs_delta else []
    saved = [part.own(name) for part, _, _ in shown for name in part.backward.pair_rows]
    resident = QUERY if rows_first else KEY
    return {
        "bounds": bounds,
        **similarity_slots(similarity, resident, qk_chunks, lowering, base),
        **(_after_slots(similarity, resident, qk_chunks, lowering, base, hopper) if in_loop else {}),
        **_band_slots(similarity, band, qk_chunks, lowering, base),
        "outer": lowering.outer,
        "by_head": lowering.by_head,
        "streamed": lowering.streamed or [],
        "maps": [_boxed(m) for m in lowering.maps or ()],
        "by_tile": uses_tiles(*(x for e in computed for x in (*e.score, e.weight, *e.dsums.values(), *e.dreads))),
        "tables": tables.count,
        "chains": chains,
        "final_lines": final_lines,
        "sums_of_k": sums_of_k,
        "row_lines": row_lines,
        "saved": saved,
        "deltas": deltas,
        "rows": (*saved, *deltas),
        "columns": plan.columns,
        "gradients": [g for g in wanted if not g.own],
        "summed": [g for g in wanted if not g.row_only],
        "settles": settles,
        "reads_dlse": any(g.expr.has(DLSE) for g in wanted),
        "settled": [g for s in settles for g in s.gradients],
        "helpers": lowering.helpers | ({"_entry"} if lowering.maps else set()),
    }


def _row_lines(part: Plan, gradients: list[InputGradient], after: Lowering) -> list[str]:
    """Lines, after the loop, for gradients that are a value per row: 0 in rows that have seen no key."""
    lines = [f"{part.own('alive')} = {saw_a_key(part)}"] if gradients else []
    for gradient in gradients:
        text = after.emit(part.tagged(part.folded.apply(gradient.expr)), Level.ROW)
        lines += take(after)
        lines.append(f"{gradient.name}_row = tl.where({part.own('alive')}, {text}, 0.0)")
    return lines


@dataclass
class _Weighed:
    """The slots of one part for a tile of scores and dp: first `weight`, then `gradients`.

    edges: conditions at the tensors' edges; None if another part has computed the mask already. slope_apart: the factor
    of dp in ds is a value of its own, computed with the weight. less_delta: then `dp` stands for dp - delta, if both
    occur only in this difference.
    """

    part: Plan
    exprs: PairExprs
    lowering: Lowering
    blank: str
    visible: str
    edges: list[str] | None
    slope_apart: bool
    dsums: dict[str, Any] = field(init=False)
    dreads: list[Any] = field(init=False)
    less_delta: bool = field(init=False, default=False)
    #: by the name of a cotangent: the slope that it is a multiple of, so that it is 0 for pairs whose slope is masked
    settled: dict[str, Any] = field(init=False, default_factory=dict)

    def weight(self) -> dict[str, Any]:
        """The slots up to the weight."""
        part, exprs, lowering = self.part, self.exprs, self.lowering
        lowering.blank = self.blank
        score = next((lowering.tile(e) for e in exprs.score), None)
        mask = part.graph["mask"].expr
        shown = visible_lines(lowering, mask, self.edges, self.visible) if self.edges is not None else []
        score_lines = take(lowering)
        lowering.assign(part.own("p"), exprs.weight, Level.PAIR)
        self.dsums = {name: e for name, e in exprs.dsums.items() if e != 0}
        self.dreads = list(exprs.dreads)
        if self.slope_apart:
            self._part_slopes()
        weight_lines = take(lowering)
        if self.slope_apart:  # a row value kept until dp is ready would take 16 registers per thread
            lowering.forget_rows(set_names([*score_lines, *weight_lines]))
        return {
            "tag": part.tag,
            "text": {k: formula(part.graph[k].expr) for k in ("score", "mask", "weight")},
            "score": score,
            "score_lines": score_lines,
            "visible": self.visible,
            "show": shown,
            "weight_lines": weight_lines,
            "slope": part.own(SLOPE) in self.settled.values(),
            "less_delta": self.less_delta,
        }

    def _part_slopes(self) -> None:
        part, names = self.part, self.exprs.names
        less = [e.xreplace({DP: DP + DELTA}) for e in (*self.dsums.values(), *self.dreads)]
        self.less_delta = any(e.has(DELTA) for e in self.dsums.values()) and not any(e.has(DELTA) for e in less)
        if self.less_delta:
            self.dsums, self.dreads = dict(zip(self.dsums, less, strict=False)), less[len(self.dsums) :]
        for name, e in self.dsums.items():
            others = [] if part.tag else self.dreads
            self.dsums[name], self.settled[name], over = over_slope(part, e, self.lowering, self.exprs.weight, others)
            reads = list(zip(names, self.dreads, strict=True))
            if not part.tag:
                changed = (n for (n, d), o in zip(reads, over, strict=True) if d != o)
                self.dreads = over
            else:
                changed = (n for n, d in reads if same_slope(part, d, e))
            self.settled |= dict.fromkeys(changed, self.settled[name])

    def gradients(self) -> dict[str, Any]:
        """The slots after the weight. `flows`: whether ds can differ from 0. If the weight is a step function of the
        score, it cannot, and the matmuls with ds are left out."""
        names, hide = self.exprs.names, []
        self.lowering.blank = self.blank
        for name, d in zip(names, self.dreads, strict=True):
            if DS in d.free_symbols:  # a multiple of ds is 0 where ds is 0
                self.settled[name] = self.settled.get(DS.name)
        for name, expr in (*self.dsums.items(), *zip(names, self.dreads, strict=True)):
            self.lowering.assign(name, expr, Level.PAIR)
            # a multiple of a slope that is masked to 0 is 0 itself, because the other factor is finite
            if self.settled.get(name) is None:
                hide.append(f"{name} = tl.where({self.visible}, {name}, 0.0)")
        flows = self.exprs.dsums.get(self.part.own("ds")) != 0
        return {"flows": flows, "grad_lines": take(self.lowering), "hide": hide}


def saw_a_key(part: Plan) -> str:
    """The condition, in the backward, that a row has seen a key: its lse is finite, or its other statistics are not all
    0 (not -inf, if reverse mode reads them)."""
    names = part.saved_names
    if part.own(LSE.name) in names or (part.by_reverse and names):
        return f'{names[0]} > float("-inf")'
    return " | ".join(f"({n} != 0.0)" for n in names) or "q_idx < q_len"


def dkdv_slots(
    plan: Plan,
    qk_chunks: tuple[Chunk, ...],
    by_tile: bool,
    hopper: bool = False,
    streams: bool = False,
    bands: Sequence[InputGradient] = (),
) -> dict[str, Any]:
    """Slots of dkdv.py.j2. by_tile: distances are split by tile, which is exact enough for 16-bit tensors, whose tiles
    are loaded through descriptors.

    hopper: for a kernel in which several warpgroups share a block of keys; streams: another warp reads the values per
    query; bands: gradients with an entry per distance that this kernel sums."""
    wanted = [g for g in plan.gradients if g.kind == "col"] + (summed_by_key(plan) if hopper else [])
    wanted += bands
    edges = [edge("q_idx", False), edge("kv_idx", False)]
    inside = "kv_idx < kv_len"
    slots = tile_slots(
        *(plan, qk_chunks, False, wanted, plan.over_queries, "BLOCK_M", edges, inside),
        many_heads=True,
        by_tile=by_tile,
        hopper=hopper,
        streams=streams,
        boxes=by_tile and not hopper,
    )
    return {
        **slots,
        "bands": [],
        "one_loop": plan.one_loop and not slots["resident_operands"] and not slots["accumulators"],
    }


def summed_by_key(plan: Plan) -> list[InputGradient]:
    """Gradients with an entry per head that Gluon's kernel of dK and dV sums, over the queries of each key first: those
    of a branch's factor, which are sums of dp."""
    if len(plan.parts) == 1:
        return []
    return [g for g in plan.gradients if g.kind == "program" and not g.row_only and not g.expr.has(DELTA)]


def dq_slots(
    plan: Plan,
    qk_chunks: tuple[Chunk, ...],
    by_tile: bool,
    hopper: bool = False,
    elsewhere: Sequence[InputGradient] = (),
) -> dict[str, Any]:
    """Slots of dq.py.j2; `by_tile` is that of `dkdv_slots`.

    hopper: for a kernel in which several warpgroups share a block of queries, and which computes only dQ; elsewhere:
    gradients that another kernel computes."""
    wanted = [g for g in plan.gradients if g.kind in ("program", "row") and g not in elsewhere]
    wanted = [] if hopper else wanted
    edges = [edge("kv_idx", True)]
    inside = "q_idx < q_len"
    return tile_slots(
        *(plan, qk_chunks, True, wanted, plan.over_keys, "BLOCK_N", edges, inside),
        settle=not hopper,
        by_tile=by_tile,
        hopper=hopper,
        boxes=by_tile and not hopper,
    )


def settles_delta(kv: dict[str, Any], dq: dict[str, Any]) -> bool:
    """Whether the kernel of dQ runs first and stores the exact delta for the kernel of dK and dV. It does if both
    contribute to the gradient of one input: `forgetting` sums such gradients along the tokens, so the errors of a
    rounded delta would accumulate."""
    by_key = {str(g.read.input) for g in kv["gradients"] if g.expr.has(DELTA)}
    return any(str(g.read.input) in by_key for g in dq["settled"] if not g.own)
