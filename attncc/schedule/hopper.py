"""The Gluon kernels for Hopper from the scheduler's view: supported variants, tilings, shared memory and registers.

A program has one warp that loads by TMA, and two or three warpgroups that compute 64 rows each. The backward kernel is
called dkdv, like its Triton counterpart, and can also accumulate dQ (`hopper_backward`).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import ceil

from attncc.schedule import hopper_backward, hopper_decode
from attncc.schedule.device import Device
from attncc.schedule.model import model
from attncc.schedule.problem import Kernel, KernelSchedule, Problem, head_chunks

#: rows of a tile that one warpgroup owns
ROWS = 64
#: registers of a thread that computes, by the number of warpgroups: what the 65,536 of an SM leave it
REGISTERS = {2: 240, 3: 160}
KEYS = (64, 128)
#: tiles of keys under way, by the number of warpgroups; the first is taken where the model sees no difference. At heads
#: of 64, three warpgroups with three had 1.01 to 1.03 of the speed with two on an H200
STAGES = {2: (2, 3, 4), 3: (3, 2, 4)}
#: barriers, and what the compiler keeps for handing arguments to the warps
RESERVED_BYTES = 2048
#: bytes of shared memory for tiles, of the 227 KiB that a program may have
TILE_BYTES = 232448 - RESERVED_BYTES
#: registers beside the accumulator, the scores and the weights: row values, addresses, loop counters
BESIDE = 32
WIDEST_HEAD = 256
#: tiles of scores that live beside the one: addresses of what is read a pair; each FREE_INT further integer operations
PAIR_READ, FREE_INT = 2, 16
#: the same of a map's own tile, two of its elements a register: with 128 x 128 tiles, which spill some where a tile is
#: not whole, a dense bias took 1.55 ms, with 128 x 64 ones 1.83
MAP = 0.5
#: where a mask does more than to hide scores: operations that take as many registers as one more tile
SHOWN_IN_PLACE = 8
#: what is read a key, or is a distance, beside each tile
VECTOR = 24
FIT = model().gluon_forward


def refusal(kernel: Kernel, problem: Problem, device: Device) -> str | None:
    """Why there is no Gluon kernel for this problem; None if there is one."""
    if device.target != "sm_90":
        return f"Gluon kernels are for sm_90, and this is {device.target}"
    if kernel not in ("forward", "dkdv"):
        return "Gluon has no such kernel"
    if not whole_branches(problem.d_qk, problem.branches):
        return "TMA copies whole tiles of a branch: 16, 32, 64 or sums of those"
    if problem.costs.only_triton:
        return problem.costs.only_triton
    if problem.values > 1:
        return "Gluon kernels have one head of v for each of k"
    if problem.value_of_key and kernel == "dkdv":
        return "Gluon's backward loads v for itself"
    if problem.dtype == "fp32":
        return "Gluon kernels multiply 16-bit operands"
    if not problem.costs.similarity.plain_dot:
        return "the Gluon backend multiplies q with k, and this similarity is made in another way"
    if problem.value_of_key:
        return hopper_decode.refusal(problem, device)
    if kernel == "dkdv" and problem.costs.warps.no_backward:
        return problem.costs.warps.no_backward
    if kernel == "dkdv" and problem.costs.warps.maps:
        return "an input with an entry a pair comes entry by entry there, and in Triton a tile of it at once"
    both = hopper_backward.both_branches(problem.d_qk, problem.d_v, problem.costs.warps)
    if kernel == "dkdv" and problem.branches > 1 and not both:
        return "Gluon's backward has two branches, with heads of 16, 32 or 64 each and one value a pair that waits"
    for dim in (problem.d_qk, problem.d_v):
        if dim % 8 or dim > WIDEST_HEAD:
            return f"TMA copies rows of a multiple of 8 elements, here up to {WIDEST_HEAD}, and a head has {dim}"
    warps = problem.costs.warps
    if kernel == "dkdv" and hopper_backward.shares_keys(problem.d_qk, problem.d_v, warps) and warps.columns:
        return "of heads as wide two warpgroups share the queries of a key, and this variant sums over those"
    if kernel == "dkdv" and hopper_backward.wide(problem.d_qk, problem.d_v) and warps.passes_on:
        return "of heads as wide no kernel in Gluon adds to dK what the terms of a similarity pass on"
    if kernel == "dkdv" and hopper_backward.wide(problem.d_qk, problem.d_v) and warps.means:
        return "of heads as wide no kernel in Gluon takes a key's means over the queries away"
    if not _fitting(kernel, problem, device):
        return "no tiling fits its registers and shared memory in Gluon"
    return None


def whole_branches(d_qk: int, branches: int) -> bool:
    """Whether the columns of q of each branch fill whole tiles; otherwise a tile would reach into the next branch."""
    return branches == 1 or sum(head_chunks(d_qk // branches)) == d_qk // branches


def template(kernel: Kernel, problem: Problem) -> str:
    """The name of the Gluon kernel in device files: wide heads have their own backward kernel, and keys that contain
    their values a forward that splits the keys."""
    if kernel == "forward" and problem.value_of_key:
        return "decode"
    wide = kernel == "dkdv" and hopper_backward.wide(problem.d_qk, problem.d_v)
    return "dkdv_wide" if wide else kernel


def tilings(kernel: Kernel, problem: Problem, device: Device) -> tuple[KernelSchedule, ...]:
    """The tilings of a Gluon kernel in which one program computes a whole row; none if there is no such kernel."""
    return () if problem.value_of_key or refusal(kernel, problem, device) else _fitting(kernel, problem, device)


def has_backward(ks: KernelSchedule, problem: Problem, device: Device) -> bool:
    """Whether this is a tiling of the Gluon backward, whole or in strips."""
    strips = not ks.strips or (ks.strips in hopper_backward.STRIPS and hopper_backward.has_strips(problem))
    whole = {replace(each, strips=0) for each in tilings("dkdv", problem, device)}
    return strips and replace(ks, strips=0) in whole


def _fitting(kernel: Kernel, problem: Problem, device: Device) -> tuple[KernelSchedule, ...]:
    tried = (
        hopper_backward.tried(problem)
        if kernel == "dkdv"
        else (
            KernelSchedule(groups * ROWS, keys, 4 * groups, stages, "gluon")
            for groups, keys in product(REGISTERS, KEYS)
            for stages in STAGES[groups]
        )
    )
    return tuple(
        ks
        for ks in tried
        if shared_memory(kernel, ks, problem) <= device.smem_per_block
        and registers(kernel, ks, problem) <= register_limit(ks)
    )


def register_limit(ks: KernelSchedule) -> int:
    """Registers per thread of a computing warpgroup. In a backward with a third warpgroup, which computes dQ, the
    other two have 208 registers, but do not need the 32 for their share of dQ."""
    return REGISTERS[3 if ks.block_m == 3 * ROWS else 2]


def shared_memory(kernel: Kernel, ks: KernelSchedule, problem: Problem) -> int:
    """Bytes of shared memory per program: the tile of q, the stages of k, v and maps, and 4 bytes for each value read
    per key; if they fit, also a tile of out, and with three warpgroups the next tile of q."""
    if kernel == "dkdv":
        return hopper_backward.shared_memory(ks, problem, RESERVED_BYTES)
    if problem.value_of_key:
        return hopper_decode.shared_memory(problem)
    qk, v = sum(head_chunks(problem.d_qk)), sum(head_chunks(problem.d_v))
    ring = ks.num_stages * ks.block_n * (qk + v + problem.costs.warps.maps * ks.block_m)
    needed = (ks.block_m * qk + ring) * problem.dtype_bytes
    apart = needed + ks.block_m * v * problem.dtype_bytes
    shares = out_in_q(problem.d_qk, problem.d_v, problem.branches) and apart > TILE_BYTES
    next_q = ks.block_m * qk * problem.dtype_bytes if ks.block_m == 3 * ROWS else 0
    apart += next_q if apart + next_q <= TILE_BYTES else 0
    keyed = problem.costs.vectors * (ks.num_stages + 1) * ks.block_n * 4
    return (needed if shares else apart) + keyed + RESERVED_BYTES


def out_in_q(d_qk: int, d_v: int, branches: int = 1) -> bool:
    """Whether a tile of out can reuse the shared memory of the tile of q: its chunks must be the first chunks of q."""
    qk, v = head_chunks(d_qk // branches) * branches, head_chunks(d_v)
    return qk[: len(v)] == v


def registers(kernel: Kernel, ks: KernelSchedule, problem: Problem) -> int:
    """What a thread that computes wants: the accumulator, a tile of scores, its weights as the next operand, and what
    the stages keep beside them."""
    if kernel == "dkdv":
        return hopper_backward.registers(ks, problem) + BESIDE
    if problem.value_of_key:
        return hopper_decode.registers(problem)
    costs, work = problem.costs, problem.costs.forward
    kept = PAIR_READ * (work.loads - costs.warps.maps) + MAP * costs.warps.maps + max(work.int - FREE_INT, 0) / FREE_INT
    kept += 0 if costs.warps.vanishes else (work.fma + work.sfu) / SHOWN_IN_PLACE
    tiles = problem.branches * sum(head_chunks(problem.d_v)) + ks.block_n * (1.5 + kept)
    return round(ROWS * tiles / 128) + BESIDE + VECTOR * (costs.vectors + costs.distances)


def waits_for_arithmetic(kernel: Kernel, terms: dict[str, float], problem: Problem) -> bool:
    """Whether the exponentials and other arithmetic of a tile, which a warpgroup executes one after the other, take
    longer than the matmuls at the throughput they reach."""
    matmuls = terms["tensor"] / (hopper_backward.efficiency(problem) if kernel == "dkdv" else FIT.tensor_efficiency)
    return terms["sfu"] + terms["alu"] > max(matmuls, terms["memory"], terms["launch"])


def predict(kernel: Kernel, ks: KernelSchedule, problem: Problem, device: Device) -> tuple[float, dict[str, float]]:
    """The time of a launch in microseconds, and each unit's own: a model for ranking, as that of the Triton kernels.

    One warpgroup's matmuls run beside the other's arithmetic, so a tile takes as long as the busier unit, or
    as one warpgroup alone needs from its scores to the next issue. The backward's is that of dK, dV and dQ.
    """
    if kernel == "dkdv":
        return hopper_backward.predict(ks, problem, device)
    live = problem.costs.live(ks.block_m, ks.block_n)
    tiles = live.live * problem.batch * problem.heads
    blocks = ceil(problem.q_len / ks.block_m) * problem.batch * problem.heads
    pairs = ks.block_m * ks.block_n
    work, mask = problem.costs.pair("forward"), problem.costs.mask
    share = live.mixed / live.live if live.live else 0.0
    depth = sum(head_chunks(problem.d_qk)) + problem.branches * sum(head_chunks(problem.d_v))
    flops = device.matmul_tflops(problem.dtype, problem.precision) * 1e3 / device.clock_ghz / device.sms
    tensor = 2 * pairs * depth / flops
    sfu = (work.sfu + share * mask.sfu) * pairs / device.sfu_per_clk_sm
    alu = (work.fma + share * mask.fma) * pairs + ks.block_m * problem.branches * sum(head_chunks(problem.d_v))
    alu = alu / device.fma_per_clk_sm + (work.int + share * mask.int) * pairs / device.int_per_clk_sm
    groups = ks.block_m // ROWS
    alone = (tensor + sfu + alu) / groups + FIT.turn
    busy = max(tensor / FIT.tensor_efficiency, sfu + alu, alone) + FIT.gap
    spread = ceil(blocks / device.sms) / (blocks / device.sms) / device.sms / (device.clock_ghz * 1e3)
    us = (tiles * busy + blocks * FIT.block_overhead) * spread + device.launch_us
    terms = {"tensor": tensor * tiles * spread, "sfu": sfu * tiles * spread, "alu": alu * tiles * spread}
    return us, {**terms, "memory": 0.0, "launch": device.launch_us}
