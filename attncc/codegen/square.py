"""Weights of degree 2: from a plan and head dimensions to the source of a module, with features [1, x, x (x) x].

The state has a row for each of the 1 + Dqk + Dqk^2 features, too many for one program. It consists of slices, one per
m, of the Dqk features x_m x. A program has one slice of a segment's state, or all slices for a tile of tokens:

    slice_m += sum_t (x_m x)_t y_t'                  out_t = sum over the pairs of the segment + sum_m (x_m x)_t slice_m

The features exist only in registers. Only the states between segments are stored, which is O(N) if segments have Dqk^2
tokens. The kernels know only three numbers of the variant, and take x and y to be queries and keys in turn.
"""

from __future__ import annotations

from typing import Any

from attncc.codegen.chunk_module import header
from attncc.codegen.render import environment, tidy
from attncc.ir.graph import VariantGraph
from attncc.passes.linearize import Linear
from attncc.schedule.square import padded


def state_shape(d_qk: int, d_v: int) -> tuple[int, int]:
    """Features x_m x_n in the order of m, then x, then 1; values, then the value 1."""
    return d_qk * d_qk + d_qk + 1, d_v + 1


def render_square(graph: VariantGraph, plan: Linear, d_qk: int, d_v: int) -> str:
    """The module's source. Sizes and schedules are arguments of its functions."""
    context: dict[str, Any] = {
        "d_qk": d_qk,
        "d_v": d_v,
        "width_qk": padded(d_qk),
        "width_v": padded(d_v),
        "tma": False,
        "helpers": set(),
        "plan": plan,
        "channel": False,
    }
    names = ["helpers", "square", "linear_link", "square_step", "square_host"]
    if plan.total or plan.gain != 1:
        names.insert(-1, "linear_delta")
    parts = [environment().get_template(f"{name}.py.j2").render(context) for name in names]
    parts.insert(0, header(graph, "Attention in linear time for", "linear form", plan.proof, d_qk, d_v))
    return tidy("\n\n\n".join(p.strip("\n") for p in parts) + "\n")
