"""A schedule as the launch parameters of a generated module."""

from __future__ import annotations

from attncc.schedule import hopper_backward
from attncc.schedule.device import Device
from attncc.schedule.problem import KERNELS, Kernel, KernelSchedule, Schedule

#: registers per thread at launch, by warpgroups of a Gluon kernel: an even share, before the loading warp gives up most
EVEN_REGISTERS = {2: 168, 3: 128}


def kernel_of(name: str, schedule: Schedule) -> Kernel | None:
    """The scheduler's kernel that a generated kernel implements or accompanies. A companion loops over the same tiles
    with the same tiling, so its spills count against that tiling, too. None for all other kernels."""
    known: dict[str, Kernel] = {"forward": "forward", "decode": "forward", "dkdv": "dkdv", "dq": "dq"}
    if name.startswith("cotangents"):
        return "dq"
    if name == "columns_kernel":  # always in Triton, whichever backend computes dK and dV
        return "dkdv" if schedule.dkdv.backend == "triton" else "dq"
    return known.get(name.removesuffix("_kernel"))


def launch_meta(
    schedule: KernelSchedule, device: Device | None = None, kernel: Kernel = "forward", wide: bool = False
) -> dict[str, int]:
    """A kernel's schedule as launch arguments. A persistent Gluon kernel (a forward that does not split the keys, or a
    backward that deals blocks of keys) has as many programs as `device` has SMs. The Gluon backward sums dQ by default,
    except if heads are `wide`; `splits` programs share the query heads of a group."""
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
    """Launch arguments of a Gluon backward whose programs add to dQ in a fixed order, if they add to dQ."""
    return {**meta, "ORDERED": True}


def schedule_meta(schedule: Schedule, device: Device, d_qk: int, d_v: int) -> dict[str, dict[str, int]]:
    """Launch arguments of every kernel. A pair kernel sums along diagonals, so its tiles are square."""
    wide = hopper_backward.wide(d_qk, d_v)
    meta: dict[str, dict[str, int]] = {name: launch_meta(schedule.of(name), device, name, wide) for name in KERNELS}
    pair = launch_meta(schedule.pair or schedule.dq, device)
    side = min(pair["BLOCK_M"], pair["BLOCK_N"])
    meta["pair"] = {**pair, "BLOCK_M": side, "BLOCK_N": side}
    return meta
