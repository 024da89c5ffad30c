"""Split-KV as the scheduler sees it: when a call wants it, its tilings, and into how many parts the keys are dealt.

Where there are few rows, all that a kernel does is to read the keys and values once, as fast as the memory gives them.
That takes every SM, with enough bytes under way in each: the query heads of a group share a tile, and the tiles of one
key head are dealt to several programs, whose results a second kernel merges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import ceil

from attncc.schedule.device import Device
from attncc.schedule.memory import instruction, shared_memory, tiling
from attncc.schedule.problem import KernelSchedule, PairCosts, Problem, head_chunks
from attncc.schedule.registers import register_limit, registers, spilled_registers

#: rows of a key head, all its query heads together, that are few: a tensor core's tile hardly fills with them
FEW_ROWS = 64
#: queries that are few however many heads share their keys
FEW_QUERIES = 16
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

#: the share of the memory's rate that a kernel which only reads can have: a copy on the H100 takes 3.02 of 3.35 TB/s
DRAM_SHARE = 0.92
#: clocks from a load to its data while the memory is busy; a pipeline of n stages hides all but 4^(1-n) of it
BUSY_LATENCY = 1500
#: bytes a clock that one SM can take in from memory
SM_BYTES_PER_CLK = 20
#: clocks of a tile from its data to its share of the accumulator, when one program does nothing else
TILE_CHAIN = 1200
#: two limits that are close get in each other's way: a p-norm
OVERLAP = 4
#: clocks before the first load of a program and after its last tile
PROGRAM_ENDS = 2500
#: the share of the matmul rate that an instruction reaches; those of a single warp are half as fast
MATMUL_SHARE = {"fma": 0.8, "mma": 0.5, "wgmma": 0.8, "tcgen05": 0.8, "mfma": 0.5}
SMEM_BYTES_PER_CLK = 128
#: microseconds of the merge beside its bytes: a launch behind another, two round trips to memory
MERGE_US = 3.0
MAX_THREADS_PER_SM = 2048
RESERVED_BYTES = 1024


def suits(problem: Problem) -> bool:
    """Are the rows of a key head so few, and its keys so many, that whole rows would be the wrong share of work?"""
    few = problem.q_len <= FEW_QUERIES or problem.q_len * _pack(problem) <= FEW_ROWS
    return few and not problem.costs.whole_rows and problem.kv_len >= KEYS_A_QUERY * problem.q_len


def leaves_idle(problem: Problem, device: Device) -> bool:
    """Would programs that own whole rows leave half of the SMs without work?"""
    programs = ceil(problem.q_len / LONG_BLOCK) * problem.batch * problem.heads
    return not problem.costs.whole_rows and 2 * programs <= device.sms and problem.kv_len >= WORTH_SPLITTING


def tilings(problem: Problem, device: Device) -> tuple[KernelSchedule, ...]:
    """The tilings that fit, each with the number of splits that the model likes best, half of it, and twice of it.

    Where none fits in registers, the one that wants the fewest of all that fit in shared memory, if any does."""
    sizes = [
        ks for ks in _sizes(problem, device) if shared_memory("forward", ks, problem, device) <= device.smem_per_block
    ]
    spills = {ks: spilled_registers("forward", ks, problem, device) for ks in sizes}
    found = []
    for ks in sizes:
        if spills[ks] == min(spills.values()):
            best = best_splits(ks, problem, device)
            found += [
                replace(ks, splits=n) for n in sorted({max(best // 2, 1), best, min(2 * best, _most(ks, problem))})
            ]
    return tuple(found)


def _sizes(problem: Problem, device: Device) -> Iterator[KernelSchedule]:
    rows = problem.q_len * _pack(problem)
    covering = max(ROWS[0], 1 << (rows - 1).bit_length())
    heights = [height for height in ROWS if height <= covering]
    # the pointers of a head dimension in several chunks take the registers of a long tile
    chunked = max(len(problem.qk_chunks), len(head_chunks(problem.d_v))) > 1
    longest = min(64 if chunked else KEYS[-1], max(KEYS[0], 1 << (problem.kv_len - 1).bit_length()))
    shortest = (
        16 if problem.dtype == "fp32" else 32
    )  # a tile of 16-bit keys is short of bytes before it is of registers
    for block_m, block_n, warps, stages in product(heights[-2:], KEYS, WARPS, STAGES[device.backend]):
        if min(shortest, longest) <= block_n <= longest:
            yield KernelSchedule(block_m, block_n, warps, stages, splits=1)


def best_splits(ks: KernelSchedule, problem: Problem, device: Device) -> int:
    """The number of splits by which the model expects a tiling to be fastest; the fewest of several as good."""
    lines, _ = _grid(ks, problem)
    slots = device.sms * programs_per_sm(ks, problem, device)
    filling = [waves * slots // lines for waves in (1, 2, 3, 4)]
    choices = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, *filling}
    allowed = sorted(n for n in choices if 1 <= n <= _most(ks, problem))
    return min(allowed, key=lambda n: (round(predict(replace(ks, splits=n), problem, device)[0], 1), n))


def with_best_splits(ks: KernelSchedule, problem: Problem, device: Device) -> KernelSchedule:
    """A tiling that was measured at other sizes, with the splits for these."""
    return replace(ks, splits=best_splits(ks, problem, device))


def visited(ks: KernelSchedule, problem: Problem) -> tuple[int, int, int]:
    """(whole, cut, all) tiles of one head that blocks as high as this tiling's meet."""
    live = problem.costs.live(_queries(ks, problem) if ks.splits else ks.block_m, ks.block_n)
    return live.full, live.mixed, live.total


