"""The cost model: how long a kernel takes, from the device's figures and the variant's work over the mask's live tiles.

The unit of the model is one SM. For every tile it counts the clocks of each functional unit, and how far they overlap;
the tiles of all programs are then distributed over the SMs. It is a model for ranking: absolute times are those of a
kernel at the clock of the device file that never waits for anything not counted here.

A GPU's capabilities are in `schedules/devices`, constants fitted to measured kernels in `schedules/model.toml`; the
work of a variant is counted from its stages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, log2
from typing import Literal

from attncc.passes.work import LiveTiles, PairCosts
from attncc.schedule import decode_cost, hopper, hopper_decode_cost
from attncc.schedule.candidates import candidates
from attncc.schedule.device import Device
from attncc.schedule.memory import (
    LANES_ACROSS,
    Tiling,
    instruction,
    scores_bytes,
    shared_memory,
    thread_part,
    tiling,
    warp_grid,
)
from attncc.schedule.model import model
from attncc.schedule.problem import Backend, Kernel, KernelSchedule, Problem, alike
from attncc.schedule.registers import register_limit, registers, spilled_registers

Limit = Literal["tensor", "sfu", "alu", "memory", "launch"]
_LIMITS: tuple[Limit, ...] = ("tensor", "sfu", "alu", "memory", "launch")

# Rows that a matmul in tensor memory takes at once: 64 take as long.
TCGEN05_ROWS = 128
FIT = model().triton
REGISTER_BYTES = 4
# Tilings of a kernel that are compiled for one that does not spill.
SPILLS_SEEN = 4
# Matmuls of a tile.
MATMULS = {"forward": 2, "dkdv": 4, "dq": 3, "pair": 2}


@dataclass(frozen=True)
class Prediction:
    """The predicted time of a kernel in microseconds, the unit that limits it, and each unit's own time."""

    us: float
    limit: Limit
    terms: dict[str, float]


@dataclass(frozen=True)
class _TileClocks:
    """The cost of one tile for each unit of an SM, in clocks."""

    tensor: float
    sfu: float
    alu: float
    memory: float
    gaps: float


def predict(kernel: Kernel, ks: KernelSchedule, problem: Problem, device: Device) -> Prediction:
    """The time of one launch of `kernel` with the tiling `ks`."""
    if ks.backend == "gluon":
        splitting = kernel == "forward" and ks.splits > 0
        us, terms = (
            hopper_decode_cost.predict(ks, problem, device)
            if splitting
            else hopper.predict(kernel, ks, problem, device)
        )
        if hopper.waits_for_arithmetic(kernel, terms, problem):
            return Prediction(us, "sfu" if terms["sfu"] > terms["alu"] else "alu", terms)
        return Prediction(us, max(_LIMITS, key=lambda name: terms[name]), terms)
    if ks.splits:
        us, terms = decode_cost.predict(ks, problem, device)
        return Prediction(us, max(_LIMITS, key=lambda name: terms[name]), terms)
    live = problem.costs.live(ks.block_m, ks.block_n)
    tiles_total = live.live * problem.batch * problem.heads
    programs = _programs(kernel, ks, problem)
    resident = _programs_per_sm(kernel, ks, problem, device)
    clocks = _tile_clocks(kernel, ks, problem, device, live)
    clocks_per_us = device.clock_ghz * 1e3
    waves = programs / (device.sms * resident)
    imbalance = ceil(waves) / waves

    def spread(clocks_a_tile: float) -> float:
        return clocks_a_tile * tiles_total / device.sms * imbalance / clocks_per_us

    # Units of one SM work side by side only as far as there are other warps, ready, to feed them.
    warps_a_scheduler = max(ks.num_warps / device.schedulers_per_sm, 1.0)
    streams = resident * (1 + FIT.lockstep * (warps_a_scheduler - 1))
    compute = (clocks.tensor, clocks.sfu, clocks.alu)
    in_turn = max(compute) + (sum(compute) - max(compute) + clocks.gaps) / streams
    waiting = device.l2_latency_clk * FIT.waiting(ks.num_stages) / resident
    loops = (live.full > 0) + (live.mixed > 0)
    start = (FIT.program_latency + FIT.loop_latency * loops) * ceil(waves) / resident / clocks_per_us
    launch = device.launch_us + start
    busy = (in_turn**FIT.overlap + clocks.memory**FIT.overlap) ** (1 / FIT.overlap)
    if kernel == "dkdv" and _side_by_side(kernel, ks, problem, device):
        busy *= FIT.side_by_side
    taken = shared_memory(kernel, ks, problem, device) / device.smem_per_block
    us = spread(busy + waiting) * (1 + FIT.cache_share * taken) + launch
    terms = {
        "tensor": spread(clocks.tensor),
        "sfu": spread(clocks.sfu),
        "alu": spread(clocks.alu),
        "memory": max(spread(clocks.memory), _dram_us(kernel, problem, device)),
        "launch": launch,
    }
    us = max(us, terms["memory"] + launch)
    return Prediction(us, max(_LIMITS, key=lambda name: terms[name]), terms)


