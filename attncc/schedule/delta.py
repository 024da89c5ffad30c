"""How a call of the delta rule is cut: tokens per chunk, and columns of the state per program."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from attncc.errors import InputError
from attncc.schedule.device import Device
from attncc.schedule.linear import LinearSchedule, LinearSizes
from attncc.schedule.problem import DTYPE_BYTES, Dtype

#: the equations of a chunk are one tile, whose inverse is made in registers
CHUNKS = (16, 32, 64)
#: columns that a program multiplies at once; twice as many where pairs that another one would form again cost more
COLUMNS = 64


def padded(dim: int) -> int:
    """The width of a tile that holds so many columns."""
    return max(16, 1 << (dim - 1).bit_length())


def solve_precision(precision: str, full: bool, device: Device) -> str:
    """How float32 operands meet where a chunk's equations are solved: `full` where q, k, v are float32 themselves.

    What is solved of operands of 16 bits becomes one itself: tf32 has as many bits as float16, and more than bfloat16.
    """
    return precision if full or device.is_interpreter or device.backend != "cuda" else "tf32"


@lru_cache(maxsize=256)  # every call asks
def delta_schedule(sizes: LinearSizes, device: Device, chunk: int | None = None) -> LinearSchedule:
    """A schedule that fits the device; `chunk` is the caller's own choice. InputError for one that is no tile."""
    if chunk is None:
        # the tiles of long heads fill the registers sooner
        chunk = 64 if sizes.dtype != "fp32" and max(padded(sizes.d_qk), padded(sizes.d_v)) < 256 else 32
        while chunk > 16 and (chunk >= 2 * sizes.length or _shared(sizes, chunk) > device.smem_per_block):
            chunk //= 2
    if chunk not in CHUNKS:
        raise InputError(f"chunk_size is {chunk!r}", remedy=f"one of {', '.join(map(str, CHUNKS))}")
    columns = _columns(sizes.dtype, sizes.d_v)
    # as measured, 3.1 TB/s of the state; a step of linear attention has fewer columns and more warps
    kernels = {"step": {"BLOCK": min(padded(sizes.d_v), max(16, 8192 // padded(sizes.d_qk))), "num_warps": 4}}
    kernels["prepare"] = _prepared(sizes, chunk, device)
    kernels["carry"] = _carried(sizes, chunk, device, 1)
    kernels["recall"] = _carried(sizes, chunk, device, 0)
    if not _reads(sizes, device, kernels["carry"]):
        kernels["forward"] = _scanned(sizes, chunk, device)
    kernels["prepare_back"] = {**_prepared(sizes, chunk, device), "BLOCK": _passed(sizes, chunk)}
    kernels["carry_back"] = _carried(sizes, chunk, device, 2)
    warps = _warps(sizes.dtype, device, wide=padded(sizes.d_qk) > 128)
    kernels["gradients"] = {"CHUNK": chunk, "BLOCK": columns, "num_warps": warps, "num_stages": 1}
    return LinearSchedule(chunk, chunk, kernels)


def _reads(sizes: LinearSizes, device: Device, carry: Mapping[str, int]) -> bool:
    """Whether the kernel that carries the state from chunk to chunk also computes out, so that states are never stored.

    That saves two fifths of the forward's bytes, a quarter with decays, but each step takes longer: it pays if the
    programs fill the device.
    Measured on an H200 at 64 tokens: at 32 columns 0.351 ms in place of 0.413, with decays 0.405 in place of 0.432; at
    64, where sequences are many, 0.343 in place of 0.438, with decays 0.415 in place of 0.399 (0.376 in place of 0.390
    where no backward follows).
    """
    measured = device.target.startswith("sm_9") and carry["CHUNK"] == 64 and carry["BLOCK"] >= 32
    rows = sizes.sequences * sizes.heads
    return measured and sizes.d_qk <= 128 and 4 * rows * -(-sizes.d_v // carry["BLOCK"]) >= 3 * device.sms


def _columns(dtype: Dtype, dim: int, twice: bool = False) -> int:
    """Columns that a program multiplies at once. Operands of float32 meet in registers, and take more of them."""
    most = COLUMNS // 2 if dtype == "fp32" else 2 * COLUMNS if twice else COLUMNS
    return min(most, padded(dim))


def _warps(dtype: Dtype, device: Device, wide: bool = False) -> int:
    """wide: a program has sums of as many columns as k has features."""
    if device.is_interpreter:
        return 4
    return (256 if wide or dtype == "fp32" else 128) // device.warp_size


def _prepared(sizes: LinearSizes, chunk: int, device: Device) -> dict[str, int]:
    """How a chunk's equations are solved, or passed backwards.

    At 64 tokens and 16 bits they are multiplied by wgmma. On Hopper three programs of so many registers share a
    multiprocessor, for each waits for its own loads and matmuls most of the time: 137 us in place of 164 of an H200.
    """
    tiles = {"CHUNK": chunk, "num_warps": _warps(sizes.dtype, device), "num_stages": 1}
    if chunk == 64 and sizes.dtype != "fp32" and device.target.startswith("sm_9"):
        tiles["maxnreg"] = 168
    return tiles


def _passed(sizes: LinearSizes, chunk: int) -> int:
    """Columns that are multiplied at once where equations are passed backwards. A wgmma whose right operand has fewer
    than 64 is what the assembler of CUDA 12.8 makes wrong here (`codegen.wgmma`)."""
    if chunk == 64 and sizes.dtype != "fp32":
        return max(COLUMNS, _columns(sizes.dtype, sizes.d_v, twice=True))
    return max(16, _columns(sizes.dtype, sizes.d_v) // 2)


def _shared(sizes: LinearSizes, chunk: int) -> int:
    """Bytes of a chunk's operands where its gradients are made."""
    width, columns = padded(sizes.d_qk), _columns(sizes.dtype, sizes.d_v)
    return (chunk * (2 * width + 3 * columns + 2 * chunk) + width * columns) * DTYPE_BYTES[sizes.dtype]


def _carried(sizes: LinearSizes, chunk: int, device: Device, tiles: int) -> dict[str, int]:
    """Columns of the state that a program carries: few enough that all multiprocessors have one."""
    block, width = _columns(sizes.dtype, sizes.d_v), padded(sizes.d_qk)
    rows = sizes.sequences * sizes.heads
    while block > 16 and (4 * rows * -(-sizes.d_v // block) < 3 * device.sms or width * block > 128 * 64):
        block //= 2
    while block > 16 and _stage(sizes.dtype, width, block, chunk, tiles) > device.smem_per_block:
        block //= 2
    stages = 2 if sizes.dtype == "fp32" else 3 if tiles else 6
    while stages > 1 and stages * _stage(sizes.dtype, width, block, chunk, tiles) > device.smem_per_block:
        stages -= 1
    warps = _warps(sizes.dtype, device, wide=tiles > 1 and width > 128)
    return {"CHUNK": chunk, "BLOCK": block, "num_warps": warps, "num_stages": stages}


def _stage(dtype: Dtype, width: int, block: int, chunk: int, tiles: int) -> int:
    """Bytes of one chunk's operands, and of the state as one."""
    return DTYPE_BYTES[dtype] * (chunk * ((1 + tiles) * width + 2 * block) + width * block)


def _scanned(sizes: LinearSizes, chunk: int, device: Device) -> dict[str, int]:
    """Columns of out that a program makes, of one chunk: to fetch the next meanwhile was slower."""
    width, block = padded(sizes.d_qk), _columns(sizes.dtype, sizes.d_v)
    bytes_ = DTYPE_BYTES[sizes.dtype]
    while block > 16 and bytes_ * (chunk * (2 * width + block + 2 * chunk) + width * block) > device.smem_per_block:
        block //= 2
    warps = _warps(sizes.dtype, device, wide=width > 128)
    return {"CHUNK": chunk, "BLOCK": block, "num_warps": warps, "num_stages": 1}
