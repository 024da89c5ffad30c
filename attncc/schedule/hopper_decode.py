"""The Gluon split-KV kernel from the scheduler's view, for values that are the first columns of the keys.

A program has 64 rows of one key head, a warp that loads tiles of 64 keys by TMA, and two warpgroups. Each warpgroup
computes every other tile of scores, and half of the columns of the output over all tiles, because an output of 512
columns does not fit the registers of one. Keys lie in shared memory once, as keys and as values; each half of a tile is
reloaded as soon as its half of the output has used it.
"""

from __future__ import annotations

from attncc.schedule.device import Device
from attncc.schedule.problem import Problem, head_chunks

ROWS = KEYS = 64
#: the two tiles of a round; what is loaded next takes the place of what has been multiplied
TILES = 2
#: the widest half of an output that the registers of a warpgroup hold beside a tile of scores
WIDEST_HALF = 256
#: barriers, row values of both warpgroups, and what the compiler keeps for handing arguments to the warps
RESERVED_BYTES = 5120


def serves(qk_chunks: tuple[int, ...], v_chunks: tuple[int, ...]) -> bool:
    """Whether the columns of v are two equal tiles, and the first columns of k."""
    halves = len(v_chunks) == 2 and v_chunks[0] == v_chunks[1] <= WIDEST_HALF
    return halves and qk_chunks[:2] == v_chunks and all(width % KEYS == 0 for width in qk_chunks)


def weights_apart(qk_chunks: tuple[int, ...], v_chunks: tuple[int, ...]) -> bool:
    """Whether weights have a buffer of their own. If k has one tile of columns more than v, as wide as a tile has keys,
    the weights overwrite it once the scores are computed."""
    return qk_chunks[len(v_chunks) :] != (KEYS,)


def refusal(problem: Problem, device: Device) -> str | None:
    """Why there is no such kernel for this problem, or None where there is one."""
    costs = problem.costs
    if costs.whole_rows:
        return costs.whole_rows
    if costs.sweeps or costs.vectors or costs.forward.loads or not costs.packs_heads:
        return "where keys hold their values, Gluon's one kernel reads inputs by query alone, in one pass over the keys"
    if problem.dtype == "fp32":
        return "Gluon kernels multiply 16-bit operands"
    if not serves(problem.qk_chunks, head_chunks(problem.d_v)) or problem.d_v % (2 * KEYS) or problem.d_qk % 8:
        return f"where keys hold their values, Gluon's one kernel has two halves of up to {WIDEST_HALF} columns"
    if shared_memory(problem) > device.smem_per_block:
        return "two tiles of keys beside the queries do not fit into shared memory"
    return None


def shared_memory(problem: Problem) -> int:
    """Bytes of shared memory of a program: the queries, two tiles of keys, and weights where they have their own."""
    width = sum(problem.qk_chunks)
    apart = TILES * ROWS * KEYS if weights_apart(problem.qk_chunks, head_chunks(problem.d_v)) else 0
    return ((ROWS + TILES * KEYS) * width + apart) * problem.dtype_bytes + RESERVED_BYTES


def registers(problem: Problem) -> int:
    """What a thread that computes wants: half of an output's row, a tile of scores, the weights, and what is beside."""
    return round(ROWS * (head_chunks(problem.d_v)[0] + 1.5 * KEYS) / 128) + 32