@lru_cache(maxsize=128)
def ranked(
    kernel: Kernel, problem: Problem, device: Device, backend: Backend | None = "triton"
) -> tuple[tuple[KernelSchedule, Prediction], ...]:
    """Every candidate with its prediction, the fastest first; ScheduleError if nothing fits. `backend` as in
    `candidates`.

    Candidates that are expected to spill come last, for how much that costs cannot be told from outside the compiler.
    On warp groups, whose matmuls run beside the spills, it can: there they count as `spill_risk` times as slow.

    Where some were seen to spill, they and those of the same tile count as `expected_us`, and so do those that were
    expected to all along. They also tell by how much the estimate is too low for this formula, or too high: others
    that then are over the limit count as `spill_risk` times as slow. When `SPILLS_SEEN` were seen, the best of them is
    first.
    Rankings are kept: the choice of one schedule asks for the same one several times.
    """
    found = [(ks, predict(kernel, ks, problem, device)) for ks in candidates(kernel, problem, device, backend)]
    seen = {alike(ks): problem.spilled(kernel, ks) for ks, _ in found if problem.spilled(kernel, ks)}
    stages = {ks.num_stages for ks in seen}
    missing = max((_missing(kernel, ks, count, problem, device) for ks, count in seen.items()), default=0.0)

    def order(entry: tuple[KernelSchedule, Prediction]) -> tuple[bool, bool, float]:
        ks, prediction = entry
        if problem.spilled(kernel, ks):
            return False, False, expected_us(kernel, ks, prediction, problem, device)
        over = registers(kernel, ks, problem, device) - register_limit(ks, device) + min(missing, 0.0)
        last = over > 0 and instruction(kernel, ks, problem, device) != "wgmma"
        us = FIT.spill_risk * prediction.us if over + max(missing, 0.0) > 0 else prediction.us
        if seen and over > 0:
            us = _spilling_us(prediction, REGISTER_BYTES * over)
        same_tile = [expected_us(kernel, replace(ks, num_stages=n), prediction, problem, device) for n in stages]
        return len(seen) >= SPILLS_SEEN, last, max((us, *same_tile))

    return tuple(sorted(found, key=order))


def _missing(kernel: Kernel, ks: KernelSchedule, spilled: int, problem: Problem, device: Device) -> float:
    """Registers that the estimate of a kernel lacks which was seen to spill so many bytes; where it was expected to
    spill more, less than 0."""
    wanted = register_limit(ks, device) + spilled / REGISTER_BYTES
    return wanted - registers(kernel, ks, problem, device)


def expected_us(kernel: Kernel, ks: KernelSchedule, prediction: Prediction, problem: Problem, device: Device) -> float:
    """The predicted time with what the kernel was seen to spill; one that was expected to spill more has the risk in
    it that it was to have."""
    seen = problem.spilled(kernel, ks)
    if seen and _missing(kernel, ks, seen, problem, device) < 0:
        return FIT.spill_risk * prediction.us
    return _spilling_us(prediction, seen) if seen else prediction.us


def _spilling_us(prediction: Prediction, spilled: float) -> float:
    """The predicted time of a kernel that spills so many bytes."""
    return prediction.us * (FIT.spill_seen + spilled / FIT.spill_bytes)


def _programs(kernel: Kernel, ks: KernelSchedule, problem: Problem) -> int:
    """Programs in the grid: blocks of what stays, for every head that has its own."""
    if kernel == "dkdv":
        return ceil(problem.kv_len / ks.block_n) * problem.batch * problem.kv_heads
    rows = ceil(problem.q_len / ks.block_m) * problem.batch * problem.heads
    return rows * ceil(problem.kv_len / ks.block_n) if kernel == "pair" else rows


