"""What the bench asks of an attncc op besides calling it: the schedule that it uses, and the other candidates."""

from __future__ import annotations

from typing import Any

import torch

from attncc.runtime.operands import Operands
from attncc.runtime.shapes import bind, value_of
from attncc.schedule.candidates import candidates
from attncc.schedule.cost import predict
from attncc.schedule.device import device_of
from attncc.schedule.problem import KERNELS, Kernel, KernelSchedule, Schedule
from bench.case import Tensors

#: the kernels that a mode's time is spent in
USED: dict[str, tuple[Kernel, ...]] = {"forward": ("forward",), "backward": ("dkdv", "dq")}


def schedule_of(op: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None, **inputs: Any) -> Schedule:
    """The schedule that a call uses."""
    v = value_of(op.graph, k, v)
    bound = bind(op.graph, q, k, v, None, inputs)
    schedule: Schedule = op.engine.prepare(Operands(bound, q, k, v)).schedule
    return schedule


def tilings(schedule: Schedule, mode: str) -> dict[str, Any]:
    """What a result row says of the schedule: its origin, and the tiling of each kernel that `mode` runs."""
    return {"origin": schedule.origin, **{kernel: schedule.of(kernel).to_json() for kernel in USED[mode]}}


def limits(
    op: Any, mode: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None, **inputs: Any
) -> dict[str, Any]:
    """What the cost model says of the schedule that a call uses: for each kernel of `mode` the unit that limits it, the
    milliseconds of the whole kernel, and the share of them that each unit would be busy."""
    v = value_of(op.graph, k, v)
    bound = bind(op.graph, q, k, v, None, inputs)
    problem = op.engine.problem(bound.sizes, q.dtype, bound.scalars)
    schedule, device = op.engine.prepare(Operands(bound, q, k, v)).schedule, device_of(q.device)
    kernels = [kernel for kernel in USED[mode] if kernel == "forward" or op.engine.plan.facts.has_backward]
    apart = schedule.dkdv.backend == "triton"  # Gluon's dkdv makes dQ, too
    found: dict[str, Any] = {}
    for kernel in kernels:
        if kernel == "dq" and not apart:
            continue
        prediction = predict(kernel, schedule.of(kernel), problem, device)
        shares = {unit: round(us / prediction.us, 2) for unit, us in prediction.terms.items() if us > 0}
        found[kernel] = {"unit": prediction.limit, "ms": float(f"{prediction.us / 1e3:.4g}"), "busy": shares}
    return found


def brief(tiled: dict[str, Any]) -> str:
    """`tilings` for a table: 128x64/w8/s3, one a kernel."""
    kernels = [each for name, each in tiled.items() if name != "origin"]
    return f"{' '.join(map(tile, kernels))} {tiled['origin']}"


def tile(ks: dict[str, Any]) -> str:
    """One kernel's tiling: 16x64/w4/s4, and in how many parts the keys are dealt out."""
    parts = f"/{ks['splits']}" if "splits" in ks else ""
    gluon = "gluon:" if ks.get("backend") == "gluon" else ""
    return f"{gluon}{ks['block_m']}x{ks['block_n']}/w{ks['num_warps']}/s{ks['num_stages']}{parts}"


def every_candidate(
    op: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inputs: Tensors
) -> dict[Kernel, list[KernelSchedule]]:
    """Every candidate of each kernel for a call."""
    bound = bind(op.graph, q, k, v, None, inputs)
    problem = op.engine.problem(bound.sizes, q.dtype, bound.scalars)
    return {kernel: list(candidates(kernel, problem, device_of(q.device))) for kernel in KERNELS}
