"""How long a kernel takes, from the device's figures and the work of the variant over the real mask's live tiles.

One SM is the unit. For every tile the model counts what each of its units has to do, in clocks, and how much of it can
overlap; the tiles of all programs are then spread over the SMs. It is a model for ranking: its absolute times are those
of a kernel at the clock of the device file that never waits for anything not counted here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

from attncc.schedule import hopper
from attncc.schedule.candidates import candidates
from attncc.schedule.device import Device
from attncc.schedule.memory import Tiling, instruction, scores_bytes, shared_memory, tiling, warp_grid
from attncc.schedule.problem import Backend, Kernel, KernelSchedule, LiveTiles, PairCosts, Problem, head_chunks
from attncc.schedule.registers import register_limit, registers, spilled_registers

Limit = Literal["tensor", "sfu", "alu", "memory", "launch"]
_LIMITS: tuple[Limit, ...] = ("tensor", "sfu", "alu", "memory", "launch")

SMEM_BYTES_PER_CLK = 128
# What an SM gets from the level-two cache when all of them read.
L2_BYTES_PER_CLK_SM = 32
# Clocks from a load to its data. A pipeline of n stages hides all but 4^(1-n) of it; that of an asynchronous matmul,
# which holds one tile more, all but half of that.
LOAD_LATENCY = 800
# Clocks of a tile in which a warp issues no work: waits of a matmul for its operands and for its result.
MATMUL_GAP = 60
# Instructions of a warp in each turn of the loop beside the arithmetic: addresses, copies, barriers, bounds.
LOOP_INSTRUCTIONS = 100
# Float32 operations for each row of a tile: the reduction across lanes, and the running statistics.
ROW_WORK = 16
# Clocks to start a program, load what is resident and write its output.
PROGRAM_OVERHEAD = 2500
# The share of its peak that a matmul instruction reaches in the best loop of plain Triton.
TENSOR_EFFICIENCY = 0.8
# Loads run beside the arithmetic, but two streams that each need all of the time get in each other's way: a p-norm.
OVERLAP = 4
MATMULS = {"forward": 2, "dkdv": 4, "dq": 3, "pair": 2}
SCHEDULERS = 4
# What shared memory leaves free is cache: a tiling that takes all of it loses this share of its speed.
CACHE_SHARE = 0.02
MAX_THREADS_PER_SM = 2048
# Shared memory that the driver keeps for each program.
RESERVED_BYTES = 1024


@dataclass(frozen=True)
class Prediction:
    """The predicted time of a kernel in microseconds, the unit that limits it, and each unit's own time."""

    us: float
    limit: Limit
    terms: dict[str, float]


@dataclass(frozen=True)
class _TileClocks:
    """What one tile costs each unit of an SM, in clocks."""

    tensor: float
    sfu: float
    alu: float
    memory: float
    gaps: float


def predict(kernel: Kernel, ks: KernelSchedule, problem: Problem, device: Device) -> Prediction:
    """The time of one launch of `kernel` with the tiling `ks`."""
    if ks.backend == "gluon":
        us, terms = hopper.predict(ks, problem, device)
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
    warps_per_scheduler = max(ks.num_warps * resident / SCHEDULERS, 1.0)
    compute = (clocks.tensor, clocks.sfu, clocks.alu)
    in_turn = max(compute) + (sum(compute) - max(compute) + clocks.gaps) / warps_per_scheduler
    ahead = ks.num_stages - 1 + 0.5 * (instruction(kernel, ks, problem, device) in ("wgmma", "tcgen05"))
    waiting = LOAD_LATENCY * 0.25**ahead / resident
    start = PROGRAM_OVERHEAD * ceil(waves) / clocks_per_us
    launch = device.launch_us + start
    busy = (in_turn**OVERLAP + clocks.memory**OVERLAP) ** (1 / OVERLAP)
    taken = shared_memory(kernel, ks, problem, device) / device.smem_per_block
    us = spread(busy + waiting) * (1 + CACHE_SHARE * taken) + launch
    terms = {
        "tensor": spread(clocks.tensor),
        "sfu": spread(clocks.sfu),
        "alu": spread(clocks.alu),
        "memory": max(spread(clocks.memory), _dram_us(kernel, problem, device)),
        "launch": launch,
    }
    us = max(us, terms["memory"] + launch)
    return Prediction(us, max(_LIMITS, key=lambda name: terms[name]), terms)


def ranked(
    kernel: Kernel, problem: Problem, device: Device, backend: Backend | None = "triton"
) -> tuple[tuple[KernelSchedule, Prediction], ...]:
    """Every candidate with its prediction, the fastest first; ScheduleError if nothing fits. `backend` as in
    `candidates`.

    Candidates that are expected to spill come last: how much that costs cannot be told from outside the compiler.
    """
    found = [(ks, predict(kernel, ks, problem, device)) for ks in candidates(kernel, problem, device, backend)]
    return tuple(
        sorted(found, key=lambda entry: (spilled_registers(kernel, entry[0], problem, device) > 0, entry[1].us))
    )


