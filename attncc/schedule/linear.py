"""How a call in linear time is cut: tokens per chunk and segment, columns per program.

The measured constants are in `schedules/linear.toml`.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from attncc import resources
from attncc.errors import InputError
from attncc.schedule.device import Device
from attncc.schedule.problem import DTYPE_BYTES, Dtype

#: how a variant that is linear in time is computed, and "auto"
PlanName = Literal["auto", "parallel", "chunk", "recurrent"]

#: tokens a chunk may have
CHUNKS = (16, 32, 64, 128)
#: tokens up to which a sequence is stepped through
STEPS = 16
#: tokens a chunk of the gradients by features, where each channel decays
HALVES = 16
#: features that one program can have all of, where it needs them
WHOLE = 128
#: shorter segments, and more of them, than measured: what tests set
SEGMENT: int | None = None
WAVES: int | None = None


@dataclass(frozen=True)
class LinearSizes:
    """A call as its kernels see it. `length` is that of the longest sequence; by_channel: a decay for each feature;
    normalized: weights are divided by a sum of them, whose gradient wants all features of a query in one program;
    divided: by a sum of whatever kind; rows: float32 factors of a token that the kernels load."""

    dtype: Dtype
    sequences: int
    heads: int
    length: int
    d_qk: int
    d_v: int
    by_channel: bool = False
    normalized: bool = False
    divided: bool = False
    rows: int = 0


@dataclass(frozen=True)
class LinearSchedule:
    """Tokens a chunk, tokens a segment (a multiple of chunks), and each kernel's constants."""

    chunk: int
    span: int
    kernels: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Rule:
    """How one kind of kernels is cut: tokens a chunk, float32 values of the state a program at most, and one of dq, dk
    or dv, its threads, stages of what waits for memory."""

    chunk: int
    state: int
    gradients: int
    threads: int
    stages: int


@cache
def _measured() -> dict[str, Any]:
    with (resources.path("schedules") / "linear.toml").open("rb") as file:
        return tomllib.load(file)


def _rule(sizes: LinearSizes, device: Device) -> Rule:
    newest = _has_wgmma(device)
    kind = "fma" if sizes.dtype == "fp32" else "channel" if sizes.by_channel else "wgmma" if newest else "mma"
    return Rule(**_measured()[kind])


def _has_wgmma(device: Device) -> bool:
    """Whether tensor cores read operands from shared memory directly."""
    return device.target.startswith(("sm_9", "sm_10"))


def padded(dim: int) -> int:
    """The power of two, at least what a matmul takes, that holds all columns."""
    return max(16, 1 << (dim - 1).bit_length())


