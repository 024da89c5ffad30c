"""Template slots of the Gluon kernel of dQ: those of dq.py.j2, divided among specialized warps."""

from __future__ import annotations

from typing import Any

from attncc.codegen.backward import dq_slots
from attncc.codegen.chunks import chunks
from attncc.codegen.hopper import kernel_arguments, tile_slots, translated
from attncc.codegen.launch import EVEN_REGISTERS
from attncc.codegen.plan import Plan
from attncc.codegen.statements import free_names
from attncc.schedule import hopper_backward

#: arguments of the kernel that its warps may need, besides the variant's inputs
_COMMON = ("scale", "heads", "group", "q_len", "kv_len", "WIDE", "FAST_MATH")


def hopper_dq_slots(plan: Plan, d_qk: int, d_v: int) -> dict[str, Any]:
    """Slots of hopper_dq.py.j2: those of dq.py.j2 in Gluon, without gradients of inputs, and the names that each
    function takes. `loads`, `attends`: the kernel's arguments that the loading warp and the computing warpgroups need;
    `taken`: the names that the stages read; `stages`: numbers of tiles of keys, and of values, in shared memory."""
    k = dq_slots(plan, chunks(d_qk), by_tile=True, hopper=True)
    (chain,) = k.pop("chains")
    bounds = k["bounds"]
    tiles = [*bounds.setup, "i = 0", *bounds.mixed, *bounds.full]
    place = ["n = q_len + heads + group"]
    own = [*chain["score_lines"], f"s = {chain['score']}", *chain["weight_lines"], *chain["show"], *chain["grad_lines"]]
    own += chain["hide"]
    if chain["less_delta"]:
        own.append("dp = dp - delta")
    taken = [n for n in free_names(own) if n not in ("qk", "dp")]
    own = [*k["outer"], *own, *k["final_lines"], f"n = {chain['dqk_scale']}"]
    pointers = ["ROWS_PTR"] if k["rows"] else []
    arguments = kernel_arguments(plan, pointers, bool(bounds.scan), _COMMON)
    loads, attends = free_names([*place, *tiles]), (*pointers, *free_names([*place, *tiles, *own]))
    slots = {key: translated(value) for key, value in {**k, **chain}.items()}
    slots.update(
        loads=[n for n in arguments if n in loads],
        attends=[n for n in arguments if n in attends],
        **tile_slots(bounds),
        taken=taken,
        ahead=[],
        maps=[],
        block_n=hopper_backward.ROWS,
        stages=hopper_backward.dq_stages(d_qk, d_v),
        registers=EVEN_REGISTERS[2],
    )
    return slots
