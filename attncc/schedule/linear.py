"""How a call in linear time is cut: tokens a chunk and a segment, columns a program; and when it is worth it.

Nothing here is measured yet on a GPU but the resources of the kernels, which are counted when they are cross-compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attncc.errors import InputError
from attncc.schedule.device import Device
from attncc.schedule.problem import DTYPE_BYTES, Dtype

#: float32 values of a state that a program holds in registers: 32 of each of 256 threads
STATE = 128 * 64
#: tokens that a segment has at least, so that its state costs less than they do
SEGMENT = 256
#: tokens a chunk where each channel decays on its own: its pairs are formed one after the other
CHANNEL_CHUNK = 16
#: programs for each multiprocessor before a sequence is left in one piece
WAVES = 4
#: tokens up to which a sequence is stepped through
STEPS = 16


@dataclass(frozen=True)
class LinearSizes:
    """A call as its kernels see it. `length` is that of the longest sequence; by_channel: a decay for each feature."""

    dtype: Dtype
    sequences: int
    heads: int
    length: int
    d_qk: int
    d_v: int
    by_channel: bool = False


@dataclass(frozen=True)
class LinearSchedule:
    """Tokens a chunk, tokens a segment (a multiple of chunks), and each kernel's constants."""

    chunk: int
    span: int
    kernels: dict[str, dict[str, int]]


def _padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _tiling(width: int, columns: int, chunk: int, dtype: Dtype, device: Device) -> dict[str, int]:
    """The columns of the state that one program has, and its warps: three tiles and the state must fit."""
    block = min(_padded(columns), max(16, STATE // _padded(width)), 128 if dtype != "fp32" else 64)
    if not device.is_interpreter:
        while block > 16 and _shared(width, block, chunk, dtype) > device.smem_per_block:
            block //= 2
    # before Hopper accumulators and operands share a thread's registers
    large = STATE if device.target in ("sm_90", "sm_100") else STATE // 2
    threads = 256 if _padded(width) * max(block, chunk) >= large else 128
    warps = 4 if device.is_interpreter else threads // device.warp_size
    meta = {"CHUNK": chunk, "BLOCK": block, "num_warps": warps}
    stages = 2 if _shared(width, block, chunk, dtype, 2) <= device.smem_per_block else 1
    return {**meta, "num_stages": stages}


def _shared(width: int, block: int, chunk: int, dtype: Dtype, stages: int = 1) -> int:
    """Bytes of shared memory: the tiles of a chunk for each stage, and the state and the pairs as operands."""
    bytes_ = DTYPE_BYTES[dtype]
    tiles = chunk * (2 * _padded(width) + block) * bytes_ * stages
    return tiles + (_padded(width) * block + chunk * chunk + chunk * _padded(width)) * bytes_


def linear_schedule(sizes: LinearSizes, device: Device, chunk: int | None = None) -> LinearSchedule:
    """A schedule that fits the device; `chunk` is the caller's own choice. InputError for one that is no tile."""
    if sizes.by_channel:
        if chunk not in (None, CHANNEL_CHUNK):
            raise InputError(f"chunk_size is {chunk!r}", remedy=f"with a decay a channel it is {CHANNEL_CHUNK}")
        chunk = CHANNEL_CHUNK
    elif chunk is None:
        chunk = 64 if sizes.dtype != "fp32" else 32
        while chunk > 16 and chunk >= 2 * sizes.length:
            chunk //= 2
    if chunk not in (16, 32, 64, 128):
        raise InputError(f"chunk_size is {chunk!r}", remedy="one of 16, 32, 64, 128")
    qk = _tiling(sizes.d_qk, sizes.d_v, chunk, sizes.dtype, device)
    v = _tiling(sizes.d_v, sizes.d_qk, chunk, sizes.dtype, device)
    kernels: dict[str, dict[str, int]] = dict.fromkeys(("forward", "states", "dv", "dstates"), qk)
    kernels |= {"dq": v, "dk": v}
    kernels["step"] = {"BLOCK": min(_padded(sizes.d_v), max(16, 8192 // _padded(sizes.d_qk))), "num_warps": 4}
    chunks = -(-sizes.length // chunk)
    blocks = -(-sizes.d_v // qk["BLOCK"])
    wanted = -(-WAVES * device.sms // max(1, sizes.sequences * sizes.heads * blocks))
    segments = max(1, min(wanted, chunks, sizes.length // SEGMENT))
    return LinearSchedule(chunk, chunk * -(-chunks // segments), kernels)


def choose_plan(sizes: LinearSizes, device: Device, causal: bool = True) -> str:
    """ "parallel", "chunk" or "recurrent": whichever the model takes to be the fastest."""
    if causal and sizes.length <= STEPS and not device.is_interpreter:
        return "recurrent"
    times = {"parallel": quadratic_us(sizes, device), "chunk": linear_us(sizes, device)}
    return min(times, key=lambda name: times[name])


def quadratic_us(sizes: LinearSizes, device: Device) -> float:
    """The causal forward over all pairs: half of the matmuls of a full one, at half of the device's rate."""
    pairs = sizes.sequences * sizes.heads * sizes.length * sizes.length / 2
    flops = 2.0 * pairs * (sizes.d_qk + sizes.d_v)
    return device.launch_us + flops / (0.5 * 1e6 * device.matmul_tflops(sizes.dtype, "ieee"))


def linear_us(sizes: LinearSizes, device: Device) -> float:
    """The forward by chunks: three kernels, k and v read twice, bound by memory or by its steps one after the other."""
    schedule = linear_schedule(sizes, device)
    tokens = sizes.sequences * sizes.heads * sizes.length
    moved = tokens * (3 * sizes.d_qk + 3 * sizes.d_v) * DTYPE_BYTES[sizes.dtype]
    flops = 2.0 * tokens * (schedule.chunk * (sizes.d_qk + sizes.d_v) + 3 * sizes.d_qk * sizes.d_v)
    compute = flops / (0.4 * 1e6 * device.matmul_tflops(sizes.dtype, "ieee"))
    return 3 * device.launch_us + max(moved / (1e3 * device.dram_gbps), compute)


def crossover(sizes: LinearSizes, device: Device) -> int:
    """The length from which the model takes chunks to be faster than all pairs, in steps of 64 tokens."""
    lo, hi = 1, 1 << 14
    while lo < hi:
        at = (lo + hi) // 2
        there: Any = LinearSizes(sizes.dtype, sizes.sequences, sizes.heads, 64 * at, sizes.d_qk, sizes.d_v)
        if linear_us(there, device) < quadratic_us(there, device):
            hi = at
        else:
            lo = at + 1
    return 64 * lo
