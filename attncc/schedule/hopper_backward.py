"""The Gluon backward for Hopper from the scheduler's view: two warpgroups of 64 keys each, over streamed queries.

For wide heads dQ has its own kernel; for still wider ones, one warpgroup accumulates dK and the other dV of the same 64
keys. With two branches, each warpgroup computes dQ of one branch.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import ceil

from attncc.schedule.device import Device
from attncc.schedule.model import model
from attncc.schedule.problem import KernelSchedule, Problem, WarpWork, head_chunks

#: keys of a warpgroup, and of a program
ROWS, KEYS = 64, 128
#: the widest heads of q and v, added up, beside whose dK, dV and scores two warpgroups leave a third one the registers
#: that dQ takes; they were 1.13 times as fast for it at 96
SUMMED_APART = 192
#: tiles of queries under way, most wanted first: with two, both warpgroups wait for the next at once (at 96, three were
#: 1.04 times as fast)
STAGES = (3, 2)
#: and with a warpgroup for dQ: at 64, four were up to 1.04 times as fast as three
STAGES_APART = (4, *STAGES)
#: of the kernel of dQ, most wanted first, and the bytes for its tiles: all of a block's but for its barriers
DQ_STAGES = ((3, 3), (3, 2), (2, 2), (2, 1))
DQ_TILE_BYTES = 231424
#: of shared memory, in bytes: what a program may have, and what is left beside two tiles of keys at least, for
#: barriers and what the compiler hands to the warps: 880 to 1,000 bytes, and some for each input
SHARED_BYTES, LEAST_RESERVED = 232448, 1536
#: tiles of queries, in the mean, that a block of keys has in a short loop: blocks that are dealt were 1.03 times as
#: fast with 32 tiles and 0.99 with 65 at heads of 128; at 64, 1.04 with 128
SHORT_LOOP = 48
#: bytes of an entry of a tile
ENTRY_BYTES = 2
#: the widest head of which one warpgroup computes all columns of dQ, for half of the rows
NARROW = 64
#: the widest heads of q and v, added up, of which a warpgroup has dK and dV of 64 keys and one tile of scores, or of dp
OWN_KEYS = 320
#: matmuls of a pair: of the head dimension of v, of that of q and k; and the same where dQ has a kernel of its own
MATMULS_V, MATMULS_QK = 2, 3
WIDE_MATMULS_V, WIDE_MATMULS_QK = 3, 4
#: strips of queries in which a tile is weighed, one after the other, where all at once was seen to spill: fewest first
STRIPS = (2, 4, 8)
#: the most strips beside which dp is under way; with more it has no registers yet
STRIPS_BESIDE = 2
#: tiles of registers that strips save: of what lives between scores and slope, and with more of them dp
STRIP_TILES, LATE_TILES = 0.5, 1.5
#: bytes of an entry of dQ in its passes through memory: read as float32, written in 16 bits; and those of the zeros
#: that are written first, for a third warpgroup to add to: other kernels store an entry before they add to it
SUM_BYTES, ZERO_BYTES = 6, 4
#: and of one of dK or dV that several programs add up in turns: float32, written and read; between programs it is in L2
TURN_BYTES = 8
#: launches: what goes before and after sums of dQ
LAUNCHES = 3
FIT = model().gluon_backward


def wide(d_qk: int, d_v: int) -> bool:
    """Whether dK and dV of 64 keys take so many registers that dQ needs a kernel of its own."""
    return max(sum(head_chunks(d_qk)), sum(head_chunks(d_v))) > 2 * NARROW


def shares_keys(d_qk: int, d_v: int, warps: WarpWork) -> bool:
    """Whether, for wide heads, both warpgroups have the same 64 keys: one accumulates dK, the other dV. Otherwise
    each has dK and dV of its own keys, which moves a quarter less through shared memory but leaves registers for only
    one value per pair that waits for dp."""
    both = sum(head_chunks(d_qk)) + sum(head_chunks(d_v))
    return wide(d_qk, d_v) and (both > OWN_KEYS or not warps.slope or warps.columns > 0)


def summed_apart(d_qk: int, d_v: int, warps: WarpWork) -> bool:
    """Whether a third warpgroup computes dQ. Otherwise the two that have the keys share its columns: for wider heads,
    for heads that are not narrow if two values per pair wait for dp, and for all heads if three do; those spilled."""
    both = sum(head_chunks(d_qk)) + sum(head_chunks(d_v))
    widest = next((width for waiting, width in ((1, SUMMED_APART), (2, 2 * NARROW)) if _waiting(warps) <= waiting), 0)
    return both <= widest and not wide(d_qk, d_v) and warps.branches == 1


def _waiting(warps: WarpWork) -> int:
    """Values per pair that are kept until dp is there."""
    return (1 if warps.slope else 2) + warps.columns_apart


def holds_keys(d_qk: int, d_v: int, warps: WarpWork) -> bool:
    """Whether a warpgroup holds its keys and values in registers, as left operands of the matmuls of scores and dp.
    That saves a sixth of the shared-memory reads, which bound the kernel. A slope with a factor of the row needs
    these registers itself."""
    narrow = max(sum(head_chunks(d_qk)), sum(head_chunks(d_v))) <= NARROW
    return narrow and summed_apart(d_qk, d_v, warps) and _waiting(warps) == 1 and not warps.slope_by_row


def both_branches(d_qk: int, d_v: int, warps: WarpWork) -> bool:
    """Whether one kernel can compute both branches of a variant with two: the columns of q of each branch must form one
    operand, whose dQ one warpgroup computes, and one value per pair waits for dp."""
    own = d_qk // 2
    return warps.branches == 2 and head_chunks(own) == (own,) and own <= NARROW and not wide(own, d_v) and warps.slope


def queries(d_qk: int, d_v: int, warps: WarpWork) -> int | None:
    """Queries per tile; None if there is no kernel. Two warpgroups cannot share 64 or fewer columns of dQ, and
    operands are split at multiples of 64 only; with two branches, each warpgroup has the columns of one."""
    if warps.branches > 1:
        return ROWS if both_branches(d_qk, d_v, warps) else None
    qk = head_chunks(d_qk)
    alone = summed_apart(d_qk, d_v, warps) and len(qk) == 1
    return ROWS if sum(qk) > NARROW or wide(d_qk, d_v) or alone else None


def dq_stages(d_qk: int, d_v: int) -> tuple[int, int]:
    """The stages of 64 keys and of 64 values for which the dQ kernel has shared memory beside 128 queries and their
    dout."""
    qk, v = (2 * sum(head_chunks(dim)) for dim in (d_qk, d_v))
    return next(
        (keys, values)
        for keys, values in DQ_STAGES
        if KEYS * (qk + v) + ROWS * (keys * qk + values * v) <= DQ_TILE_BYTES
    )


def tried(problem: Problem) -> tuple[KernelSchedule, ...]:
    """All tilings, before registers and shared memory are checked; none for sums per key that two warpgroups would
    have to share. A program processes all query heads of a group, or one of them; then the programs of a group add dK
    and dV in float32, in turn."""
    heads = (problem.d_qk, problem.d_v)
    block_m, shares = queries(*heads, problem.costs.warps), shares_keys(*heads, problem.costs.warps)
    if block_m is None or (shares and problem.costs.warps.columns):
        return ()
    shared = (0, problem.group) if problem.group > 1 else (0,)
    keys = ROWS if shares else KEYS
    warps, stages = (12, STAGES_APART) if summed_apart(*heads, problem.costs.warps) else (8, STAGES)
    found = []
    for count, splits in product(stages, shared):
        whole = KernelSchedule(block_m, keys, warps, count, "gluon", splits)
        found += [whole, *in_strips(whole, problem)]
    return tuple(sorted(found, key=lambda ks: not deals(ks, problem)))


def deals(ks: KernelSchedule, problem: Problem) -> bool:
    """Whether a program is persistent and processes block after block, loading the next block while it finishes one.
    Not for wide heads or branches, which gained nothing or spilled, nor for groups of heads, which spilled; in strips
    the loading warp stores dK and dV. A second tile of keys must fit. Heads that are not narrow must have short
    loops: otherwise each tile's extra time exceeds what overlapping blocks saves."""
    if problem.group > 1 or problem.branches > 1 or ks.strips or wide(problem.d_qk, problem.d_v):
        return False
    if problem.costs.warps.passes_on:  # dQ has its own kernel
        return False
    narrow = max(sum(head_chunks(problem.d_qk)), sum(head_chunks(problem.d_v))) <= NARROW
    tiles = problem.costs.live(ks.block_m, ks.block_n).live / ceil(problem.kv_len / ks.block_n)
    if tiles > SHORT_LOOP and not narrow:
        return False
    values = problem.costs.rows + problem.costs.warps.asked
    return ks.num_stages <= stages_beside_keys(problem.d_qk, problem.d_v, values)


