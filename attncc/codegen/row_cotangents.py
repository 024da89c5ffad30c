"""Template slots of the sweep that precedes a backward whose gradient passes through row statistics."""

from __future__ import annotations

from typing import Any

from attncc.codegen.backward import backward_leaves, saw_a_key
from attncc.codegen.bounds import bound_lines
from attncc.codegen.chunks import Chunk
from attncc.codegen.lower import Lowering
from attncc.codegen.pair_exprs import share_of
from attncc.codegen.pairs import blank_tile, edge, similarity_slots, take, visible_lines
from attncc.codegen.plan import Plan
from attncc.codegen.similarity import QUERY, SimilaritySlots
from attncc.codegen.slopes import over_raw
from attncc.ir.levels import Level
from attncc.ir.text import formula
from attncc.passes.differentiate import DELTA, DP


def cotangent_slots(plan: Plan, part: Plan, qk_chunks: tuple[Chunk, ...]) -> dict[str, Any]:
    """Slots of cotangents.py.j2: the row sums that a part's gradient through row statistics needs, and the cotangents
    of the statistics.

    exact: the sweep also sums delta, from the same products and weights as the gradient. Where these cancel, as in a
    row that sees one key, the delta of a rounded output would leave an error, which statistics may amplify: by 1 / std,
    if scores are divided by their standard deviation. shares: the sum is also divided by the sum of those weights,
    which differs from 1 by the rounding of exponents, because these may be in the thousands."""
    folded, backward, mask = part.folded, part.backward, part.graph["mask"].expr
    similarity, base = SimilaritySlots(plan), backward_leaves(plan)
    score = part.tagged(folded.score)
    parts = {part.own(s.name): part.tagged(over_raw(part, e)) for s, e in backward.parts}
    needs_dp = any(DP in e.free_symbols for _, e in backward.parts)
    early = any(DELTA in e.free_symbols for _, e in backward.parts)
    exact = len(plan.parts) == 1 and needs_dp and backward.sweep_needs_delta and not early
    share = share_of(part) if exact else None
    if exact:
        weight = folded.apply(backward.weight)
        parts |= {"exact_delta": weight * DP} | ({"weight_sum": folded.apply(share)} if share is not None else {})
    blank = blank_tile(similarity, True, part)
    running = frozenset({*parts, *([DELTA.name] if exact else [])})
    lowering = Lowering(plan.core, base, running=running, blank=blank)
    lowering.count([score, mask, *parts.values()])
    bounds = bound_lines(plan.over_keys, lowering, "BLOCK_N", "q_idx < q_len")
    score_text = lowering.tile(score)
    visible = visible_lines(lowering, mask, [edge("kv_idx", True)])
    score_lines = take(lowering)
    for name, expr in parts.items():
        lowering.assign(f"{name}_tile", expr, Level.PAIR)
    part_lines = take(lowering)
    after = lowering.after_loop()
    cotangents = [(part.own(s.name), part.tagged(folded.apply(e))) for s, e in backward.cotangents]
    texts = {name: after.emit(e, Level.ROW) for name, e in cotangents}
    rows = [part.own(s.name) for s, _ in backward.saved]
    return {
        "name": f"cotangents{part.tag}_kernel",
        "tag": part.tag,
        "branch": part.branch,
        "mask": formula(mask),
        "bounds": bounds,
        **similarity_slots(similarity, QUERY, qk_chunks, lowering, base),
        "outer": lowering.outer,
        "score": score_text,
        "score_lines": score_lines,
        "visible": visible,
        "part_lines": part_lines,
        "hide": [f"{name}_tile = tl.where(visible, {name}_tile, 0.0)" for name in parts],
        "final_lines": take(after),
        "loaded": (*rows, *((part.own("delta"),) if backward.sweep_needs_delta else ())),
        "parts": tuple(parts),
        "cotangents": tuple(texts),
        "texts": texts,
        "needs_dp": needs_dp,
        "exact": exact,
        "shares": share is not None,
        "alive": saw_a_key(part),
        "helpers": lowering.helpers,
    }
