"""A schedule as the launch parameters of a generated module."""

from __future__ import annotations

from attncc.schedule import hopper_backward
from attncc.schedule.device import Device
from attncc.schedule.problem import KERNELS, Kernel, KernelSchedule, Schedule

#: registers of a thread, were all warps of a Gluon kernel given the same number: the loading warp passes its own on
EVEN_REGISTERS = {2: 168, 3: 128}


def kernel_of(name: str, schedule: Schedule) -> Kernel | None:
    """Which of the scheduler's kernels a generated one is, or is a companion of, which loops over the same tiles in the
    same tiling: what it spills is a reason against that, too. None for the others that are tiled like another."""
    known: dict[str, Kernel] = {"forward": "forward", "decode": "forward", "dkdv": "dkdv", "dq": "dq"}
    if name.startswith("cotangents"):
        return "dq"
    if name == "columns_kernel":  # in Triton, whatever makes dK and dV
        return "dkdv" if schedule.dkdv.backend == "triton" else "dq"
    return known.get(name.removesuffix("_kernel"))


def launch_meta(
    schedule: KernelSchedule, device: Device | None = None, kernel: Kernel = "forward", wide: bool = False
) -> dict[str, int]:
    """A kernel's schedule in the words of its launch. A Gluon forward that does not split the keys has as
    many programs as `device` has SMs, and so has a backward that deals blocks of keys; it sums dQ unless it is told
    otherwise, or heads are `wide`, and `splits` programs have a group's heads."""
    tiles = {"BLOCK_M": schedule.block_m, "BLOCK_N": schedule.block_n}
    if schedule.backend == "triton":
        splits = {"splits": schedule.splits} if schedule.splits else {}
        return {**tiles, "num_warps": schedule.num_warps, "num_stages": schedule.num_stages, **splits}
    options = {"STAGES": schedule.num_stages, "num_warps": 4, "maxnreg": EVEN_REGISTERS[schedule.num_warps // 4]}
    if kernel == "forward" and schedule.splits:
        return {**tiles, **{k: x for k, x in options.items() if k != "STAGES"}, "splits": schedule.splits}
    if kernel == "dkdv":
        options |= {"SPLITS": max(schedule.splits, 1), "SUM_DQ": not wide, "ORDERED": False}
    return {**tiles, **options, "programs": device.sms} if device else {**tiles, **options}


def in_fixed_order(meta: dict[str, int]) -> dict[str, int]:
    """The words of a Gluon backward whose programs add to dQ one after the other, or not at all."""
    return {**meta, "ORDERED": True}


def schedule_meta(schedule: Schedule, device: Device, d_qk: int, d_v: int) -> dict[str, dict[str, int]]:
    """Launch words for every kernel. The bands of a pair kernel are diagonals, so its tiles are square."""
    wide = hopper_backward.wide(d_qk, d_v)
    meta: dict[str, dict[str, int]] = {name: launch_meta(schedule.of(name), device, name, wide) for name in KERNELS}
    pair = launch_meta(schedule.pair or schedule.dq, device)
    side = min(pair["BLOCK_M"], pair["BLOCK_N"])
    meta["pair"] = {**pair, "BLOCK_M": side, "BLOCK_N": side}
    return meta
