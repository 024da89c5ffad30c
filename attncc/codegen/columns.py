"""Template slots of the sweep that precedes a backward whose gradient needs sums per key, over its queries."""

from __future__ import annotations

from typing import Any

import sympy

from attncc.codegen.backward import backward_leaves
from attncc.codegen.bounds import bound_lines
from attncc.codegen.chunks import Chunk
from attncc.codegen.lower import Leaf, Lowering
from attncc.codegen.pairs import blank_tile, edge, similarity_slots, take, visible_lines
from attncc.codegen.plan import Plan
from attncc.codegen.similarity import KEY, SimilaritySlots
from attncc.codegen.slopes import over_raw
from attncc.ir.levels import Level
from attncc.ir.text import formula


def column_slots(plan: Plan, qk_chunks: tuple[Chunk, ...]) -> dict[str, Any]:
    """Slots of columns.py.j2: for each column sum, the mean per key that the backward subtracts from a pair's value.

    A mean is the sum of `value * share` over the sum of `share`, both computed exactly as in the other kernels, so that
    the difference is exactly 0 for a key that only one query sees, with a share of 1."""
    folded, mask = plan.folded, plan.graph["mask"].expr
    similarity, base = SimilaritySlots(plan), backward_leaves(plan)
    tiles: dict[str, Any] = {}
    sums = []
    for column in plan.backward.columns:
        name, value = column.symbol.name, over_raw(plan, column.value)
        if column.normed:  # compute the factors first, as the kernels that subtract the mean do
            of_pair, share = (sympy.Symbol(f"{name}_{part}_tile", real=True) for part in ("value", "share"))
            tiles |= {of_pair.name: value, share.name: folded.apply(column.share)}
            value = of_pair * share
            sums.append(f"{name}_share")
        tiles[f"{name}_sum_tile"] = value
        sums.append(f"{name}_sum")
    leaves = {**base, **{name: Leaf(name, Level.PAIR) for name in tiles}}
    lowering = Lowering(plan.core, leaves, False, blank=blank_tile(similarity, False, plan))
    lowering.count([folded.score, mask, *tiles.values()])
    bounds = bound_lines(plan.over_queries, lowering, "BLOCK_M", "kv_idx < kv_len")
    score = lowering.tile(folded.score)
    visible = visible_lines(lowering, mask, [edge("q_idx", False)])
    score_lines = take(lowering)
    for name, expr in tiles.items():
        lowering.assign(name, expr, Level.PAIR)
    return {
        "mask": formula(mask),
        "bounds": bounds,
        **similarity_slots(similarity, KEY, qk_chunks, lowering, base),
        "outer": lowering.outer,
        "score": score,
        "score_lines": score_lines,
        "visible": visible,
        "sum_lines": take(lowering),
        "hide": [f"{name}_tile = tl.where(visible, {name}_tile, 0.0)" for name in sums],
        "sums": tuple(sums),
        "columns": plan.backward.columns,
        "rows": (*plan.backward.pair_rows, *(("delta",) if plan.needs_delta else ())),
        "helpers": lowering.helpers,
    }