def stages_beside_keys(d_qk: int, d_v: int, values: int) -> int:
    """The most stages of queries, each with `values` values of 4 bytes per query, that leave shared memory for the
    tile of keys of the next block."""
    qk, v = sum(head_chunks(d_qk)), sum(head_chunks(d_v))
    beside = (KEYS * (2 * qk + v) + 2 * KEYS * ROWS) * ENTRY_BYTES + ROWS * 4 * (qk if qk > NARROW else 2 * qk)

    def needed(count: int) -> int:
        return beside + count * ROWS * ((qk + v) * ENTRY_BYTES + 4 * values) + LEAST_RESERVED

    return max((count for count in STAGES_APART if needed(count) <= SHARED_BYTES), default=0)


def has_strips(problem: Problem) -> bool:
    """Whether a tile can be processed in strips: with one branch, and dQ in the same kernel."""
    return problem.branches == 1 and not wide(problem.d_qk, problem.d_v)


def in_strips(ks: KernelSchedule, problem: Problem) -> tuple[KernelSchedule, ...]:
    """The same tile in strips, for a formula of which the whole tile was seen to spill, or is expected to: with a
    further sum per key, or means over the queries, strips took 0.80 to 0.87 of Triton's time. For other
    formulas that keep two values per pair until dp is there they took 1.08 and 1.67, because strips spill, too."""
    warps = problem.costs.warps
    expected = warps.means or warps.columns_apart > 0
    if not has_strips(problem) or not (expected or problem.spilled("dkdv", ks)):
        return ()
    return tuple(replace(ks, strips=count) for count in STRIPS)


