"""Template slots of the Gluon split-KV kernel for values that are a slice of the keys.

Each of two warpgroups computes its own tile of scores, so the stages are also split after the row maxima, which the
warpgroups exchange there.
"""

from __future__ import annotations

from typing import Any

from attncc.codegen.chunks import Chunk
from attncc.codegen.decode import decode_slots
from attncc.codegen.hopper import kernel_arguments, needed_by, tile_slots, translated
from attncc.codegen.plan import Plan
from attncc.codegen.statements import free_names, in_gluon
from attncc.errors import UnsupportedError
from attncc.schedule import hopper_decode

#: arguments of the kernel that its warps may need, besides the variant's inputs and the pointers
_COMMON = ("scale", "heads", "group", "q_len", "kv_len", "splits", "parts", "WIDE", "FAST_MATH")


def hopper_decode_slots(plan: Plan, qk_chunks: tuple[Chunk, ...], v_chunks: tuple[Chunk, ...]) -> dict[str, Any]:
    """Slots of hopper_decode.py.j2, and under `merge` those of merge.py.j2. UnsupportedError if there is no such
    kernel.

    - `states`: the running row statistics; `shared`: the buffers in which each warpgroup shows its own to the other;
    - `totals`: the statistics of which each warpgroup has a partial result, with the expression that joins the two;
    - `weights_at`: the buffer of the warpgroup's own weights in shared memory; `weights_of`: its format for either one.
    """
    widths = [tuple(c.width for c in pieces) for pieces in (qk_chunks, v_chunks)]
    if not hopper_decode.serves(*widths) or plan.graph.value is None or len(plan.parts) > 1 or not plan.packs_heads:
        raise UnsupportedError(
            f"Gluon has no kernel that splits the keys of '{plan.graph.name}'", remedy="use backend='triton'"
        )
    f = decode_slots(plan, qk_chunks, fades=True)
    (chain,) = f["chains"]
    tiles = tile_slots(f["bounds"])
    pointers = ["Q_PTR", "OUT_PTR", *(f"{name.upper()}_PTR" for name in plan.results), "STATE_PTR", "PART_PTR"]
    arguments = kernel_arguments(plan, pointers, bool(tiles["scan"]), _COMMON, tables=False)
    own = needed_by([*f["bounds"].setup, *f["bounds"].mixed, *f["bounds"].full], f["outer"])
    loads = free_names(["n = q_len + group + heads + splits + kv_len", *own, *tiles["tiles"], *tiles["mixed"]])
    apart = hopper_decode.weights_apart(widths[0], widths[1])
    tail = f"k_{len(qk_chunks) - 1}"
    buffer = "weights.index({})" if apart else f"{tail}.index({{}}).reshape((ROWS, BLOCK_N))"
    moved = [m for m, _ in chain["moves"]]
    return {
        **{key: translated(value) for key, value in {**f, **chain}.items() if key not in ("bounds", "merge", "chains")},
        **tiles,
        "bounds": f["bounds"],
        "merge": f["merge"],
        "chains": f["chains"],
        "arguments": arguments,
        "loads": [n for n in arguments if n in loads],
        "block_lines": [in_gluon(line) for line in own],
        "shared": [f"{s}_both" for s in f["states"]],
        "totals": [(s, _joined(s)) for s in f["states"] if s not in moved],
        "weights_apart": apart,
        "weights_at": buffer.format("consumer"),
        "weights_of": buffer,
        "final": in_gluon(chain["final"].removesuffix("[:, None]")) if chain["final"] else None,
        "final_by_row": bool(chain["final"]) and (chain["guard"] or chain["final"].endswith("[:, None]")),
    }


def _joined(state: str) -> str:
    other = f"{state}_both.index(1 - consumer).load(BY_ROW)"
    return f"gl.maximum({state}, {other})" if state == "seen" else f"{state} + {other}"
