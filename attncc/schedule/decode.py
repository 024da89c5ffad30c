"""Split-KV for the scheduler: when a call uses it, its tilings, and the number of parts.

With few rows, a kernel only has to read the keys and values once, at memory bandwidth. That takes every SM, each with
enough bytes in flight: the query heads of a group share a tile, and the tiles of one key head are split over several
programs, whose results a second kernel merges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import ceil

from attncc.schedule import hopper_decode_cost
from attncc.schedule.decode_cost import Streaming, grid, live_tiles, pack
from attncc.schedule.device import Device
from attncc.schedule.memory import shared_memory
from attncc.schedule.problem import Kernel, KernelSchedule, Problem, head_chunks
from attncc.schedule.registers import spilled_registers
from attncc.schedule.staging import stages_compile

#: rows of a key head, all its query heads together, that are few: a tensor core's tile hardly fills with them
FEW_ROWS = 64
#: queries that are few however many heads share their keys
FEW_QUERIES = 16
#: below so many keys a length is scheduled as it is
ROUNDED_KEYS = 256
#: the least number of keys for each query, below which there is nothing to split
KEYS_A_QUERY = 4
#: the longest block of queries of the forward that does not split, and the least keys that are worth a second kernel
LONG_BLOCK = 128
WORTH_SPLITTING = 2048
ROWS = (16, 32, 64, 128)
KEYS = (16, 32, 64, 128)
WARPS = (4, 8)
STAGES = {"cuda": (2, 3, 4), "hip": (1, 2)}
MAX_SPLITS = 128


def rounded_keys(q_len: int, kv_len: int) -> int:
    """The number of keys for which a schedule is chosen: beside few queries rounded up to three leading bits."""
    if q_len > FEW_ROWS or kv_len < ROUNDED_KEYS:
        return kv_len
    step = 1 << (kv_len.bit_length() - 3)
    return -(-kv_len // step) * step


def suits(problem: Problem) -> bool:
    """Whether a key head has so few rows and so many keys that its keys should be split."""
    few = problem.q_len <= FEW_QUERIES or problem.q_len * pack(problem) <= FEW_ROWS
    return few and not problem.costs.whole_rows and problem.kv_len >= KEYS_A_QUERY * problem.q_len


def leaves_idle(problem: Problem, device: Device) -> bool:
    """Whether programs that own whole rows would leave half of the SMs idle."""
    programs = ceil(problem.q_len / LONG_BLOCK) * problem.batch * problem.heads
    return not problem.costs.whole_rows and 2 * programs <= device.sms and problem.kv_len >= WORTH_SPLITTING


def tilings(problem: Problem, device: Device) -> tuple[KernelSchedule, ...]:
    """Triton's tilings that fit, each with the number of splits that the model likes best, half of it, and twice of it.

    Where none fits in registers, the one that wants the fewest of all that fit in shared memory, if any does."""
    sizes = [
        ks
        for ks in _sizes(problem, device)
        if shared_memory("forward", ks, problem, device) <= device.smem_per_block
        and stages_compile("forward", ks, problem, device)
    ]
    spills = {ks: spilled_registers("forward", ks, problem, device) for ks in sizes}
    found = []
    for ks in sizes:
        if spills[ks] == min(spills.values()):
            best = best_splits(ks, problem, device)
            around = {max(best // 2, 1), best, min(2 * best, _most(ks, problem))}
            found += [replace(ks, splits=n) for n in sorted(around)]
    return tuple(found)


def _sizes(problem: Problem, device: Device) -> Iterator[KernelSchedule]:
    rows = problem.q_len * pack(problem)
    covering = max(ROWS[0], 1 << (rows - 1).bit_length())
    heights = [height for height in ROWS if height <= covering]
    # the pointers of a head dimension in several chunks take the registers of a long tile
    chunked = max(len(problem.qk_chunks), len(head_chunks(problem.d_v))) > 1
    longest = min(64 if chunked else KEYS[-1], max(KEYS[0], 1 << (problem.kv_len - 1).bit_length()))
    shortest = 16 if problem.dtype == "fp32" else 32
    for block_m, block_n, warps, stages in product(heights[-2:], KEYS, WARPS, STAGES[device.backend]):
        if min(shortest, longest) <= block_n <= longest:
            yield KernelSchedule(block_m, block_n, warps, stages, splits=1)


def best_splits(ks: KernelSchedule, problem: Problem, device: Device) -> int:
    """The number of splits by which the model expects a tiling to be fastest; the fewest of several as good."""
    work = Streaming.of(ks, problem, device)
    filling = [waves * work.slots // work.lines for waves in (1, 2, 3, 4)]
    choices = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, *filling}
    allowed = sorted(n for n in choices if 1 <= n <= _most(ks, problem))
    return min(allowed, key=lambda n: (round(work.us(n), 1), n))


def with_best_splits(ks: KernelSchedule, problem: Problem, device: Device) -> KernelSchedule:
    """A tiling that was measured at other sizes, with the splits for these."""
    if ks.backend == "gluon":
        return replace(ks, splits=hopper_decode_cost.best_splits(ks, problem, device))
    return replace(ks, splits=best_splits(ks, problem, device))


def visited(kernel: Kernel, ks: KernelSchedule, problem: Problem) -> tuple[int, int, int]:
    """(whole, cut, all) tiles of one head that blocks as high as this tiling's meet. The rows of a forward that splits
    the keys are of several heads; those of a backward, whose splits are heads, are not."""
    live = live_tiles(ks, problem) if kernel == "forward" and ks.splits else problem.costs.live(ks.block_m, ks.block_n)
    return live.full, live.mixed, live.total


def _most(ks: KernelSchedule, problem: Problem) -> int:
    """The number of splits beyond which some would have no tile."""
    return max(1, min(MAX_SPLITS, ceil(grid(ks, problem)[1])))