def _programs_per_sm(kernel: Kernel, ks: KernelSchedule, problem: Problem, device: Device) -> int:
    """How many programs of this tiling an SM holds at once, by shared memory, registers and threads."""
    threads = ks.num_warps * device.warp_size
    by_memory = device.smem_per_sm // max(shared_memory(kernel, ks, problem, device) + device.smem_reserved, 1)
    wanted = min(registers(kernel, ks, problem, device), register_limit(ks, device))
    by_registers = int(device.regs_per_sm // (wanted * threads))
    return max(1, min(by_memory, by_registers, device.threads_per_sm // threads))


def _tile_clocks(kernel: Kernel, ks: KernelSchedule, problem: Problem, device: Device, live: LiveTiles) -> _TileClocks:
    """The clocks of an average live tile: a mixed one pays for the mask, too."""
    tiles = tiling(kernel, ks, problem)
    pairs = tiles.rows * tiles.cols
    work = _pair_work(problem.costs.pair(kernel), problem.costs.mask, live)
    twice = _repeated(kernel, ks, tiles, problem, device)
    qk, v = sum(problem.qk_chunks) * problem.costs.similarity.dots, sum(problem.v_chunks)
    scores = {"forward": qk, "dkdv": qk + v, "dq": qk + v, "pair": qk + v}[kernel]
    results = {"forward": v * problem.branches, "dkdv": qk + v, "dq": qk, "pair": 0}[kernel]
    sweeps = problem.costs.sweeps if kernel == "forward" else 0
    depth = twice * (1 + sweeps) * scores + results
    flops_per_clk_sm = device.matmul_tflops(problem.dtype, problem.precision) * 1e3 / device.clock_ghz / device.sms
    # The running sum of the forward is rescaled once a tile.
    rows_work = tiles.rows * (v + FIT.row_work) * problem.branches if kernel == "forward" else 0
    alu = twice * (work.fma * pairs + rows_work) / device.fma_per_clk_sm
    alu += twice * work.int * pairs / device.int_per_clk_sm
    alu += FIT.loop_instructions * ks.num_warps / device.schedulers_per_sm
    loads, meetings = _components(kernel, ks, tiles, problem, device)
    alu += loads
    spilled = spilled_registers(kernel, ks, problem, device)
    alu += FIT.spill_accesses * 4 * spilled * ks.num_warps * device.warp_size / device.smem_bytes_per_clk_sm
    return _TileClocks(
        tensor=2
        * pairs
        * depth
        * _idle_rows(kernel, ks, tiles, problem, device)
        / (flops_per_clk_sm * FIT.tensor_efficiency),
        sfu=twice * work.sfu * pairs / device.sfu_per_clk_sm,
        alu=alu,
        memory=max(
            # a sweep has the first of the forward's two matmuls, and streams k
            (1 + sweeps / 2) * _shared_bytes(kernel, ks, tiles, problem, device) / device.smem_bytes_per_clk_sm,
            (1 + sweeps / 2) * _loaded_bytes(tiles, work, problem) / device.l2_bytes_per_clk_sm,
        ),
        gaps=(_matmuls(kernel, problem) + sweeps) * FIT.matmul_gap
        + (_exchanges(kernel, ks, tiles, problem, device) + meetings) * FIT.exchange,
    )


def _components(
    kernel: Kernel, ks: KernelSchedule, tiles: Tiling, problem: Problem, device: Device
) -> tuple[float, float]:
    """What a loop over the components of a tile costs beside the pairs' own work: instructions of warps, one a clock,
    that load a thread's rows and columns or add up a row among four threads, and times that warps wait for each other,
    where several share a row that is added up."""
    if not problem.costs.similarity.looped:
        return 0.0, 0.0
    op = instruction(kernel, ks, problem, device)
    rows, cols = thread_part(op, ks, tiles)
    turns = 1 + problem.costs.sweeps if kernel == "forward" else 2
    added = kernel in ("dkdv", "dq")
    instructions = turns * (rows + cols) + added * rows * log2(LANES_ACROSS)
    return problem.d_qk * instructions * ks.num_warps, problem.d_qk * (added and warp_grid(op, ks, tiles)[2] > 1)


def _matmuls(kernel: Kernel, problem: Problem) -> int:
    """Matmuls of a tile: branches have their own scores and gradients of them, and share dp and the weights of dV; each
    dot of a similarity is one for the scores, and one for its gradient."""
    own = {"forward": 2, "dkdv": 2, "dq": 2, "pair": 0}[kernel]
    dots = {"forward": 1, "dkdv": 2, "dq": 2, "pair": 1}[kernel]
    return MATMULS[kernel] + own * (problem.branches - 1) + dots * (problem.costs.similarity.dots - 1)


def _pair_work(pair: PairCosts, mask: PairCosts, live: LiveTiles) -> PairCosts:
    """The operations of an average pair: the stages' and, in the share of tiles that are mixed, the mask's."""
    share = live.mixed / live.live if live.live else 0.0
    return PairCosts(
        fma=pair.fma + share * mask.fma,
        sfu=pair.sfu + share * mask.sfu,
        int=pair.int + share * mask.int,
        loads=pair.loads + share * mask.loads,
        tables=pair.tables + share * mask.tables,
    )


def _loaded_bytes(tiles: Tiling, work: PairCosts, problem: Problem) -> float:
    """Bytes that a tile brings from the cache: the streamed tiles, and inputs that have an entry a pair."""
    streamed = sum(tile.rows * tile.dim for tile in tiles.streamed) * problem.dtype_bytes
    return streamed + work.loads * tiles.rows * tiles.cols * 4


def _shared_bytes(kernel: Kernel, ks: KernelSchedule, tiles: Tiling, problem: Problem, device: Device) -> float:
    """Bytes that the matmuls of a tile move through shared memory.

    The warps of a program, or on Hopper its warp groups, form a grid over the result: each column of the grid reads the
    left operand for itself, and each block of rows the right one. Left operands are the resident tiles; the weights are
    one too, and come from registers unless their layout must change on the way.
    """
    op = instruction(kernel, ks, problem, device)
    blocks, down, across = warp_grid(op, ks, tiles)
    depth = sum(tile.dim for tile in tiles.streamed) / len(tiles.streamed)
    right = (blocks if op in ("wgmma", "tcgen05") else down) * tiles.cols * depth * MATMULS[kernel]
    left = across * tiles.rows * sum(tile.dim for tile in tiles.resident)
    weights = max(MATMULS[kernel] - 2, 1) * (1 + across) * scores_bytes(kernel, ks, problem, device)
    written = sum(tile.rows * tile.dim for tile in tiles.streamed)
    return (right + left + written) * problem.dtype_bytes + weights


def _repeated(kernel: Kernel, ks: KernelSchedule, tiles: Tiling, problem: Problem, device: Device) -> int:
    """Times that each score is computed: where warp groups outnumber the blocks of rows of a chain of matmuls, every
    group of a row computes all of it, and only the second matmul is divided among them."""
    op = instruction(kernel, ks, problem, device)
    return warp_grid(op, ks, tiles)[2] if op == "wgmma" and tiles.chained else 1


def _side_by_side(kernel: Kernel, ks: KernelSchedule, problem: Problem, device: Device) -> bool:
    """Whether several warpgroups share the same rows."""
    op = instruction(kernel, ks, problem, device)
    return op == "wgmma" and warp_grid(op, ks, tiling(kernel, ks, problem))[2] > 1


def _idle_rows(kernel: Kernel, ks: KernelSchedule, tiles: Tiling, problem: Problem, device: Device) -> float:
    """How much longer a matmul takes than its rows need: tcgen05 takes as long for 64 rows as for 128."""
    op = instruction(kernel, ks, problem, device)
    return max(TCGEN05_ROWS / tiles.rows, 1.0) if op == "tcgen05" else 1.0


def _exchanges(kernel: Kernel, ks: KernelSchedule, tiles: Tiling, problem: Problem, device: Device) -> int:
    """Times in a tile that warps wait for each other: for the maximum and sum of a row, weights in shared memory."""
    across = warp_grid(instruction(kernel, ks, problem, device), ks, tiles)[2]
    statistics = 2 if kernel == "forward" and across > 1 else 0
    weights = max(MATMULS[kernel] - 2, 1) if scores_bytes(kernel, ks, problem, device) else 0
    return statistics + weights


def _dram_us(kernel: Kernel, problem: Problem, device: Device) -> float:
    """The time to read each operand and write each result once."""
    rows_q = problem.batch * problem.heads * problem.q_len
    rows_kv = problem.batch * problem.kv_heads * problem.kv_len
    q, out = rows_q * problem.d_qk, rows_q * problem.d_v
    k, v = rows_kv * problem.d_qk, rows_kv * problem.d_v
    elements = {"forward": q + k + v + out, "dkdv": q + 2 * k + 2 * v + out, "dq": 2 * q + k + v + out}
    return elements.get(kernel, q + k + v + out) * problem.dtype_bytes / (device.dram_gbps * 1e3)
