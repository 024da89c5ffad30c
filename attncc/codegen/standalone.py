"""Write one self-contained file: kernels, launches, autograd and the chosen schedule. It needs torch and
triton only."""

from __future__ import annotations

import re
from typing import Any

from attncc.codegen.launch import schedule_meta
from attncc.codegen.names import coded
from attncc.codegen.plan import Plan
from attncc.codegen.render import environment, render
from attncc.errors import UnsupportedError
from attncc.schedule.device import Device, loads_boxes
from attncc.schedule.problem import Dtype, Schedule

#: names that the exported function uses for values of its own
_LOCAL = frozenset({"q", "k", "v", "scale", "return_lse", "results", "sizes"})


def standalone(
    plan: Plan, d_qk: int, d_v: int, schedule: Schedule, dtype: Dtype, device: Device, deals: bool = False
) -> str:
    """The file's text. It exports `attention(q, k, v, *, <inputs>, scale=None, return_lse=False)`."""
    if plan.made:
        raise UnsupportedError(
            f"'{plan.graph.name}' needs {plan.made[0].name}, which another op makes: it is no single file",
            remedy="use attncc.compile, or hand that input over from an op of its own",
        )
    written, users = coded(plan)
    graph = written.graph
    # the exported function's parameters have the user's names, which may differ from those in the kernels
    named = {name: name if own in _LOCAL else own for name, own in users.items()}
    backward = plan.has_backward is None
    tma = backward and not plan.similarity.loops and loads_boxes(device, dtype, d_qk, d_v, graph.branches, graph.value)
    hopper_backward = backward and schedule.dkdv.backend == "gluon"
    context: dict[str, Any] = {
        "graph": graph,
        "d_qk": d_qk,
        "d_v": d_v,
        "where": f"Chosen for {device.title}, {dtype} ({schedule.origin}).",
        "schedule": schedule_meta(schedule, device, d_qk, d_v),
        "stored_names": repr(plan.results),
        "saved_names": repr(plan.saved if backward else ()),
        "has_lse": plan.has_lse,
        "backward": backward,
        "hopper": schedule.forward.backend == "gluon",
        "hopper_backward": hopper_backward,
        "refusal": str(plan.has_backward or ""),
        "grad_names": repr(tuple(users[d.name] if d.grad else None for d in graph.inputs)),
        "named": named,
        "parameters": "".join(f"{named[d.name]}, " for d in graph.inputs)
        + "".join(f"{named[s.name]}={s.default!r}, " for s in graph.scalars),
        "number_names": "".join(f"{named[s.name]}, " for s in graph.scalars),
        "input_names": ", ".join(named[d.name] for d in graph.inputs),
        "title": graph.name,
        "tma": tma,
    }
    text = environment().get_template("standalone.py.j2").render(context)
    text = re.sub(r"\n{3,}(?= )", "\n\n", text)
    kv = schedule.dkdv
    forward = schedule.forward.form
    options = "scale=None, return_lse=False" if plan.has_lse else "scale=None"
    called = f"attention(q, k{'' if graph.value else ', v'}, *, {context['parameters']}{options})"
    able = "It is differentiable, and needs" if backward else "It needs"
    about = f"Call `{called}`,\nat the end of this file. {able} torch and triton alone."
    kernels = render(
        *(plan, d_qk, d_v, backward, tma, forward),
        backward_in=kv.backend,
        strips=kv.strips,
        deals=deals,
        about=about,
    )
    return kernels + "\n\n" + text.strip("\n") + "\n"
