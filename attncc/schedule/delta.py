"""How a call of the delta rule is cut: tokens a chunk, and the columns of the state that one program carries."""

from __future__ import annotations

from attncc.errors import InputError
from attncc.schedule.device import Device
from attncc.schedule.linear import LinearSchedule, LinearSizes, linear_schedule
from attncc.schedule.problem import DTYPE_BYTES, Dtype

#: the equations of a chunk are one tile, whose inverse is made in registers
CHUNKS = (16, 32, 64)
#: columns of v that are multiplied at once where a program has all of them
COLUMNS = 64


def padded(dim: int) -> int:
    """The width of a tile that holds so many columns."""
    return max(16, 1 << (dim - 1).bit_length())


def solve_precision(precision: str, full: bool, device: Device) -> str:
    """How float32 operands meet where a chunk's equations are solved: `full` where q, k, v are float32 themselves.

    What is solved of operands of 16 bits becomes one itself: tf32 has as many bits as float16, and more than bfloat16.
    """
    return precision if full or device.is_interpreter or device.backend != "cuda" else "tf32"


def delta_schedule(sizes: LinearSizes, device: Device, chunk: int | None = None) -> LinearSchedule:
    """A schedule that fits the device; `chunk` is the caller's own choice. InputError for one that is no tile."""
    if chunk is None:
        chunk = 64 if sizes.dtype != "fp32" else 32
        while chunk > 16 and (chunk >= 2 * sizes.length or _shared(sizes, chunk) > device.smem_per_block):
            chunk //= 2
    if chunk not in CHUNKS:
        raise InputError(f"chunk_size is {chunk!r}", remedy=f"one of {', '.join(map(str, CHUNKS))}")
    # a segment is one chunk: there is none behind it to fetch ahead
    kernels = {name: {**meta, "num_stages": 1} for name, meta in linear_schedule(sizes, device, chunk).kernels.items()}
    warps = 4 if device.is_interpreter else 256 // device.warp_size
    columns = min(COLUMNS, padded(sizes.d_v))
    kernels["prepare"] = {"CHUNK": chunk, "BLOCK": columns, "num_warps": warps // 2, "num_stages": 1}
    kernels["carry"] = _carried(sizes, chunk, device, 1)
    kernels["carry_back"] = _carried(sizes, chunk, device, 2)
    kernels["solve_back"] = {"CHUNK": chunk, "BLOCK": columns, "num_warps": warps, "num_stages": 1}
    return LinearSchedule(chunk, chunk, kernels)


def _shared(sizes: LinearSizes, chunk: int) -> int:
    """Bytes of a chunk's operands where its gradients are made."""
    bytes_ = DTYPE_BYTES[sizes.dtype]
    tiles = chunk * (2 * padded(sizes.d_qk) + 3 * min(COLUMNS, padded(sizes.d_v)) + 2 * chunk)
    return (tiles + padded(sizes.d_qk) * min(COLUMNS, padded(sizes.d_v))) * bytes_


def _carried(sizes: LinearSizes, chunk: int, device: Device, tiles: int) -> dict[str, int]:
    """Columns of the state that a program carries: few enough that all multiprocessors have one."""
    block = min(64, padded(sizes.d_v))
    width = padded(sizes.d_qk)
    rows = sizes.sequences * sizes.heads
    while block > 16 and (4 * rows * -(-sizes.d_v // block) < 3 * device.sms or width * block > 128 * 64):
        block //= 2
    while block > 16 and _stage(sizes.dtype, width, block, chunk, tiles) > device.smem_per_block:
        block //= 2
    stages = 2 if 2 * _stage(sizes.dtype, width, block, chunk, tiles) <= device.smem_per_block else 1
    warps = 4 if device.is_interpreter else (256 if tiles > 1 else 128) // device.warp_size
    return {"CHUNK": chunk, "BLOCK": block, "num_warps": warps, "num_stages": stages}


def _stage(dtype: Dtype, width: int, block: int, chunk: int, tiles: int) -> int:
    """Bytes of one chunk's operands, and of the state as one."""
    return DTYPE_BYTES[dtype] * (chunk * ((1 + tiles) * width + 2 * block) + width * block)
