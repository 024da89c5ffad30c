"""One self-contained file: kernels, launches, autograd and the chosen schedule. It needs torch and triton, and no
attncc."""

from __future__ import annotations

import re
from typing import Any

from attncc.codegen.plan import Plan
from attncc.codegen.render import environment, render
from attncc.schedule.device import Device, loads_boxes
from attncc.schedule.problem import Dtype, KernelSchedule, Schedule


def launch_meta(schedule: KernelSchedule) -> dict[str, int]:
    """A kernel's schedule in the words of a Triton launch."""
    return {
        "BLOCK_M": schedule.block_m,
        "BLOCK_N": schedule.block_n,
        "num_warps": schedule.num_warps,
        "num_stages": schedule.num_stages,
    }


def schedule_meta(schedule: Schedule) -> dict[str, dict[str, int]]:
    """Launch words for every kernel. The bands of a pair kernel are diagonals, so its tiles are square."""
    meta = {name: launch_meta(schedule.of(name)) for name in ("forward", "dkdv", "dq")}
    pair = launch_meta(schedule.pair or schedule.dq)
    side = min(pair["BLOCK_M"], pair["BLOCK_N"])
    meta["pair"] = {**pair, "BLOCK_M": side, "BLOCK_N": side}
    return meta


def standalone(plan: Plan, d_qk: int, d_v: int, schedule: Schedule, dtype: Dtype, device: Device) -> str:
    """The file's text. It exports `attention(q, k, v, *, <inputs>, scale=None, return_lse=False)`."""
    graph = plan.graph
    backward = plan.has_backward is None
    tma = backward and loads_boxes(device, dtype, d_qk, d_v)
    context: dict[str, Any] = {
        "graph": graph,
        "d_qk": d_qk,
        "d_v": d_v,
        "where": f"Chosen for {device.title}, {dtype} ({schedule.origin}).",
        "schedule": schedule_meta(schedule),
        "stored_names": repr(tuple(name for name, _ in plan.stored)),
        "saved_names": repr(plan.saved_names if backward else ()),
        "has_lse": plan.has_lse,
        "backward": backward,
        "refusal": str(plan.has_backward or ""),
        "grad_names": repr(tuple(d.name if d.grad else None for d in graph.inputs)),
        "parameters": "".join(f"{d.name}, " for d in graph.inputs)
        + "".join(f"{s.name}={s.default!r}, " for s in graph.scalars),
        "number_names": "".join(f"{s.name}, " for s in graph.scalars),
        "input_names": ", ".join(d.name for d in graph.inputs),
        "title": graph.name,
        "tma": tma,
    }
    text = environment().get_template("standalone.py.j2").render(context)
    text = re.sub(r"\n{3,}(?= )", "\n\n", text)
    return render(plan, d_qk, d_v, backward, tma) + "\n\n" + text.strip("\n") + "\n"
