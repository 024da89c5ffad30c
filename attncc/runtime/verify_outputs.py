"""Additional rules for checking auxiliary outputs against the reference.

A count must be exact. A position may differ from the reference's if two values are as close as rounding: then the exact
value at the position that was found must match the largest, by the same rules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attncc.ir.graph import VariantGraph
from attncc.ir.outputs import Domain, Output, cell_symbol


def compared(
    graph: VariantGraph,
    reference: Callable[[VariantGraph, str], Any],
    got: dict[str, Tensor],
    *others: dict[str, Tensor],
) -> list[dict[str, Tensor]]:
    """Results with positions replaced by the exact values there; `reference(graph, name)` is an output in float64."""
    results = [dict(got), *(dict(other) for other in others)]
    for output in graph.outputs:
        if output.name not in got or not output.expr.is_Symbol or output.reductions[0].op != "argmax":
            continue
        values = reference(graph.changed(outputs=[_values(output)]), output.name)
        axis = 3 if output.domain.kind == "row" else 2
        for result in results:
            result[output.name] = _at(values, result[output.name], axis)
    return results


def _values(output: Output) -> Output:
    """The map of what a position is of: -inf where a pair is hidden."""
    symbol = cell_symbol("max", 0)
    reduction = replace(output.reductions[0], symbol=symbol, op="max")
    return Output(output.name, Domain("pair", (None, None)), (reduction,), symbol)


def _at(values: Tensor, place: Tensor, axis: int) -> Tensor:
    """The values at the places along an axis, -inf where the place is -1."""
    if not values.shape[axis]:
        return torch.where(place == -1, -torch.inf, torch.nan)
    found = values.gather(axis, place.clamp_min(0).unsqueeze(axis)).squeeze(axis)
    return torch.where(place == -1, -torch.inf, found)