def _pack(problem: Problem) -> int:
    """Query heads that are rows of one tile."""
    return problem.group if problem.costs.packs_heads else 1


def _queries(ks: KernelSchedule, problem: Problem) -> int:
    """Queries of a block."""
    return max(ks.block_m // _pack(problem), 1)


def _grid(ks: KernelSchedule, problem: Problem) -> tuple[int, float]:
    """Programs without splits, and the tiles that one of them visits on average."""
    full, mixed, _ = visited(ks, problem)
    tiles = (full + mixed) / ceil(problem.q_len / _queries(ks, problem))
    blocks = ceil(problem.q_len * _pack(problem) / ks.block_m)
    return blocks * problem.batch * problem.heads // _pack(problem), tiles


def _most(ks: KernelSchedule, problem: Problem) -> int:
    """The number of splits beyond which some would have no tile."""
    return max(1, min(MAX_SPLITS, ceil(_grid(ks, problem)[1])))


def programs_per_sm(ks: KernelSchedule, problem: Problem, device: Device) -> int:
    """How many programs an SM holds at once, by shared memory, registers and threads."""
    threads = ks.num_warps * device.warp_size
    by_memory = device.smem_per_sm // (shared_memory("forward", ks, problem, device) + RESERVED_BYTES)
    wanted = min(registers("forward", ks, problem, device), register_limit(ks, device))
    return max(1, min(by_memory, int(device.regs_per_sm // (wanted * threads)), MAX_THREADS_PER_SM // threads))


def predict(ks: KernelSchedule, problem: Problem, device: Device) -> tuple[float, dict[str, float]]:
    """The time of the launches in microseconds, and each unit's own.

    Programs that run together share the memory's rate; none takes in more than its SM can, or than the bytes that its
    pipeline has under way last until others come. A program's tile takes that long, or as long as its arithmetic.
    """
    clocks_per_us = device.clock_ghz * 1e3
    lines, tiles = _grid(ks, problem)
    programs, resident = lines * ks.splits, programs_per_sm(ks, problem, device)
    each, longest = tiles / ks.splits, ceil(tiles / ks.splits)
    qk, v = sum(problem.qk_chunks), sum(head_chunks(problem.d_v))
    tile_bytes = sum(tile.rows * tile.dim for tile in tiling("forward", ks, problem).streamed) * problem.dtype_bytes
    work = _work(ks, problem)
    pairs = ks.block_m * ks.block_n
    flops = device.matmul_tflops(problem.dtype, problem.precision) * 1e3 / device.clock_ghz / device.sms
    share = MATMUL_SHARE[instruction("forward", ks, problem, device)]
    tensor = 2 * pairs * (qk + v * problem.values * problem.branches) / (flops * share)
    sfu = work.sfu * pairs / device.sfu_per_clk_sm
    alu = work.fma * pairs / device.fma_per_clk_sm + work.int * pairs / device.int_per_clk_sm
    operands = tile_bytes / SMEM_BYTES_PER_CLK
    # row blocks of one head, and heads that could not be packed, find the tiles of the first in the cache
    readers = max(lines / (problem.batch * problem.kv_heads), 1.0)
    dram_clk = device.dram_gbps * DRAM_SHARE / device.clock_ghz  # bytes a clock of the whole card

    def wave(active: int) -> float:
        """Clocks of programs that start together."""
        together = min(resident, ceil(active / device.sms))
        under_way = max(ks.num_stages - 1, 0.5) * tile_bytes
        rate = min(SM_BYTES_PER_CLK / together, under_way / BUSY_LATENCY)
        arithmetic = max((tensor + sfu + alu + operands) * together, TILE_CHAIN + tensor + sfu + alu)
        arithmetic += BUSY_LATENCY * 0.25 ** (ks.num_stages - 1) / together
        limits = (longest * tile_bytes / rate, longest * arithmetic, each * tile_bytes * active / readers / dram_clk)
        return sum(limit**OVERLAP for limit in limits) ** (1 / OVERLAP) + PROGRAM_ENDS

    slots = device.sms * resident
    full_waves, last = divmod(programs, slots)
    clocks = full_waves * wave(slots) + (wave(last) if last else 0.0)
    merge = _merge_us(ks, problem, device) if ks.splits > 1 else 0.0
    launch = device.launch_us + merge
    spread = lines * tiles / device.sms / clocks_per_us
    terms = {
        "tensor": tensor * spread,
        "sfu": sfu * spread,
        "alu": alu * spread,
        "memory": lines / readers * tiles * tile_bytes / dram_clk / clocks_per_us,
        "launch": launch,
    }
    return clocks / clocks_per_us + launch, terms


def _work(ks: KernelSchedule, problem: Problem) -> PairCosts:
    """The operations of an average pair; mixed tiles pay for the mask."""
    full, mixed, _ = visited(ks, problem)
    pair, mask, share = problem.costs.forward, problem.costs.mask, mixed / max(full + mixed, 1)
    return PairCosts(fma=pair.fma + share * mask.fma, sfu=pair.sfu + share * mask.sfu, int=pair.int + share * mask.int)


def _merge_us(ks: KernelSchedule, problem: Problem, device: Device) -> float:
    """The merge: partial results are written and read once, in float32."""
    rows = problem.batch * problem.heads * problem.q_len * ks.splits
    bytes_moved = 2 * 4 * rows * (problem.d_v * problem.values + 2) * problem.branches
    return MERGE_US + bytes_moved / (device.dram_gbps * DRAM_SHARE * 1e3)
