"""Estimate the registers of a kernel; a compiler's allocation cannot be computed from outside.

Only the float32 tiles that live through the loop, spread over the threads of a program, are certain. The rest are
allowances fitted to what ptxas reports for the kernels of `templates/triton`.
"""

from __future__ import annotations

from attncc.schedule import hopper
from attncc.schedule.device import Device, loads_boxes
from attncc.schedule.memory import Tiling, instruction, scores_bytes, thread_part, tiling, warp_grid
from attncc.schedule.problem import Kernel, KernelSchedule, Problem

# Loop counters, bases, strides, bounds and row statistics.
BASE = {"forward": 40, "dkdv": 32, "dq": 40, "pair": 40}
# Tiles of scores that live at once: the backward has weights, their gradients, and one of them in 16 bits.
SCORES = {"forward": 1.0, "dkdv": 2.5, "dq": 2.0, "pair": 2.0}
# Those of each branch beyond the first, where a pair has several scores.
BRANCH = {"forward": 1.0, "dkdv": 2.0, "dq": 0.5, "pair": 0.0}
# An accumulator that is rescaled lives partly twice.
RESCALED = 1.25
# An accumulator in tensor memory passes through registers on its way out; addressing that memory takes some, too, and
# more for the two of dK and dV.
WRITTEN = 0.75
TENSOR_MEMORY = {"forward": 20, "dkdv": 55, "dq": 20, "pair": 20}
# For each 16 bytes of a streamed tile that a thread copies: pointers and offsets.
COPY = {"forward": 4, "dkdv": 2.5, "dq": 4, "pair": 4}
# Operations of a pair, in those of a plain softmax, that can be done in place; each of the rest keeps a part of a tile.
IN_PLACE = {"forward": 8, "dkdv": 9, "dq": 9, "pair": 9}
TILE_AN_OPERATION = 1 / 16
TEMPORARIES = 1.0
# Where a mask hides weights, not scores, and rows sum them up, a warp's own matmul has both in registers, and what is
# visible. In tiles of scores; the mask is one of more operations than that of the padding behind the last key.
HIDDEN, PADDING = 1.0, 1.0
# Each stage beyond the second, where the loop streams row vectors beside its tiles.
STAGE = {"forward": 0, "dkdv": 64, "dq": 0, "pair": 64}
# Distances taken apart by tile have a value for each column, and in dQ every column lies in every row of a warp.
DISTANCES = {"forward": 0, "dkdv": 0, "dq": 44, "pair": 0}
# Where tiles come through descriptors, which take no pointers and offsets: the base, a row vector, an input by key
# alone, a stage, tiles of scores, and the accumulators, which live partly twice, for more matmuls are under way.
BOXES = {"dkdv": -33, "dq": 10}
BOXES_ROW = {"dkdv": 25, "dq": 0}
BOXES_VECTOR = {"dkdv": 0, "dq": 48}
BOXES_STAGE = {"dkdv": 12, "dq": 8}
BOXES_SCORES = {"dkdv": 4.0, "dq": 2.0}
BOXES_ACCUMULATOR = {"dkdv": 1.2, "dq": 1.5}
BOXES_TEMPORARIES = 1.5
# A warp's own matmul cannot read such a tile where it lies: each warp holds most of the tile as its operand.
BOXES_OPERAND = 0.8
# Warp groups that lie side by side, and compute the scores of their rows each for itself.
SIDE_BY_SIDE = 30
# A loop over the query heads that share a key head, around the loops over tiles.
OUTER_LOOP = 96
# An input that is read by key alone, or its pointers, beside each streamed tile.
VECTOR = 24
# A row or a column of a thread's part of a tile, where a loop loads its components: a pointer, and what is there.
COMPONENT = 3
# Where a loop over components leaves few registers: weights that are an operand of a matmul in a second layout, that of
# a narrow piece of the values, for warps side by side. In copies of the weights.
NARROW, NARROW_COPIES = 64, 3
# Multiply-adds of dK and dV in pieces, one of them narrow: pairs of a thread beyond which it holds operands of both.
FMA_PAIRS, FMA_NARROW = 4, 12
# Where operands pass through registers on their way to a warp's own matmul.
OPERANDS = 60
OPERANDS_A_STAGE = 10
# AMD loads operands into registers a whole tile at a time, and a pipelined loop holds the next ones, too.
MFMA_BASE = 250
MFMA_PIPELINED = {"forward": 1.0, "dkdv": 5.0, "dq": 1.5, "pair": 5.0}
MFMA_ROWS = 32
# Scores that feed a matmul on AMD change their layout on the way, and live in both.
MFMA_SCORES = {"forward": 1.0, "dkdv": 2.5, "dq": 1.0, "pair": 1.0}


