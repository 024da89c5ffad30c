"""Explain a variant's linear-time form: its proof, or the factor that does not separate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from attncc.codegen.square import state_shape
from attncc.errors import UnsupportedError
from attncc.ir.graph import VariantGraph
from attncc.passes.linearize import Linear, linearize
from attncc.schedule.device import Device
from attncc.schedule.linear import LinearSizes, linear_schedule
from attncc.schedule.linear_cost import chunk_cost, crossover, quadratic_us
from attncc.schedule.problem import Dtype
from attncc.schedule.square import pairs_us, square_crossover, square_schedule, square_us

_UNITS = {
    "memory": "memory",
    "tensor": "matmuls",
    "chain": "waits of a chunk's matmuls for one another",
    "prepare": "the arithmetic of pairs by channel",
}


def linear_facts(graph: VariantGraph, sizes: Mapping[str, int], dtype: Dtype, device: Device) -> dict[str, Any]:
    """The chunk plan as plain JSON values, times in microseconds; {"none": why} where there is none."""
    try:
        plan = linearize(graph)
    except UnsupportedError as error:
        return {"none": error.reason.removeprefix("no linear-time form: ")}
    by_channel = plan.decay == "channel"
    call = LinearSizes(dtype, sizes["b"], sizes["h"], sizes["kv_idx"], sizes["d_qk"], sizes["d_v"], by_channel)
    call = replace(call, divided=plan.total, rows=int(plan.decay != "none" and not plan.alike))
    if plan.degree == 2:
        return _square_facts(plan, call, sizes, device)
    schedule, cost = linear_schedule(call, device), chunk_cost(call, device)
    return {
        "proof": list(plan.proof),
        "causal": plan.causal,
        "decay": plan.decay,
        "state": state_of(plan, sizes),
        "chunk": schedule.chunk,
        "span": schedule.span,
        "crossover": crossover(call, device),
        "us": cost.us,
        "limits": {**cost.terms, "ends": cost.ends, "least": cost.least},
        "limit": cost.limit,
        "quadratic_us": quadratic_us(call, device),
    }


def state_of(plan: Linear, sizes: Mapping[str, int]) -> list[int]:
    """The rows and columns of a head's state, float32."""
    if plan.degree == 2:
        return list(state_shape(sizes["d_qk"], sizes["d_v"]))
    return [sizes["d_qk"] + int(plan.bias is not None), sizes["d_v"] + int(plan.total)]


def _square_facts(plan: Linear, call: LinearSizes, sizes: Mapping[str, int], device: Device) -> dict[str, Any]:
    schedule = square_schedule(call, device, plan.causal)
    return {
        "proof": list(plan.proof),
        "causal": plan.causal,
        "decay": plan.decay,
        "state": state_of(plan, sizes),
        "chunk": schedule.chunk,
        "span": schedule.span,
        "crossover": square_crossover(call, device, plan.causal),
        "us": square_us(call, device, plan.causal),
        "quadratic_us": pairs_us(call, device, plan.causal),
    }


def linear_lines(found: Mapping[str, Any]) -> list[str]:
    """The facts as text."""
    if "none" in found:
        return [f"none: {found['none']}"]
    rows, cols = found["state"]
    lines = [*found["proof"], f"state: {rows} x {cols} float32 a head"]
    lines.append(
        f"chunks of {found['chunk']} tokens, segments of {found['span']}: {found['us']:.0f} us forward, predicted; all "
        f"pairs {found['quadratic_us']:.0f} us; by chunks from {found['crossover']} tokens on"
    )
    if "limits" in found:
        us = found["limits"]
        others = [f"{text} {us[name]:.0f}" for name, text in _UNITS.items() if us[name] and name != found["limit"]]
        lines.append(
            f"limited by {_UNITS[found['limit']]}, {us[found['limit']]:.0f} us; {', '.join(others)}, starts and ends "
            f"{us['ends']:.0f}; q, k, v and out moved once {us['least']:.0f}"
        )
    return lines
