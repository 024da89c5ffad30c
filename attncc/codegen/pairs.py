"""Slots of all kernels that visit tiles of pairs: the values that formulas may use, the mask, the matmuls of scores."""

from __future__ import annotations

from typing import Any

import sympy

from attncc.codegen.chunks import Chunk
from attncc.codegen.components import loop_slots
from attncc.codegen.lower import Leaf, Lowering
from attncc.codegen.plan import Plan
from attncc.codegen.similarity import KEY, QUERY, Side, SimilaritySlots
from attncc.ir.levels import Level
from attncc.passes.fold import LN2, S
from attncc.passes.tiles import hides_what_lies_past_the_keys


def base_leaves(plan: Plan, extra: dict[str, Leaf]) -> dict[str, Leaf]:
    """The values that formulas may use in every kernel: indices, lengths, scalars, and sums over the head dimension."""
    program = {"b": "b", "h": "h", "h_kv": "h_kv", "q_len": "q_len", "kv_len": "kv_len", "num_heads": "heads"}
    leaves = {name: Leaf(text, Level.PROGRAM) for name, text in program.items()}
    leaves["scale"] = Leaf("scale", Level.PROGRAM)
    leaves[LN2.name] = Leaf("ln2", Level.PROGRAM)
    for scalar in plan.graph.scalars:
        leaves[scalar.name] = Leaf(scalar.name, Level.PROGRAM)
    leaves["q_idx"] = Leaf("q_idx", Level.ROW)
    leaves["kv_idx"] = Leaf("kv_idx", Level.COL)
    for part in plan.parts:
        found = part.similarity
        for name in ("qk", S.name, *(dot.name for dot in found.dots), *(loop.name for loop in found.loops)):
            leaves[part.own(name)] = Leaf(part.own(name), Level.PAIR)
    return {**leaves, **extra}


def visible_lines(lowering: Lowering, mask: Any, edges: list[str], name: str = "visible") -> list[str]:
    """Lines that compute `visible` in a tile that the mask, or the edge of a tensor, cuts. Its value in rows past q_len
    does not matter: a kernel masks them by an edge of its own, or has whole rows and does not store these."""
    scope = lowering.branch()
    needless = {edge("kv_idx", first) for first in (True, False)} if hides_what_lies_past_the_keys(mask) else set()
    conditions = [e for e in edges if e not in needless]
    if mask is not sympy.true:
        conditions.append(scope.emit(mask, Level.PAIR))
        lowering.set_aside(scope)
    return [*scope.body, f"{name} = {' & '.join(conditions)}"]


def shown_masks(plan: Plan) -> list[tuple[Plan, str, bool]]:
    """Each part with the name of its mask's value, and whether the part computes it: equal masks are computed once."""
    own = len(plan.masks) > 1
    return [(part, part.own("visible") if own else "visible", own or i == 0) for i, part in enumerate(plan.parts)]


def edge(axis: str, rows_first: bool) -> str:
    length = {"q_idx": "q_len", "kv_idx": "kv_len"}[axis]
    first = (axis == "q_idx") == rows_first
    return f"({axis} < {length}){'[:, None]' if first else '[None, :]'}"


def blank_tile(similarity: SimilaritySlots, rows_first: bool, part: Plan) -> str:
    """A tile of zeros, as text. It is made from the part's own q k, because a pass of one branch has no other's."""
    if similarity.has_dot:
        return f"tl.zeros_like({part.own('qk')})"
    return f"tl.zeros([{'BLOCK_M, BLOCK_N' if rows_first else 'BLOCK_N, BLOCK_M'}], tl.float32)"


def similarity_slots(
    similarity: SimilaritySlots, resident: Side, qk_chunks: tuple[Chunk, ...], kernel: Lowering, base: dict[str, Leaf]
) -> dict[str, Any]:
    """Slots of the matmuls of a tile's scores. `resident`: the side whose tile stays while the other side streams."""
    streamed = KEY if resident is QUERY else QUERY
    return {
        "has_dot": similarity.has_dot,
        "reads_q": similarity.loads(QUERY),
        "reads_k": similarity.loads(KEY),
        "resident_operands": similarity.operands(resident, qk_chunks, kernel, base),
        "streamed_operands": similarity.operands(streamed, qk_chunks, kernel, base),
        "dots": similarity.dots(qk_chunks, rows_first=resident is QUERY),
        "loop": loop_slots(similarity.plan, similarity.found.loops, resident is QUERY, kernel, base),
    }


def take(lowering: Lowering) -> list[str]:
    lines = list(lowering.body)
    lowering.body.clear()
    return lines