def registers(kernel: Kernel, ks: KernelSchedule, problem: Problem, device: Device) -> int:
    """32-bit registers that a thread of `kernel` would like to have; what exceeds `register_limit` is spilled."""
    if ks.backend == "gluon":
        return hopper.registers(kernel, ks, problem)
    tiles = tiling(kernel, ks, problem)
    op = instruction(kernel, ks, problem, device)
    threads = ks.num_warps * device.warp_size
    pairs = tiles.rows * tiles.cols
    qk, v = sum(problem.qk_chunks), sum(problem.v_chunks)
    both = qk if problem.value_of_key else qk + v
    made = {"dkdv": problem.costs.similarity.made_k, "dq": problem.costs.similarity.made_q}.get(kernel, 0)
    columns = {"forward": v * problem.branches, "dkdv": both, "dq": qk, "pair": tiles.cols}[kernel] + made * qk
    # Warps that lie side by side along the head dimension each hold the whole row of weights as their operand, unless
    # it comes to them through shared memory.
    across = warp_grid(op, ks, tiles)[2]
    holders = 1 if scores_bytes(kernel, ks, problem, device) else across
    value = problem.d_v if problem.value_of_key else None
    dims = (problem.d_qk, problem.d_v, problem.branches, value)
    boxes = kernel in ("dkdv", "dq") and loads_boxes(device, problem.dtype, *dims)
    boxes = boxes and not problem.costs.similarity.looped
    work = problem.costs.pair(kernel)
    beyond = max(work.fma + work.int + 2 * work.sfu - IN_PLACE[kernel], 0)
    temporaries = min(beyond * TILE_AN_OPERATION, BOXES_TEMPORARIES if boxes else TEMPORARIES)
    tiles_of_scores = (BOXES_SCORES if boxes else SCORES)[kernel] + BRANCH[kernel] * (problem.branches - 1)
    hides_weights = not problem.costs.warps.vanishes and problem.costs.mask.int > PADDING
    if kernel == "forward" and op == "mma" and hides_weights and problem.costs.rows > 1:
        tiles_of_scores += HIDDEN
    if problem.costs.similarity.looped:
        sums = problem.costs.similarity.looped + min(problem.costs.similarity.dots, 1)
        tiles_of_scores += (sums - 1) * (1 if kernel == "forward" else 2)  # each has a cotangent, too
    scores = (tiles_of_scores + temporaries) * holders * pairs / threads
    accumulator = tiles.rows * columns / threads
    vectors = (BOXES_VECTOR[kernel] if boxes else VECTOR) * problem.costs.vectors
    streamed = sum(tile.rows * tile.dim for tile in tiles.streamed) * problem.dtype_bytes
    if op == "mfma":
        scores *= MFMA_SCORES[kernel]
        return round(MFMA_BASE + scores + vectors + accumulator + _mfma_operands(kernel, ks, tiles, problem, device))
    base, stage = (BOXES[kernel], BOXES_STAGE[kernel]) if boxes else (BASE[kernel], STAGE[kernel])
    wanted = base + stage * max(ks.num_stages - 2, 0) + scores + vectors
    wanted += DISTANCES[kernel] * problem.costs.distances
    if problem.costs.similarity.looped:
        wanted += COMPONENT * sum(thread_part(op, ks, tiles))
        if kernel == "dkdv" and across > 1:
            narrow = sum(width < NARROW for width in problem.v_chunks[1:])
            wanted += NARROW_COPIES * narrow * across * pairs / threads
    if kernel == "dkdv" and problem.group > 1 and problem.costs.nested:
        wanted += OUTER_LOOP
    if op == "wgmma" and across > 1:
        wanted += SIDE_BY_SIDE
    if op == "tcgen05":
        wanted += TENSOR_MEMORY[kernel] + (RESCALED if kernel == "forward" else WRITTEN) * accumulator
    elif boxes:
        wanted += BOXES_ROW[kernel] * problem.costs.rows
        wanted += BOXES_ACCUMULATOR[kernel] * accumulator
        wanted += BOXES_OPERAND * streamed / 4 / device.warp_size if op == "mma" else 0
    else:
        wanted += (RESCALED if kernel == "forward" else 1.0) * accumulator
    if not boxes:
        wanted += COPY[kernel] * streamed / 16 / threads
    if op == "fma":
        # Each thread computes a small square of the result, and holds its operands along the head dimension.
        side = (pairs / threads) ** 0.5
        wanted += 2 * side * tiles.chunk / 3
        if kernel == "dkdv" and min(*problem.qk_chunks, *problem.v_chunks) < NARROW < both / 2:
            wanted += FMA_NARROW * max(pairs / threads - FMA_PAIRS, 0)
    elif op == "mma":
        wanted += OPERANDS + OPERANDS_A_STAGE * max(ks.num_stages - 2, 0)
    return round(wanted)


def register_limit(ks: KernelSchedule, device: Device) -> int:
    """Registers that a thread can have: the instruction set's limit, or its share of the SM's."""
    if ks.backend == "gluon":
        return hopper.register_limit(ks)
    return min(device.regs_per_thread_max, device.regs_per_sm // (ks.num_warps * device.warp_size))


def spilled_registers(kernel: Kernel, ks: KernelSchedule, problem: Problem, device: Device) -> int:
    """How many of the wanted registers a thread does not get."""
    return max(registers(kernel, ks, problem, device) - register_limit(ks, device), 0)


def _mfma_operands(kernel: Kernel, ks: KernelSchedule, tiles: Tiling, problem: Problem, device: Device) -> float:
    """Registers of a thread that hold operands: its rows of the resident tiles, and streamed tiles as a whole."""
    rows = max(MFMA_ROWS, tiles.rows / ks.num_warps)
    resident = sum(rows * tile.dim for tile in tiles.resident)
    streamed = sum(tile.rows * tile.dim for tile in tiles.streamed)
    held = resident + streamed * (MFMA_PIPELINED[kernel] if ks.num_stages > 1 else 1.0)
    return held * problem.dtype_bytes / 4 / device.warp_size
