"""The shared memory of a kernel, computed before compiling: every buffer that Triton allocates, by name and bytes.

All kernels have one shape. Some tiles are *resident* for the whole program, others are *streamed* through a pipelined
loop, and matmuls with `rows` rows produce tiles of scores, `rows x cols`, most of which feed another matmul:

    kernel    resident   streamed       rows      cols
    forward   q          k, v           block_m   block_n
    dkdv      k, v       q, do          block_n   block_m
    dq        q, do      k, v           block_m   block_n
    pair                 q, k, v, do    block_m   block_n

Where a tile is kept depends on the matmul instruction. The rules below were read from Triton's lowered IR, and tests
check them against it kernel by kernel: never below the actual allocation, and close above it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from attncc.schedule import hopper
from attncc.schedule.device import Device
from attncc.schedule.problem import Kernel, KernelSchedule, Problem

Instruction = Literal["fma", "mma", "wgmma", "tcgen05", "mfma"]

# An input of the stages with an entry a pair (a dense bias) is taken to be float32.
PAIR_BYTES = 4
# And so is one with an entry a component.
WIDE_BYTES = 4
# Row vectors of 4-byte elements that travel with each streamed tile: lse and delta of queries, one of a variant's own.
VECTORS = {"forward": 1, "dkdv": 3, "dq": 1, "pair": 3}
# Without a pipeline, tiles change their layout through a scratch area as wide as this for each warp.
EXCHANGE_BYTES = 512
# Threads of a warp that have parts of the same row of a matmul's result.
LANES_ACROSS = 4
# Swizzled buffers start at multiples of this.
ALIGNMENT = 1024


@dataclass(frozen=True)
class Buffer:
    """One allocation in shared memory."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Tile:
    """A tile of q, k, v or do: `rows` of a head dimension that takes `dim` columns in the kernel."""

    name: str
    rows: int
    dim: int


@dataclass(frozen=True)
class Tiling:
    """The tiles of one kernel: those that stay, those that stream, the scores' shape, the widest chunk of a head.

    `chained` says whether the scores feed another matmul.
    """

    rows: int
    cols: int
    resident: tuple[Tile, ...]
    streamed: tuple[Tile, ...]
    chunk: int
    chained: bool


def tiling(kernel: Kernel, ks: KernelSchedule, problem: Problem) -> Tiling:
    """The tiles that `kernel` keeps and streams; head dimensions are padded as in the kernel."""
    return _tiling(kernel, ks.block_m, ks.block_n, problem.qk_chunks, problem.v_chunks, problem.value_of_key)


@cache  # accounts and predictions of one candidate ask twenty times
def _tiling(
    kernel: Kernel, block_m: int, block_n: int, qk: tuple[int, ...], v: tuple[int, ...], value_of_key: bool
) -> Tiling:
    tiles = {
        "q": Tile("q", block_m, sum(qk)),
        "do": Tile("do", block_m, sum(v)),
        "k": Tile("k", block_n, sum(qk)),
        "v": Tile("v", block_n, sum(v)),
    }
    if value_of_key:
        del tiles["v"]
    resident = {"forward": ("q",), "dkdv": ("k", "v"), "dq": ("q", "do"), "pair": ()}[kernel]
    streamed = {"forward": ("k", "v"), "dkdv": ("q", "do"), "dq": ("k", "v"), "pair": ("q", "k", "v", "do")}[kernel]
    rows, cols = (block_n, block_m) if kernel == "dkdv" else (block_m, block_n)
    return Tiling(
        rows,
        cols,
        tuple(tiles[name] for name in resident if name in tiles),
        tuple(tiles[name] for name in streamed if name in tiles),
        max(*qk, *v),
        chained=kernel != "pair",
    )


def instruction(kernel: Kernel, ks: KernelSchedule, problem: Problem, device: Device) -> Instruction:
    """The matmul instruction that Triton picks: the newest one that the device has and the tile is large enough for."""
    if device.backend == "hip":
        return "mfma"
    if problem.dtype == "fp32" and problem.precision == "ieee":
        return "fma"
    rows = ks.block_n if kernel == "dkdv" else ks.block_m
    if rows >= 64 and ks.num_warps % 4 == 0:
        if device.target.startswith("sm_9"):
            return "wgmma"
        if device.tmem_columns:
            return "tcgen05"
    return "mma"


