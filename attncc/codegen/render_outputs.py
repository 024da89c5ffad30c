"""Render the module of light passes that compute the auxiliary outputs requested by one kind of call."""

from __future__ import annotations

import textwrap
from typing import Any

from attncc.codegen.assembly import bounds_of
from attncc.codegen.chunks import chunks
from attncc.codegen.hopper_outputs import hopper_pass_slots, in_warps
from attncc.codegen.indices import input_arguments
from attncc.codegen.names import coded
from attncc.codegen.outputs import loop_of, pass_slots
from attncc.codegen.plan import Plan
from attncc.codegen.render import any_wide, render_template, staging, tidy, widths
from attncc.codegen.statements import in_gluon
from attncc.errors import UnsupportedError
from attncc.ir.text import formula, to_text
from attncc.passes.outputs import Weight, final_weight, named, passes
from attncc.version import __version__

_FILL = {"sum": "0", "count": "0", "max": 'float("-inf")', "argmax": "-1"}


def saved_rows(plan: Plan, weight: Weight) -> tuple[str, ...]:
    """The stored rows that the passes of a graph's outputs read."""
    used = any(light.uses_weight for light in passes(plan.graph))
    return tuple(symbol.name for symbol, _ in weight.rows) if used else ()


def render_outputs(plan: Plan, d_qk: int, hopper: bool = False) -> str:
    """The module's source. Its `outputs` returns the reductions of the graph's outputs, in the order of `named`.

    hopper: passes for which Gluon has a kernel use it."""
    if not (plan.graph.has_dot and plan.core is plan.graph):
        raise UnsupportedError(
            f"'{plan.graph.name}' has a similarity of its own, for which auxiliary outputs are not generated yet",
            stage="similarity",
            span=plan.graph["raw_score"].span,
            remedy="ask the reference for them: ac.reference(variant, q, k, v, outputs=...)",
        )
    plan, _ = coded(plan)
    weight = final_weight(plan.graph)
    context = _context(plan, d_qk)
    units = [
        (hopper_pass_slots if hopper and in_warps(plan, light) else pass_slots)(plan, light, weight, i)
        for i, light in enumerate(passes(plan.graph))
    ]
    context["hopper"] = any(u["in_warps"] for u in units)
    bounds: list[dict[str, Any]] = []
    helpers: set[str] = set()
    for u in units:
        helpers |= u["helpers"]
        if u["domain"].kind == "pair":
            u["rows"] = ":".join("" if end is None else str(end) for end in u["domain"].args)
        if u["bounds"] is not None:
            bounds += bounds_of(plan, u["name"], u["tile"], u["bounds"])
        for r in u["reductions"]:
            r.update(torch="int64" if r["is_int"] else "float32", fill=_FILL[r["op"]])
    kernels: list[tuple[str, dict[str, Any]]] = []
    for b in bounds:
        for s in b["summaries"]:
            helpers |= s["slots"]["helpers"]
            kernels.append(("summary.py.j2", {"u": s["slots"], "name": f"{s['name']}_kernel"}))
        kernels.append(("bounds.py.j2", {"u": b["slots"], "name": f"{b['name']}_kernel"}))
    for u in units:
        template = f"outputs_{loop_of(u['domain'])}.py.j2"
        kernels.append((f"hopper_{template}" if u["in_warps"] else template, {"u": u, "f": u}))
    order = [entry.name for entry in named(plan.graph.outputs)]
    parts = [_header(plan, d_qk), render_template("helpers.py.j2", context, helpers=helpers)]
    if context["hopper"]:
        parts[0] += "\n" + render_template("gluon_compat.py.j2", context)
        parts.append(render_template("gluon_helpers.py.j2", context))
        own = set().union(*(u["helpers"] for u in units if u["in_warps"]))
        parts.append(in_gluon(render_template("helpers.py.j2", context, helpers=own)))
    parts += [render_template(name, context, **slots) for name, slots in kernels]
    host = {
        "bounds": bounds,
        "units": units,
        "order": order,
        "saved": saved_rows(plan, weight),
        "kinds": {u["domain"].kind for u in units},
        "names": [o.name for o in plan.graph.outputs],
    }
    parts.append(render_template("outputs_host.py.j2", context, **host))
    return tidy("\n\n\n".join(p.strip("\n") for p in parts) + "\n")


def _context(plan: Plan, d_qk: int) -> dict[str, Any]:
    """The variables of every template of the module."""
    graph = plan.graph
    names = [*(d.name for d in graph.inputs), *(s.name for s in graph.scalars)]
    return {
        "graph": graph,
        "tma": False,
        "staging": staging(plan),
        "hopper_backward": False,
        "d_qk": d_qk,
        "qk_chunks": chunks(d_qk),
        "widths_qk": widths(chunks(d_qk)),
        "value_of_key": False,
        "scalar_names": "".join(f', "{s.name}"' for s in graph.scalars),
        "call_params": "".join(f"{name}, " for name in names),
        "call_args": "".join(f"{name}, " for name in names),
        "input_args": input_arguments(graph),
        "wide": any_wide(graph),
        "user_args": input_arguments(graph),
        "user_wide": any_wide(graph),
        "takes_inputs": bool(graph.inputs),
        "text": {k: formula(graph[k].expr) for k in ("score", "mask", "weight")},
    }


def _header(plan: Plan, d_qk: int) -> str:
    body = textwrap.indent(to_text(plan.graph), "    ")
    quotes = '"""'
    return (
        f"{quotes}Auxiliary outputs of '{plan.graph.name}', head dimension {d_qk}. "
        f"Generated by attncc {__version__}.\n\n{body}\n{quotes}\n\n"
        "import torch\nimport triton\nimport triton.language as tl"
    )
