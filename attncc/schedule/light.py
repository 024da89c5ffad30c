"""Tilings of the light passes for auxiliary outputs, derived from those of the kernels that they resemble."""

from __future__ import annotations

from attncc.schedule.hopper import RESERVED_BYTES, TILE_BYTES
from attncc.schedule.problem import KernelSchedule, Schedule, head_chunks

#: by key in Gluon: three warpgroups of 64 keys each, whose exponentials run beside each other's matmuls
WARPGROUPS = KernelSchedule(128, 192, 12, 3, "gluon")


def in_warps(schedule: Schedule, d_qk: int) -> bool:
    """Whether passes run in Gluon, if there is a kernel: if the forward does, and its tiles fit."""
    width = sum(head_chunks(d_qk))
    tiles = (WARPGROUPS.num_stages * WARPGROUPS.block_m + 2 * WARPGROUPS.block_n) * width * 2
    return schedule.forward.form == "gluon" and tiles + RESERVED_BYTES <= TILE_BYTES


def light_tilings(schedule: Schedule) -> dict[str, KernelSchedule]:
    """One for each loop: over the keys of a block of queries, over the queries of a block of keys, along diagonals.

    The first two are the forward without its second matmul, either way round. A band of diagonals has square tiles.
    """
    forward, pair = schedule.forward, schedule.pair or schedule.dq
    if forward.form != "triton":  # a tiling of another kind of kernel
        forward = KernelSchedule(128, 64, 8, 3)
    side = min(pair.block_m, pair.block_n, 64)
    return {
        "by_key_in_warps": WARPGROUPS,
        "by_query": forward,
        # On the H200 (D=128, causal) 64 keys in 4 warps take 0.33 ms where 128 keys in 8 warps take 0.53: programs of
        # few warps share an SM, and one's exponents run beside another's matmul.
        "by_key": KernelSchedule(
            *(min(forward.block_n, 64), min(forward.block_m, 64), min(forward.num_warps, 4), forward.num_stages)
        ),
        # 4 warps and 2 stages: 0.82 ms beside 0.97 of 8 and 3
        "by_offset": KernelSchedule(side, side, min(pair.num_warps, 4), min(pair.num_stages, 2)),
    }