def shared_memory(kernel: Kernel, ks: KernelSchedule, problem: Problem, device: Device) -> int:
    """Bytes of shared memory that one program of `kernel` takes: an upper bound, and close to the fact."""
    if ks.backend == "gluon":
        return hopper.shared_memory(kernel, ks, problem)
    return sum(buffer.bytes for buffer in buffers(kernel, ks, problem, device))


def buffers(kernel: Kernel, ks: KernelSchedule, problem: Problem, device: Device) -> tuple[Buffer, ...]:
    """The allocations of `kernel` that live at once where it needs most, largest first."""
    if device.is_interpreter:
        return ()
    tiles = tiling(kernel, ks, problem)
    op = instruction(kernel, ks, problem, device)
    live = {tile.name: (1 if op != "mfma" else 0) * _bytes(tile, problem) for tile in tiles.resident}
    for tile, copies in zip(tiles.streamed, _copies(kernel, tiles, op, ks.num_stages, problem), strict=True):
        live[tile.name] = int(copies * _bytes(tile, problem))
    live["components' inputs"] = _wide_inputs(live, tiles, problem)
    live["made operands"] = _made_operands(kernel, ks, problem)
    live["scores"] = scores_bytes(kernel, ks, problem, device)
    live["row vectors"] = _row_vectors(kernel, tiles, op, ks.num_stages, problem)
    live["barriers"] = ALIGNMENT if op == "tcgen05" else 0
    live["exchange"] = EXCHANGE_BYTES * ks.num_warps if ks.num_stages == 1 and op in ("mma", "tcgen05") else 0
    live["pair inputs"] = _pair_inputs(kernel, tiles, op, ks.num_stages, problem)
    # What a tile needs on its way in or out, when nothing of the loop is live.
    transit = max(_bytes(tile, problem) for tile in (*tiles.resident, *tiles.streamed))
    if transit > sum(live.values()):
        live = {"a tile between layouts": transit}
    found = [Buffer(name, count) for name, count in live.items() if count]
    return tuple(sorted(found, key=lambda buffer: -buffer.bytes))


