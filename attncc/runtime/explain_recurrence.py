"""Explain a recurrence: its formulas, its family with the proof, and how calls are cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attncc.errors import InputError
from attncc.ir.formulas import stage_texts
from attncc.ir.graph import VariantGraph
from attncc.passes.recur import Delta, recur
from attncc.schedule.delta import delta_schedule
from attncc.schedule.device import Device
from attncc.schedule.linear import LinearSchedule, LinearSizes, linear_schedule
from attncc.schedule.problem import Dtype


def recurrence_facts(graph: VariantGraph, sizes: Mapping[str, int], dtype: Dtype, device: Device) -> dict[str, Any]:
    """Everything as plain JSON values. UnsupportedError for a recurrence of no family."""
    plan = recur(graph)
    schedule = schedule_of(graph, sizes, dtype, device)
    return {
        "name": graph.name,
        "digest": graph.digest,
        "device": {"name": device.name, "title": device.title, "target": device.target},
        "sizes": dict(sizes),
        "dtype": dtype,
        "stages": stage_texts(graph),
        "family": "rank one" if isinstance(plan, Delta) else "diagonal",
        "proof": list(plan.proof),
        "state": [sizes["d_qk"], sizes["d_v"]],
        "chunk": schedule.chunk,
        "span": schedule.span,
        "kernels": {name: dict(meta) for name, meta in schedule.kernels.items()},
        "gradients": ["q", "k", "v", "initial_state", *(d.name for d in graph.inputs if d.grad)],
    }


def schedule_of(graph: VariantGraph, sizes: Mapping[str, int], dtype: Dtype, device: Device) -> LinearSchedule:
    """How a call of these sizes is cut. UnsupportedError for a recurrence of no family."""
    plan = recur(graph)
    by_channel = not isinstance(plan, Delta) and plan.decay == "channel"
    call = LinearSizes(dtype, sizes["b"], sizes["h"], sizes["kv_idx"], sizes["d_qk"], sizes["d_v"], by_channel)
    return (delta_schedule if isinstance(plan, Delta) else linear_schedule)(call, device)


def recurrence_text(found: Mapping[str, Any]) -> str:
    """The facts as text."""
    s, device = found["sizes"], found["device"]
    call = f"B={s['b']} H={s['h']} N={s['kv_idx']} D={s['d_qk']}/{s['d_v']} {found['dtype']}"
    rows, cols = found["state"]
    sections = [
        ("formula", [f"{stage:<5} = {text}" for stage, text in found["stages"].items()]),
        (f"a recurrence whose state is multiplied by a matrix that is {found['family']}, because", found["proof"]),
        (
            "plans",
            [
                f"state: {rows} x {cols} float32 a head, in and out",
                f"chunks of {found['chunk']} tokens, segments of {found['span']}; token after token for a few of them",
                f"gradients of {', '.join(found['gradients'])}",
            ],
        ),
        ("tiles", [f"{kernel}: {tiles_of(meta)}" for kernel, meta in found["kernels"].items()]),
    ]
    texts = ["\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections]
    head = f"{found['name']}  {call}  on {device['title']} ({device['target']})"
    return "\n\n".join([head, *texts])


def tiles_of(meta: Mapping[str, int]) -> str:
    """A kernel's sizes as text: "chunk 64, block 32, 4 warps, 1 stage"."""
    counted = {"num_warps": "warp", "num_stages": "stage", "maxnreg": "register"}
    words = (
        f"{size} {counted[key]}{'s' * (size > 1)}" if key in counted else f"{key.lower()} {size}"
        for key, size in meta.items()
    )
    return ", ".join(words)


def explain(
    graph: VariantGraph,
    q_len: int = 8192,
    kv_len: int | None = None,
    batch: int = 1,
    heads: int = 16,
    kv_heads: int | None = None,
    d_qk: int = 128,
    d_v: int | None = None,
    dtype: Dtype = "bf16",
    target: str | None = None,
) -> str:
    """The facts as text, of a call of these sizes on `target`. InputError where keys are not the queries' tokens."""
    from attncc.runtime.explain import explained_device, sizes_of

    if kv_len not in (None, q_len):
        raise InputError(f"a recurrence has keys of the queries' {q_len} tokens, not {kv_len} others")
    sizes = sizes_of(q_len, kv_len, batch, heads, kv_heads, d_qk, d_v)
    return recurrence_text(recurrence_facts(graph, sizes, dtype, explained_device(target)))
