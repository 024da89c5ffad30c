"""The cost of the Gluon split-KV kernel, and the number of parts to split the keys into."""

from __future__ import annotations

from math import ceil

from attncc.schedule.decode_cost import Streaming, grid
from attncc.schedule.device import Device
from attncc.schedule.hopper_decode import KEYS, ROWS, TILES, refusal
from attncc.schedule.model import model
from attncc.schedule.problem import KernelSchedule, Problem, head_chunks

FIT = model().gluon_decode
#: numbers of splits that are tried, beside those that fill the device
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def tilings(problem: Problem, device: Device) -> tuple[KernelSchedule, ...]:
    """The one tiling, with the number of splits that the model likes best, half of it, and twice of it; none where
    `refusal` has a reason."""
    if refusal(problem, device):
        return ()
    ks = KernelSchedule(ROWS, KEYS, 8, TILES, "gluon", splits=1)
    best = best_splits(ks, problem, device)
    most = max(1, ceil(grid(ks, problem)[1] / TILES))
    return tuple(
        KernelSchedule(ROWS, KEYS, 8, TILES, "gluon", splits=n)
        for n in sorted({max(best // 2, 1), best, min(2 * best, most)})
    )


def best_splits(ks: KernelSchedule, problem: Problem, device: Device) -> int:
    """The number of splits by which the model expects the tiling to be fastest; the fewest of several as good."""
    lines, tiles = grid(ks, problem)
    most = max(1, ceil(tiles / TILES))
    filling = (waves * device.sms // lines for waves in (1, 2, 3, 4))
    allowed = sorted(n for n in (*SPLITS, *filling) if 1 <= n <= most)
    return min(allowed, key=lambda n: (round(_us(n, ks, problem, device), 1), n))


def _us(splits: int, ks: KernelSchedule, problem: Problem, device: Device) -> float:
    """Microseconds of the launches. A round is two tiles: their scores side by side, what lies between the matmuls,
    and the output; its loads run beside half of that."""
    work, (lines, tiles) = Streaming.of(ks, problem, device), grid(ks, problem)
    programs = lines * splits
    rounds = ceil(tiles / splits / TILES)
    pairs = ROWS * KEYS
    per_flop = device.clock_ghz * device.sms / (device.matmul_tflops(problem.dtype, problem.precision) * 1e3)
    matmuls = 2 * TILES * pairs * (sum(problem.qk_chunks) + sum(head_chunks(problem.d_v))) * per_flop
    pair = problem.costs.forward
    stages = TILES * pairs * (pair.sfu / device.sfu_per_clk_sm + pair.fma / device.fma_per_clk_sm)
    clocks = rounds * (matmuls / FIT.tensor_efficiency + stages + FIT.turn) + FIT.program_ends
    memory = rounds * TILES * work.tile_bytes * min(programs, device.sms) / work.dram_clk
    waves = ceil(programs / device.sms)
    return waves * max(clocks, memory) / (device.clock_ghz * 1e3) + work.launch_us(splits)


def predict(ks: KernelSchedule, problem: Problem, device: Device) -> tuple[float, dict[str, float]]:
    """The time of the launches in microseconds, and each unit's own."""
    return _us(ks.splits, ks, problem, device), Streaming.of(ks, problem, device).terms(ks.splits)
