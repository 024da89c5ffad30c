"""The candidate tilings of a kernel. All of them are computed to fit the device, and there is always at least one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from attncc.errors import ScheduleError
from attncc.schedule import decode, hopper, hopper_decode_cost
from attncc.schedule.device import Device
from attncc.schedule.memory import buffers, shared_memory, tensor_memory
from attncc.schedule.problem import Backend, Kernel, KernelSchedule, Problem
from attncc.schedule.registers import register_limit, registers, spilled_registers
from attncc.schedule.staging import stages_compile

BLOCKS = (16, 32, 64, 128)
WARPS = (4, 8)
FEW_WARPS = (1, 2)
STAGES = {"cuda": (2, 3, 4), "hip": (1, 2)}
# Pairs of a tile for each warp: fewer leave lanes without work, more cannot stay in registers.
PAIRS_A_WARP = (64, 4096)
# A few spilled registers cost less than a smaller tile may: the cost model weighs them.
SPILL_TOLERANCE = 1.3


def candidates(
    kernel: Kernel, problem: Problem, device: Device, backend: Backend | None = "triton"
) -> tuple[KernelSchedule, ...]:
    """Tilings of `kernel` that fit `device` in shared memory, tensor memory and registers.

    Those of one backend, or with None of both; Triton's where there is no Gluon kernel for the problem. A forward with
    few rows and many keys has tilings that split the keys, and one that would leave SMs idle has them, too.

    Where none does in the usual sizes, the one that wants the fewest registers among all that fit in memory, down to
    16 x 16 in one stage. ScheduleError, naming the largest buffer and the bytes over, if not even that fits.
    """
    if device.is_interpreter:
        return (_interpreted(kernel, problem),)
    if kernel == "forward" and backend != "gluon" and (decode.suits(problem) or decode.leaves_idle(problem, device)):
        splitting = decode.tilings(problem, device)
        if splitting and decode.suits(problem):
            splitting += _in_gluon(kernel, problem, device) if backend is None and problem.value_of_key else ()
            return splitting
        return (*splitting, *_of_rows(kernel, problem, device, backend))
    return _of_rows(kernel, problem, device, backend)


def _of_rows(kernel: Kernel, problem: Problem, device: Device, backend: Backend | None) -> tuple[KernelSchedule, ...]:
    """The tilings of programs that own their rows."""
    gluon = _in_gluon(kernel, problem, device) if backend != "triton" else ()
    if gluon:
        return gluon if backend == "gluon" else (*_of_rows(kernel, problem, device, "triton"), *gluon)
    usual = tuple(
        ks
        for ks in _tilings(problem, device, WARPS, STAGES[device.backend])
        if _compiles(kernel, ks, problem, device)
        and registers(kernel, ks, problem, device) <= SPILL_TOLERANCE * register_limit(ks, device)
    )
    if usual:
        return usual
    all_sizes = _tilings(problem, device, (*FEW_WARPS, *WARPS), (1, 2))
    small = [ks for ks in all_sizes if _compiles(kernel, ks, problem, device)]
    if small:
        return (min(small, key=lambda ks: (spilled_registers(kernel, ks, problem, device), -ks.block_m * ks.block_n)),)
    raise _too_large(kernel, problem, device)


def _in_gluon(kernel: Kernel, problem: Problem, device: Device) -> tuple[KernelSchedule, ...]:
    """The tilings of the Gluon kernel that serves the problem, if one does."""
    if kernel == "forward" and problem.value_of_key:
        return () if hopper.refusal(kernel, problem, device) else hopper_decode_cost.tilings(problem, device)
    return hopper.tilings(kernel, problem, device)


def _tilings(
    problem: Problem, device: Device, warps: tuple[int, ...], stages: tuple[int, ...]
) -> Iterator[KernelSchedule]:
    """All combinations of sizes in which every warp has work and no block is far longer than its sequence."""
    low, high = PAIRS_A_WARP
    for block_m, block_n, num_warps, num_stages in product(BLOCKS, BLOCKS, warps, stages):
        if block_m > _covering(problem.q_len) or block_n > _covering(problem.kv_len):
            continue
        if low <= block_m * block_n / num_warps <= high * device.warp_size / 32:
            yield KernelSchedule(block_m, block_n, num_warps, num_stages)


def _covering(length: int) -> int:
    """The smallest block that covers `length`."""
    return max(BLOCKS[0], 1 << (length - 1).bit_length())


def _compiles(kernel: Kernel, ks: KernelSchedule, problem: Problem, device: Device) -> bool:
    """Whether it fits in shared memory, and Triton supports its number of stages."""
    return (
        shared_memory(kernel, ks, problem, device) <= device.smem_per_block
        and tensor_memory(kernel, ks, problem, device) <= device.tmem_columns
        and stages_compile(kernel, ks, problem, device)
    )


def _interpreted(kernel: Kernel, problem: Problem) -> KernelSchedule:
    """Small enough that a short sequence has tiles of every class, large enough that each is worth its overhead."""
    block_m, block_n = (min(max(_covering(length) // 4, 32), 64) for length in (problem.q_len, problem.kv_len))
    if kernel == "forward" and decode.suits(problem):
        rows = min(_covering(problem.q_len * problem.group), 64)
        splits = min(-(-problem.kv_len // block_n), 3)
        return KernelSchedule(rows, block_n, num_warps=1, num_stages=1, splits=splits)
    return KernelSchedule(block_m, block_n, num_warps=1, num_stages=1)


def _too_large(kernel: Kernel, problem: Problem, device: Device) -> ScheduleError:
    """The error for the smallest tiling, which does not fit either."""
    smallest = KernelSchedule(BLOCKS[0], BLOCKS[0], 1, 1)
    needed = buffers(kernel, smallest, problem, device)
    total = sum(buffer.bytes for buffer in needed)
    over = total - device.smem_per_block
    parts = ", ".join(f"{buffer.name} {buffer.bytes:,}" for buffer in needed)
    return ScheduleError(
        f"the {kernel} kernel does not fit {device.title}: its smallest tile, {smallest}, takes {total:,} bytes of "
        f"shared memory ({parts}), {over:,} more than the {device.smem_per_block:,} that a program may have",
        kernel=kernel,
        buffer=needed[0].name,
        bytes_over=over,
        remedy=f"use smaller head dimensions (now {problem.d_qk} and {problem.d_v})"
        + (" or 16 bits" if problem.dtype == "fp32" else ""),
    )