def shared_memory(ks: KernelSchedule, problem: Problem, reserved: int) -> int:
    """Bytes of shared memory per program: its tiles and the reserve; capped at SHARED_BYTES if a second tile of keys
    just fits."""
    if deals(ks, problem):
        second = ks.block_n * sum(head_chunks(problem.d_qk)) * problem.dtype_bytes
        return min(_tile_bytes(ks, problem) + second + reserved, SHARED_BYTES)
    return _tile_bytes(ks, problem) + reserved


def _tile_bytes(ks: KernelSchedule, problem: Problem) -> int:
    """Bytes of tiles: k and v; the stages of q, dout and row values; two tiles of ds; and for each warpgroup its tile
    of dQ, or for wide heads of p."""
    qk, v = sum(head_chunks(problem.d_qk)), sum(head_chunks(problem.d_v))
    resident = ks.block_n * (qk + v) * problem.dtype_bytes
    apart, shares = wide(problem.d_qk, problem.d_v), shares_keys(problem.d_qk, problem.d_v, problem.costs.warps)
    asked = 0 if shares else problem.costs.warps.asked
    ring = ks.num_stages * ks.block_m * ((qk + v) * problem.dtype_bytes + 4 * (problem.costs.rows + asked))
    ds = 2 * ks.block_n * ks.block_m * problem.dtype_bytes
    if apart:
        return resident + ring + (2 * ds if shares else 0)
    return resident + ring + ds + ROWS * 4 * (qk if qk > NARROW or problem.branches > 1 else 2 * qk)


