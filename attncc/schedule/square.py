"""How a call of degree 2 is cut, and when it pays: Dqk^2 features per token against N pairs.

Only the resources of these kernels are known, from cross-compilation; nothing has been timed on a GPU yet.
"""

from __future__ import annotations

from attncc.errors import InputError
from attncc.schedule.device import Device
from attncc.schedule.linear import LinearSchedule, LinearSizes, PlanName
from attncc.schedule.model import model
from attncc.schedule.problem import DTYPE_BYTES

#: the largest head dimension: a state of 129 x 129 x 128 values is 8 MiB a head
LARGEST = 128
#: tokens that a segment has at least, so that its state costs less than they do
SEGMENT = 512


def padded(dim: int) -> int:
    """The power of two, at least what a matmul takes, that holds all columns."""
    return max(16, 1 << (dim - 1).bit_length())


def square_schedule(
    sizes: LinearSizes, device: Device, causal: bool = True, chunk: int | None = None
) -> LinearSchedule:
    """Tokens a tile, tokens a segment, and each kernel's constants. InputError for a chunk that is no tile.

    A causal segment has about Dqk^2 / 2 tokens: then what it stores is as large as its share of k and v in float32,
    times 2, and its pairs cost less than its features. Where every key is seen it has no pairs.
    """
    if chunk not in (None, 16, 32, 64, 128):
        raise InputError(f"chunk_size is {chunk!r}", remedy="one of 16, 32, 64, 128")
    if chunk is None:
        chunk = 64 if sizes.dtype != "fp32" else 32
        while chunk > 16 and chunk >= 2 * sizes.length:
            chunk //= 2
    span = chunk * max(1, max(SEGMENT, sizes.d_qk**2 // 2 if causal else 4 * sizes.d_qk**2) // chunk)
    span = min(span, chunk * max(1, -(-sizes.length // chunk)))
    wide_qk, wide_v = padded(sizes.d_qk), padded(sizes.d_v)
    block = min(wide_v, 128 if sizes.dtype != "fp32" else 64)
    while block > 16 and not device.is_interpreter and _shared(sizes, chunk, block) > device.smem_per_block:
        block //= 2
    large = 64 * 128 if sizes.dtype != "fp32" else 32 * 64
    warps = 4 if wide_qk * max(block, chunk) <= large else 8
    tile = {"CHUNK": chunk, "num_warps": warps, "num_stages": 2 if sizes.dtype != "fp32" else 1}
    kernels = {name: {**tile, "BLOCK": block} for name in ("slices", "lines", "apply")}
    kernels["slope"] = {**tile, "num_warps": 8 if warps == 8 or wide_v > 64 else 4, "num_stages": 1}
    kernels["step"] = {"BLOCK": min(padded(sizes.d_v + 1), max(16, 4096 // wide_qk)), "num_warps": 4}
    return LinearSchedule(chunk, span, kernels)


def _shared(sizes: LinearSizes, chunk: int, block: int) -> int:
    """Bytes of shared memory of `apply`: x, its slice, the state's and the pairs as operands, and tiles of z and y."""
    wide, bytes_ = padded(sizes.d_qk), DTYPE_BYTES[sizes.dtype]
    return (2 * chunk * wide + wide * block + chunk * chunk + 2 * chunk * (wide + block)) * bytes_


def choose_square(sizes: LinearSizes, device: Device, causal: bool) -> PlanName:
    """ "parallel", "chunk" or "recurrent": whichever the model takes to be the fastest."""
    if sizes.d_qk > LARGEST or sizes.d_v > LARGEST:
        return "parallel"
    if causal and sizes.length == 1:
        return "recurrent"
    times: dict[PlanName, float] = {
        "parallel": pairs_us(sizes, device, causal),
        "chunk": square_us(sizes, device, causal),
    }
    return min(times, key=lambda name: times[name])


def pairs_us(sizes: LinearSizes, device: Device, causal: bool) -> float:
    """The forward over all pairs, half of them where the mask is causal."""
    pairs = sizes.sequences * sizes.heads * sizes.length * sizes.length / (2 if causal else 1)
    flops = 2.0 * pairs * (sizes.d_qk + sizes.d_v)
    return device.launch_us + flops / (model().linear.square_rate * 1e6 * device.matmul_tflops(sizes.dtype, "ieee"))


def square_us(sizes: LinearSizes, device: Device, causal: bool) -> float:
    """The forward by features: each token's are summed up, and read; the pairs of its segment where that is causal."""
    span = square_schedule(sizes, device, causal).span
    tokens = sizes.sequences * sizes.heads * sizes.length
    features = (sizes.d_qk * sizes.d_qk + sizes.d_qk + 1) * (sizes.d_v + 1)
    flops = 2.0 * tokens * (2 * features + (span / 2 * (sizes.d_qk + sizes.d_v) if causal else 0))
    stored = -(-sizes.length // span) * sizes.sequences * sizes.heads * features * 4
    compute = flops / (model().linear.square_rate * 1e6 * device.matmul_tflops(sizes.dtype, "ieee"))
    return 4 * device.launch_us + compute + 4 * stored / (1e3 * device.dram_gbps)


def square_crossover(sizes: LinearSizes, device: Device, causal: bool) -> int:
    """The length from which the model takes features to be faster than all pairs, in steps of 64 tokens."""
    lo, hi = 1, 1 << 14
    while lo < hi:
        at = (lo + hi) // 2
        there = LinearSizes(sizes.dtype, sizes.sequences, sizes.heads, 64 * at, sizes.d_qk, sizes.d_v)
        if square_us(there, device, causal) < pairs_us(there, device, causal):
            hi = at
        else:
            lo = at + 1
    return 64 * lo