def _tiling(
    d_a: int, columns: int, state: int, chunk: int, sizes: LinearSizes, device: Device, wider: int = 1, stages: int = 2
) -> dict[str, int]:
    """The columns of the state that one program has, its warps, `wider` times as many as is the rule, and at most so
    many stages: what is multiplied must fit in shared memory."""
    rule, width = _rule(sizes, device), padded(d_a)
    block = min(padded(columns), max(16, state // width), 128)
    longer = max(wider, chunk // rule.chunk)
    warps = 4 if device.is_interpreter else min(256, rule.threads * longer) // device.warp_size
    if not device.is_interpreter:
        limit = device.smem_per_block
        while stages > 1 and shared_bytes(width, block, chunk, sizes, stages) > limit:
            stages -= 1
        while block > 16 and shared_bytes(width, block, chunk, sizes, stages) > limit:
            block //= 2
    return {"CHUNK": chunk, "BLOCK": block, "num_warps": warps, "num_stages": stages}


def shared_bytes(width: int, block: int, chunk: int, sizes: LinearSizes, stages: int) -> int:
    """An upper bound on a kernel's shared memory: a chunk's tiles for each stage, and operands that are made.

    Two tiles of a chunk are `width` columns wide, those of the values and of the result's own vector `block` columns.
    Made are the state as an operand and the values as they enter it; rows of factors are rounded up.
    """
    tiles = 2 * chunk * (width + block)
    made = width * block + chunk * block
    each = DTYPE_BYTES[sizes.dtype]
    decays = 0
    if sizes.by_channel:  # the pairs of a long chunk and its decay; the steps of the gradients' short ones
        decays = stages * chunk * chunk * each + stages * width * 4
        decays += (4 * stages + each) * chunk * width if chunk <= HALVES else 0
    rows = stages * chunk * 8 + 1024
    return (stages * tiles + made) * each + decays + rows


def _scan_stages(d_a: int, columns: int, chunk: int, own: bool, sizes: LinearSizes, device: Device) -> int:
    """Stages of a scan: three, so that a chunk's loads have the time of another to arrive, where two programs of a
    multiprocessor have room for them; with two a program waits for them at every turn.

    Triton keeps as many tiles as stages of an operand that a wgmma reads from shared memory, and one less of what goes
    to registers. own: a scan with another tile of values.
    """
    if not _has_wgmma(device) or sizes.dtype == "fp32" or sizes.by_channel or sizes.divided:
        return 2
    width = padded(d_a)
    block = min(padded(columns), max(16, _rule(sizes, device).state // width), 128)
    tiles = (2 + 3) * chunk * width + (2 + 2 * own) * chunk * block + width * block
    needed = tiles * DTYPE_BYTES[sizes.dtype] + 2 * sizes.rows * 3 * chunk * 4 + device.smem_reserved
    return 3 if 2 * needed <= device.smem_per_sm else 2


def places(device: Device) -> int:
    """Programs of a scan that run side by side."""
    return int((WAVES or _measured()["waves"]) * device.sms)


def linear_schedule(sizes: LinearSizes, device: Device, chunk: int | None = None) -> LinearSchedule:
    """A schedule that fits the device; `chunk` is the caller's own choice. InputError for one that is no tile."""
    rule = _rule(sizes, device)
    if chunk is None:
        chunk = rule.chunk
        while chunk > 16 and chunk >= 2 * sizes.length:
            chunk //= 2
    known = CHUNKS[:-1] if sizes.by_channel else CHUNKS
    if chunk not in known:
        raise InputError(f"chunk_size is {chunk!r}", remedy=f"one of {', '.join(map(str, known))}")
    by_qk, by_v = (sizes.d_qk, sizes.d_v), (sizes.d_v, sizes.d_qk)
    one, other, whole = (
        _scan_stages(*dims, chunk, own, sizes, device) for dims, own in ((by_qk, False), (by_v, False), (by_v, True))
    )
    qk = _tiling(*by_qk, rule.state, chunk, sizes, device, stages=one)
    of_v = _tiling(*by_qk, rule.gradients, chunk, sizes, device, stages=one)
    of_q = _tiling(*by_v, rule.gradients, chunk, sizes, device, stages=whole)
    of_k = _tiling(*by_v, rule.gradients, chunk, sizes, device, stages=other)
    adding = _tiling(sizes.d_qk, sizes.d_v, rule.state, chunk, sizes, device, stages=rule.stages)
    kernels = {"forward": qk, "states": adding, "dstates": adding, "dq": of_q, "dk": of_k, "dv": of_v}
    if sizes.by_channel:  # a chunk's gradients by features are formed half by half, in registers
        wider = 1 if _has_wgmma(device) else 2  # elsewhere twice as many registers would not be enough
        halves = _tiling(sizes.d_v, sizes.d_qk, rule.gradients, HALVES, sizes, device, wider, rule.stages)
        kernels |= {"prepare": {"CHUNK": chunk, "num_warps": qk["num_warps"]}, "dq": halves, "dk": halves}
    if sizes.normalized and sizes.dtype != "fp32" and of_q["BLOCK"] < padded(sizes.d_qk) <= WHOLE:
        kernels["dq"] = _tiling(sizes.d_v, sizes.d_qk, WHOLE * padded(sizes.d_v), chunk, sizes, device, 2)
    # a step moves the state and does little else: few values a thread, so that many loads are under way
    kernels["step"] = {"BLOCK": min(padded(sizes.d_v), max(16, 2048 // padded(sizes.d_qk))), "num_warps": 8}
    chunks = max(1, -(-sizes.length // chunk))
    blocks = -(-sizes.d_v // qk["BLOCK"])
    segment = SEGMENT or _measured()["segment"]
    wanted = places(device) // max(1, sizes.sequences * sizes.heads * blocks)
    segments = max(1, min(wanted, chunks, sizes.length // segment))
    return LinearSchedule(chunk, chunk * -(-chunks // segments), kernels)
