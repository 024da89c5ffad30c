"""How many registers a kernel wants: an estimate, for a compiler's allocation cannot be computed from outside.

What is certain is the float32 tiles that live through the loop, spread over the threads of a program. The rest are
allowances that were fitted to what ptxas reports for the kernels of `templates/triton`.
"""

from __future__ import annotations

from attncc.schedule.device import Device
from attncc.schedule.memory import instruction, tiling
from attncc.schedule.problem import Kernel, KernelSchedule, Problem, head_chunks

# Loop counters, bases, strides, bounds and row statistics.
BASE = 40
# An accumulator that is rescaled lives partly twice.
RESCALED = 1.25
# For each 16 bytes of a streamed tile that a thread copies: pointers and offsets.
COPY = {"forward": 4, "dkdv": 2.5, "dq": 4, "pair": 4}
# Operations of a pair, in those of a plain softmax, that can be done in place; each of the rest keeps a part of a tile.
IN_PLACE = {"forward": 8, "dkdv": 9, "dq": 9, "pair": 9}
TILE_AN_OPERATION = 1 / 16
# Each stage beyond the second, where the loop streams row vectors beside its tiles.
STAGE = {"forward": 0, "dkdv": 32, "dq": 0, "pair": 32}
# Where operands pass through registers (all but wgmma and tcgen05).
OPERANDS = 32


def registers(kernel: Kernel, ks: KernelSchedule, problem: Problem, device: Device) -> int:
    """32-bit registers that a thread of `kernel` would like to have; what exceeds the device's limit is spilled."""
    tiles = tiling(kernel, ks, problem)
    op = instruction(kernel, ks, problem, device)
    threads = ks.num_warps * device.warp_size
    pairs = tiles.rows * tiles.cols
    qk, v = sum(head_chunks(problem.d_qk)), sum(head_chunks(problem.d_v))
    columns = {"forward": v, "dkdv": qk + v, "dq": qk, "pair": tiles.cols}[kernel]
    score_tiles = 1 if kernel == "forward" else 2
    work = problem.costs.pair(kernel)
    beyond = max(work.fma + work.int + 2 * work.sfu - IN_PLACE[kernel], 0)
    temporaries = min(beyond * TILE_AN_OPERATION, 1.0)
    wanted = BASE + STAGE[kernel] * max(ks.num_stages - 2, 0) + (score_tiles + temporaries) * pairs / threads
    if op == "tcgen05":  # the accumulators are in tensor memory; one is rescaled at a time
        wanted += tiles.rows * v / threads if kernel == "forward" else 0
    else:
        wanted += (RESCALED if kernel == "forward" else 1.0) * tiles.rows * columns / threads
    wanted += sum(COPY[kernel] * tile.rows * tile.dim * problem.dtype_bytes / 16 / threads for tile in tiles.streamed)
    if op == "fma":
        # Each thread computes a small square of the result, and holds its operands along the head dimension.
        side = (pairs / threads) ** 0.5
        wanted += 2 * side * tiles.chunk / 3
    elif op in ("mma", "mfma"):
        wanted += OPERANDS
    return round(wanted)


def spilled_registers(kernel: Kernel, ks: KernelSchedule, problem: Problem, device: Device) -> int:
    """How many of the wanted registers a thread does not get."""
    return max(registers(kernel, ks, problem, device) - device.regs_per_thread_max, 0)