def _programs(kernel: Kernel, ks: KernelSchedule, problem: Problem) -> int:
    """Programs in the grid: blocks of what stays, for every head that has its own."""
    if kernel == "dkdv":
        return ceil(problem.kv_len / ks.block_n) * problem.batch * problem.kv_heads
    rows = ceil(problem.q_len / ks.block_m) * problem.batch * problem.heads
    return rows * ceil(problem.kv_len / ks.block_n) if kernel == "pair" else rows


def _programs_per_sm(kernel: Kernel, ks: KernelSchedule, problem: Problem, device: Device) -> int:
    """How many programs of this tiling an SM holds at once, by shared memory, registers and threads."""
    threads = ks.num_warps * device.warp_size
    by_memory = device.smem_per_sm // (shared_memory(kernel, ks, problem, device) + RESERVED_BYTES)
    wanted = min(registers(kernel, ks, problem, device), register_limit(ks, device))
    by_registers = int(device.regs_per_sm // (wanted * threads))
    return max(1, min(by_memory, by_registers, MAX_THREADS_PER_SM // threads))


def _tile_clocks(kernel: Kernel, ks: KernelSchedule, problem: Problem, device: Device, live: LiveTiles) -> _TileClocks:
    """The clocks of an average live tile: a mixed one pays for the mask, too."""
    tiles = tiling(kernel, ks, problem)
    pairs = tiles.rows * tiles.cols
    work = _pair_work(problem.costs.pair(kernel), problem.costs.mask, live)
    qk, v = sum(problem.qk_chunks), sum(head_chunks(problem.d_v))
    depth = {"forward": qk + v * problem.branches, "dkdv": 2 * (qk + v), "dq": 2 * qk + v, "pair": qk + v}[kernel]
    flops_per_clk_sm = device.matmul_tflops(problem.dtype, problem.precision) * 1e3 / device.clock_ghz / device.sms
    # The running sum of the forward is rescaled once a tile.
    rows_work = tiles.rows * (v + ROW_WORK) * problem.branches if kernel == "forward" else 0
    alu = (work.fma * pairs + rows_work) / device.fma_per_clk_sm + work.int * pairs / device.int_per_clk_sm
    alu += LOOP_INSTRUCTIONS * ks.num_warps / SCHEDULERS
    # Spilled registers are stored and loaded once a tile, by the warps that compute.
    alu += 2 * 4 * spilled_registers(kernel, ks, problem, device) * ks.num_warps * device.warp_size / SMEM_BYTES_PER_CLK
    return _TileClocks(
        tensor=2 * pairs * depth / (flops_per_clk_sm * TENSOR_EFFICIENCY),
        sfu=work.sfu * pairs / device.sfu_per_clk_sm,
        alu=alu,
        memory=max(
            _shared_bytes(kernel, ks, tiles, problem, device) / SMEM_BYTES_PER_CLK,
            _loaded_bytes(tiles, work, problem) / L2_BYTES_PER_CLK_SM,
        ),
        gaps=(_matmuls(kernel, problem) + _exchanges(kernel, ks, tiles, problem, device)) * MATMUL_GAP,
    )


def _matmuls(kernel: Kernel, problem: Problem) -> int:
    """Matmuls of a tile: branches have their own scores and gradients of them, and share dp and the weights of dV."""
    own = {"forward": 2, "dkdv": 2, "dq": 2, "pair": 0}[kernel]
    return MATMULS[kernel] + own * (problem.branches - 1)


def _pair_work(pair: PairCosts, mask: PairCosts, live: LiveTiles) -> PairCosts:
    """The operations of an average pair: the stages' and, in the share of tiles that are mixed, the mask's."""
    share = live.mixed / live.live if live.live else 0.0
    return PairCosts(
        fma=pair.fma + share * mask.fma,
        sfu=pair.sfu + share * mask.sfu,
        int=pair.int + share * mask.int,
        loads=pair.loads + share * mask.loads,
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
    return (right + left) * problem.dtype_bytes + weights


def _exchanges(kernel: Kernel, ks: KernelSchedule, tiles: Tiling, problem: Problem, device: Device) -> int:
    """Times in a tile that warps wait for each other's part of a row: its maximum and its sum."""
    across = warp_grid(instruction(kernel, ks, problem, device), ks, tiles)[2]
    return 2 if kernel == "forward" and across > 1 else 0


def _dram_us(kernel: Kernel, problem: Problem, device: Device) -> float:
    """The time to read each operand and write each result once."""
    rows_q = problem.batch * problem.heads * problem.q_len
    rows_kv = problem.batch * problem.kv_heads * problem.kv_len
    q, out = rows_q * problem.d_qk, rows_q * problem.d_v
    k, v = rows_kv * problem.d_qk, rows_kv * problem.d_v
    elements = {"forward": q + k + v + out, "dkdv": q + 2 * k + 2 * v + out, "dq": 2 * q + k + v + out}
    return elements.get(kernel, q + k + v + out) * problem.dtype_bytes / (device.dram_gbps * 1e3)
