"""The gallery entry of a variant: its formulas, the derived facts, and a picture of its weights."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor

from attncc import variants
from attncc.cli.draw import mask_and_weights
from attncc.codegen.plan import Plan
from attncc.codegen.render import render
from attncc.errors import UnsupportedError
from attncc.ir.formulas import own_stages
from attncc.ir.graph import VariantGraph
from attncc.passes.linearize import linearize
from attncc.passes.phases import phases
from attncc.runtime.recurrence import RecurrenceOp

#: queries and keys of a picture; a character stands for two queries and a key, which is about square
LENGTH = 32
_POSITIVE, _NEGATIVE, _HIDDEN = " ░▒▓█", " -~=≡", "·"
#: sizes of the rendered module whose kernels are counted
_HEAD_DIM = 64


def entry(name: str) -> dict[str, Any]:
    """One variant's entry: strings, numbers, and lists and dicts of them."""
    graph = variants.get(name).graph
    title, details = variants.about(name)
    return {
        "name": name,
        "family": variants.family(name),
        "title": title,
        "details": details,
        "cites": graph.cites,
        "stages": own_stages(graph),
        "inputs": {d.name: list(d.pattern) for d in graph.inputs},
        "scalars": {s.name: s.default for s in graph.scalars},
        "digest": graph.digest,
        **(_of_tokens(graph) if graph.recurrent else _of_pairs(graph)),
        "spec": spec(name),
    }


def _of_pairs(graph: VariantGraph) -> dict[str, Any]:
    """The derived facts of a variant over pairs."""
    found = phases(graph)
    plan = Plan(found.main)
    return {
        "passes": max(part.online.passes for part in plan.parts),
        "kernels": kernels(plan),
        "before": len(found.made),
        "gradients": gradients(graph, plan),
        "linear": is_linear(graph),
        "picture": picture(graph),
    }


def _of_tokens(graph: VariantGraph) -> dict[str, Any]:
    """And of a recurrence: its keys are never passed over, and it has no weights to draw."""
    text = RecurrenceOp(graph).source(_HEAD_DIM)
    found = _kernel_names(text)
    given = [d.name for d in graph.inputs if d.grad]
    return {
        "passes": 0,
        "kernels": found,
        "before": 0,
        "gradients": ["q", "k", "v", "initial_state", *given],
        "linear": True,
        "picture": [],
    }


def kernels(plan: Plan) -> list[str]:
    """The kernels of a generated module, in the order of its text."""
    return _kernel_names(render(plan, _HEAD_DIM, _HEAD_DIM, plan.has_backward is None))


def _kernel_names(text: str) -> list[str]:
    return re.findall(r"^def (\w+)_kernel\(", text, flags=re.MULTILINE)


def gradients(graph: VariantGraph, plan: Plan) -> list[str]:
    """The tensors that receive a gradient; empty if there is no backward."""
    if plan.has_backward is not None:
        return []
    return ["q", "k", *(["v"] if graph.value is None else []), *(d.name for d in graph.inputs if d.grad)]


def is_linear(graph: VariantGraph) -> bool:
    """Whether it has an O(N) form."""
    try:
        linearize(graph)
    except UnsupportedError:
        return False
    return True


def picture(graph: VariantGraph) -> list[str]:
    """The weights of the first head for random q and k: darker is larger, `·` is hidden, `-~=≡` are negative."""
    mask, weights = mask_and_weights(graph, LENGTH, LENGTH, 0, 2, {})
    largest = float(weights.abs().max()) or 1.0
    lines = []
    for row in range(0, LENGTH, 2):
        shown, pair = mask[row : row + 2], weights[row : row + 2]
        lines.append("".join(_character(shown[:, j], pair[:, j] / largest) for j in range(LENGTH)))
    return lines


def _character(shown: Tensor, weights: Tensor) -> str:
    if not shown.any():
        return _HIDDEN
    weight = float(weights[int(torch.argmax(weights.abs()))])
    level = min(int(abs(weight) ** 0.5 * 5), 4)
    return (_NEGATIVE if weight < 0 else _POSITIVE)[level]


def spec(name: str) -> str:
    """The lines that define a variant: its file behind the documentation."""
    text = inspect.getsource(sys.modules[f"attncc.variants.{name}"])
    behind = text.splitlines()[ast.parse(text).body[0].end_lineno or 0 :]
    return "\n".join(behind).strip()