def _wide_inputs(live: Mapping[str, int], tiles: Tiling, problem: Problem) -> int:
    """An input with an entry a component is a float32 tile as large as q's or k's, and streams as they do."""
    counts = {"q": problem.costs.similarity.wide_q, "k": problem.costs.similarity.wide_k}
    streamed = {tile.name for tile in tiles.streamed}
    return sum(n * live[name] * WIDE_BYTES // problem.dtype_bytes for name, n in counts.items() if name in streamed)


def _made_operands(kernel: Kernel, ks: KernelSchedule, problem: Problem) -> int:
    """Operands of matmuls that are computed from a loaded tile lie beside it."""
    work, width = problem.costs.similarity, sum(problem.qk_chunks)
    return (work.made_q * ks.block_m + work.made_k * ks.block_n) * width * problem.dtype_bytes


def warp_grid(op: Instruction, ks: KernelSchedule, tiles: Tiling) -> tuple[int, int, int]:
    """Blocks of rows that an instruction takes, and the grid that warps (or warp groups) form: down and across."""
    workers, rows_each = {"wgmma": (ks.num_warps // 4, 64), "tcgen05": (1, 128)}.get(op, (ks.num_warps, 16))
    blocks = max(tiles.rows // rows_each, 1)
    down = min(workers, blocks)
    return blocks, down, workers // down


def thread_part(op: Instruction, ks: KernelSchedule, tiles: Tiling) -> tuple[float, float]:
    """Rows and columns of the part of a tile that a thread has as the result of a matmul: eight threads of a warp lie
    below each other, and four side by side."""
    _, down, across = warp_grid(op, ks, tiles)
    return tiles.rows / down / 8, tiles.cols / across / LANES_ACROSS


def _bytes(tile: Tile, problem: Problem) -> int:
    return tile.rows * tile.dim * problem.dtype_bytes


def _copies(kernel: Kernel, tiles: Tiling, op: Instruction, stages: int, problem: Problem) -> tuple[float, ...]:
    """How many times each streamed tile is held.

    Loads run `stages - 1` tiles ahead, or one more where the matmul, being asynchronous, still reads its operands from
    shared memory; one more again on Blackwell for a tile that two matmuls read, and backward for one in chunks.
    """
    count = len(tiles.streamed)
    as_value = ("k",) if problem.value_of_key else ()
    twice = {"forward": as_value, "dkdv": ("q", "do"), "dq": ("k",), "pair": ()}[kernel]  # read by two matmuls
    # 32-bit operands cannot be read transposed: a tile that is read both ways is not pipelined but held in both orders.
    tf32 = problem.dtype == "fp32" and op != "fma"
    in_both_orders = tf32 and (op in ("mma", "wgmma") or stages == 1)
    if kernel == "dkdv" and in_both_orders:
        return (1.5, 1.5)
    if stages == 1:
        if op == "mfma":
            return (0.0,) * count
        if kernel == "forward" and not as_value:  # k is dead when v comes
            return (0.0, 1.0)
        if kernel == "dq" and in_both_orders:
            return (2.0, 1.0)[:count]
        if kernel == "dkdv" and op == "mma" and tiles.rows < tiles.chunk:
            return (1.5, 1.5)
        return (1.0,) * count
    if in_both_orders and twice:
        return tuple(2.0 if tile.name in twice else float(stages) for tile in tiles.streamed)
    chunked = kernel != "forward" and max(len(problem.qk_chunks), len(problem.v_chunks)) > 1
    ahead = {"wgmma": stages, "tcgen05": stages + chunked}.get(op, stages - 1)
    return tuple(float(ahead + (op == "tcgen05" and tile.name in twice)) for tile in tiles.streamed)


def scores_bytes(kernel: Kernel, ks: KernelSchedule, problem: Problem, device: Device) -> int:
    """A tile of weights goes through shared memory where its layout as a result is not the one it has as an operand."""
    tiles = tiling(kernel, ks, problem)
    if not tiles.chained:
        return 0
    tile = tiles.rows * tiles.cols * problem.dtype_bytes
    split = {
        "fma": True,
        "mma": tiles.rows < tiles.chunk,  # the warps of the second matmul lie side by side along the head dimension
        "mfma": tiles.rows < 32 * ks.num_warps,
        "wgmma": False,
        "tcgen05": False,
    }[instruction(kernel, ks, problem, device)]
    return tile if split else 0


def _row_vectors(kernel: Kernel, tiles: Tiling, op: Instruction, stages: int, problem: Problem) -> int:
    if op == "mfma":
        return 0
    count = VECTORS[kernel] + max(problem.costs.vectors - 1, 0)
    bytes_ahead = max(stages - 1, 1) * tiles.cols * count * 4
    return -(-bytes_ahead // ALIGNMENT) * ALIGNMENT


def _pair_inputs(kernel: Kernel, tiles: Tiling, op: Instruction, stages: int, problem: Problem) -> int:
    pair = problem.costs.pair(kernel)
    loads = 0 if op == "mfma" else pair.loads + pair.tables
    boxes = problem.costs.warps.maps > 0 and kernel in ("dkdv", "dq")  # one lies there even where none is loaded ahead
    return int(loads * max(stages - 1, boxes) * tiles.rows * tiles.cols * PAIR_BYTES)


def tensor_memory(kernel: Kernel, ks: KernelSchedule, problem: Problem, device: Device) -> int:
    """Columns of Blackwell's tensor memory that one program of `kernel` takes; 0 where the matmuls do not use it.

    Accumulators and scores lie there as float32, weights on their way to the next matmul as 16-bit values.
    """
    if not device.tmem_columns or instruction(kernel, ks, problem, device) != "tcgen05":
        return 0
    tiles = tiling(kernel, ks, problem)
    qk, v = sum(problem.qk_chunks), sum(problem.v_chunks)
    more = problem.branches - 1
    accumulators = {"forward": v * (1 + more), "dkdv": qk + v, "dq": qk, "pair": 0}[kernel]
    scores = {"forward": 1 + more, "dkdv": 2 + more, "dq": 2 + more, "pair": 2}[kernel] * tiles.cols
    count = {"forward": 1 + more, "dkdv": 2 + more, "dq": 1 + more, "pair": 0}[kernel]
    weights = count * tiles.cols * problem.dtype_bytes // 4
    columns = accumulators + scores + weights
    # Tiles of 64 rows use half of the lanes, and two accumulators share their columns.
    return columns // 2 if kernel == "dkdv" and tiles.rows == 64 else columns
