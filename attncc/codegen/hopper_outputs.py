"""Template slots of the Gluon light pass that reduces over the queries: Triton's, divided among specialized warps."""

from __future__ import annotations

from typing import Any

from attncc.codegen.hopper import kernel_arguments, needed_by, tile_slots, translated
from attncc.codegen.outputs import pass_slots
from attncc.codegen.plan import Plan
from attncc.codegen.similarity import SimilaritySlots
from attncc.codegen.statements import free_names, in_gluon
from attncc.passes.outputs import Pass, Weight

#: arguments of the kernel that its warps may need, besides the variant's inputs
_COMMON = ("scale", "heads", "group", "q_len", "kv_len", "WIDE", "FAST_MATH")


def in_warps(plan: Plan, light: Pass) -> bool:
    """Whether Gluon has a kernel for this pass: reductions over the queries of a key, with scores q k^T."""
    ops = {n.reduction.op for n in light.reductions}
    return light.domain.kind == "col" and "argmax" not in ops and SimilaritySlots(plan).plain_dot


def hopper_pass_slots(plan: Plan, light: Pass, weight: Weight, number: int) -> dict[str, Any]:
    """Slots of hopper_outputs_by_key.py.j2. `arguments`: those of the warps that reduce; `loads`: those of the loading
    warp; `block_lines`: statements that the loading warp needs to find the block's tiles."""
    u = pass_slots(plan, light, weight, number, hopper=True)
    bounds = u["bounds"]
    pointers = [f"{name.upper()}_PTR" for name in (*u["saved"], *(r["name"] for r in u["reductions"]))]
    arguments = kernel_arguments(plan, pointers, bool(bounds.scan), _COMMON, tables=False)
    tiles = [*bounds.setup, "i = 0", *bounds.mixed, *bounds.full]
    own = needed_by(tiles, u["outer"])
    loads = free_names(["n = q_len + kv_len + heads + group", *own, *tiles])
    saved = [f"{name.upper()}_PTR" for name in u["saved"]]
    slots = {key: translated(value) for key, value in u.items()}
    for r in slots["reductions"]:
        r["dtype"] = in_gluon(r["dtype"])
    return {
        **slots,
        **tile_slots(bounds),
        "bounds": bounds,
        "arguments": arguments,
        "loads": [n for n in arguments if n in loads or n in saved],
        "block_lines": [in_gluon(line) for line in own],
        "row_tiles": [f"{name}_rows" for name in u["saved"]],
        "name": f"by_key_in_warps_{number}",
    }
