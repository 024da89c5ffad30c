"""The roofline: a kernel's arithmetic per byte of memory, against the limits of the GPU.

A kernel does `flops` in its matmuls, over the tiles that its mask leaves, and moves `bytes` if it reads each query, and
each key that some query sees, and writes each result once. No kernel exceeds min(matmul peak, memory bandwidth * flops
/ bytes). Units other than the tensor cores set ceilings, too: the matmul rate at which that unit would be busy all the
time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from attncc.schedule.cache import Cache
from attncc.schedule.choose import schedule_key, sizes_of
from attncc.schedule.cost import predict
from attncc.schedule.decode import visited
from attncc.schedule.decode_cost import pack
from attncc.schedule.device import Device
from attncc.schedule.problem import Kernel, KernelSchedule, Problem, Schedule

#: kernels of the backward whose times are measured together
BACKWARD: tuple[Kernel, ...] = ("dkdv", "dq")


@dataclass(frozen=True)
class Work:
    """Floating-point operations of the matmuls, and bytes of memory that must move."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes


@dataclass(frozen=True)
class Point:
    """One kernel, or the backward as a whole: microseconds, TFLOP/s, TB/s, the roof above it, and the share of it that
    it reaches. `source`: "predicted" or "measured"; `ceilings`: TFLOP/s that each unit would allow by itself."""

    name: str
    source: str
    us: float
    tflops: float
    tbps: float
    intensity: float
    roof: float
    share: float
    ceilings: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return asdict(self)


def work_of(kernel: Kernel, ks: KernelSchedule, problem: Problem) -> Work:
    """The work of a kernel, with head dimensions and rows not padded."""
    rows = max(ks.block_m // pack(problem), 1) if kernel == "forward" and ks.splits else ks.block_m
    full, mixed, _ = visited(kernel, ks, problem)
    pairs = (full + mixed) * min(rows, problem.q_len) * min(ks.block_n, problem.kv_len)
    qk, v = problem.d_qk * problem.costs.similarity.dots, problem.d_v * problem.values
    depth = {
        "forward": (1 + problem.costs.sweeps) * qk + v * problem.branches,
        "dkdv": 2 * qk + 2 * v,
        "dq": 2 * qk + v,
        "pair": qk + v,
    }[kernel]
    rows_q = problem.batch * problem.heads * problem.q_len
    # keys that some query sees are read, and all have gradients; a row of them with its value is as wide as this
    seen = min(problem.costs.live(problem.q_len, ks.block_n).live * ks.block_n, problem.kv_len)
    width = problem.batch * problem.kv_heads * (problem.d_qk + (0 if problem.value_of_key else v))
    q, out, keys = rows_q * problem.d_qk, rows_q * v, seen * width
    elements = {
        "forward": q + keys + out,
        "dkdv": q + keys + problem.kv_len * width + out,
        "dq": 2 * q + keys + out,
        "pair": q + keys + out,
    }[kernel]
    return Work(2.0 * pairs * problem.batch * problem.heads * depth, float(elements * problem.dtype_bytes))


def backward_work(ks: KernelSchedule, problem: Problem) -> Work:
    """The work of the whole backward: five matmuls; q, k, v and the cotangent read, three gradients written. `ks` says
    which tiles are visited."""
    both, again = work_of("dkdv", ks, problem), work_of("pair", ks, problem)
    dq = work_of("dq", ks, problem).flops - again.flops
    gradient = problem.batch * problem.heads * problem.q_len * problem.d_qk * problem.dtype_bytes
    return Work(both.flops + dq, both.bytes + gradient)


def predicted_kernels(kernels: Iterable[Kernel], schedule: Schedule, problem: Problem, device: Device) -> list[Point]:
    """Every kernel at the cost model's time; that of Gluon's backward is one, for it makes dQ beside dK and dV."""
    apart = schedule.dkdv.backend == "triton"
    return [predicted(kernel, schedule.of(kernel), problem, device) for kernel in kernels if apart or kernel != "dq"]


def predicted(kernel: Kernel, ks: KernelSchedule, problem: Problem, device: Device) -> Point:
    """A kernel at the cost model's time."""
    found, work = predict(kernel, ks, problem, device), work_of(kernel, ks, problem)
    if kernel == "dkdv" and ks.backend == "gluon":
        work = backward_work(ks, problem)
    units = {name: work.flops / us / 1e6 for name, us in found.terms.items() if us > 0 and name != "launch"}
    return _point(kernel, "predicted", found.us, work, problem, device, units)


def measured(schedule: Schedule, problem: Problem, device: Device, cache: Cache) -> tuple[Point, ...]:
    """The measurements of a race at exactly these sizes for the schedule: the forward, and the whole backward."""
    value = cache.get(schedule_key(problem, device))
    if value is None or value.get("sizes") != sizes_of(problem):
        return ()
    times, won = value.get("us", {}), value.get("schedule", {})
    found = []
    if "forward" in times and won.get("forward") == schedule.forward.to_json():
        found.append(at_forward(times["forward"], schedule, problem, device))
    if "backward" in times and all(won.get(kernel) == schedule.of(kernel).to_json() for kernel in BACKWARD):
        found.append(at_backward(times["backward"], schedule, problem, device))
    return tuple(found)


def at_forward(us: float, schedule: Schedule, problem: Problem, device: Device) -> Point:
    """A forward that was measured."""
    return _point("forward", "measured", us, work_of("forward", schedule.forward, problem), problem, device, {})


def at_backward(us: float, schedule: Schedule, problem: Problem, device: Device) -> Point:
    """A backward that was measured as a whole."""
    return _point("backward", "measured", us, backward_work(schedule.dkdv, problem), problem, device, {})


def _point(
    name: str, source: str, us: float, work: Work, problem: Problem, device: Device, ceilings: dict[str, float]
) -> Point:
    tflops, tbps, roof = work.flops / us / 1e6, work.bytes / us / 1e6, roof_at(work.intensity, problem, device)
    peak, rate = device.matmul_tflops(problem.dtype, problem.precision), device.dram_gbps / 1e3
    share = max(tflops / peak, tbps / rate)  # that is tflops / roof, and has a meaning where a mask hides every pair
    return Point(name, source, us, tflops, tbps, work.intensity, roof, share, ceilings)


def roof_at(intensity: float, problem: Problem, device: Device) -> float:
    """TFLOP/s that no kernel of this dtype exceeds which does so many operations a byte."""
    return min(device.matmul_tflops(problem.dtype, problem.precision), intensity * device.dram_gbps / 1e3)