def registers(ks: KernelSchedule, problem: Problem) -> int:
    """Registers per thread: dK and dV of 64 keys, or one of them; scores and dp of a tile; the weights as a 16-bit
    operand, if they are needed at the same time; and the values per pair that wait for dp."""
    costs = problem.costs
    qk, v = sum(head_chunks(problem.d_qk)), sum(head_chunks(problem.d_v))
    apart, shares = wide(problem.d_qk, problem.d_v), shares_keys(problem.d_qk, problem.d_v, costs.warps)
    held = max(qk, v) if shares else qk + v
    # of wide heads a warpgroup with keys of its own has its matmuls one after the other
    tiles = (1.5 if apart and not shares else 2.5) + (0 if costs.warps.slope else 1)
    tiles += costs.warps.columns_apart + 2 * costs.backward.loads
    tiles -= (LATE_TILES if ks.strips > STRIPS_BESIDE else STRIP_TILES) if ks.strips else 0
    return round(ROWS * (held + ks.block_m * tiles) / 128)


def efficiency(problem: Problem) -> float:
    """The fraction of peak throughput that the tensor cores reach."""
    return FIT.wide_efficiency if wide(problem.d_qk, problem.d_v) else FIT.tensor_efficiency


def predict(ks: KernelSchedule, problem: Problem, device: Device) -> tuple[float, dict[str, float]]:
    """The predicted time of dK, dV and dQ in microseconds, and that of each unit by itself; of dK and dV alone where
    terms of the similarity are passed on, since dQ then has a kernel of its own in either language."""
    lines, splits = problem.batch * problem.heads, max(ks.splits, 1)
    live = problem.costs.live(ks.block_m, ks.block_n)
    tiles, pairs = live.live * lines, ks.block_m * ks.block_n
    blocks = ceil(problem.kv_len / ks.block_n) * problem.batch * problem.kv_heads * splits
    qk, v = sum(head_chunks(problem.d_qk)), sum(head_chunks(problem.d_v))
    work, mask = problem.costs.pair("dkdv"), problem.costs.mask
    share = live.mixed / live.live if live.live else 0.0
    flops = device.matmul_tflops(problem.dtype, problem.precision) * 1e3 / device.clock_ghz / device.sms
    apart = wide(problem.d_qk, problem.d_v)
    sums = not apart and not problem.costs.warps.passes_on
    zeroed = summed_apart(problem.d_qk, problem.d_v, problem.costs.warps)
    matmuls = WIDE_MATMULS_QK * qk + WIDE_MATMULS_V * v if apart else (MATMULS_QK - 1 + sums) * qk + MATMULS_V * v
    tensor = 2 * pairs * matmuls / flops
    sfu = (work.sfu + share * mask.sfu) * pairs / device.sfu_per_clk_sm
    alu = (work.fma + share * mask.fma) * pairs / device.fma_per_clk_sm
    alu += (work.int + share * mask.int) * pairs / device.int_per_clk_sm
    alone = (tensor + sfu + alu) / (ks.block_n // ROWS) + FIT.turn
    busy = max(tensor / efficiency(problem), sfu + alu, alone)
    if ks.strips:
        busy *= FIT.strips[STRIPS.index(ks.strips)]
    waves = blocks / device.sms
    # blocks of unlike lengths end one by one: about a block after the last SM could
    rounds = waves + 1 if live.live < live.total else ceil(waves)
    spread = rounds / waves / device.sms / (device.clock_ghz * 1e3)
    sum_bytes = SUM_BYTES + zeroed * ZERO_BYTES if sums else 0
    rows = lines * problem.q_len * (sum_bytes * problem.d_qk + 4 * problem.d_v)
    if splits > 1:
        rows += problem.batch * problem.kv_heads * problem.kv_len * TURN_BYTES * (problem.d_qk + problem.d_v)
    memory = rows / (device.dram_gbps * 1e3)
    us = (tiles * busy + blocks * FIT.block_overhead) * spread + memory + LAUNCHES * device.launch_us
    terms = {"tensor": tensor * tiles * spread, "sfu": sfu * tiles * spread, "alu": alu * tiles * spread}
    return us, {**terms, "memory": memory, "launch": LAUNCHES * device.launch_us}
