"""Explain which pass computes each auxiliary output, and what its gradient costs per pair."""

from __future__ import annotations

from typing import Any

from attncc.codegen.outputs import loop_of
from attncc.ir.graph import VariantGraph
from attncc.ir.outputs import Output
from attncc.ir.text import formula, output_text
from attncc.passes.cotangents import differentiable_outputs, terms
from attncc.passes.outputs import final_weight, named, passes

_LOOPS = {
    "by_query": "a light pass over the keys of each block of queries",
    "by_key": "a light pass over the queries of each block of keys",
    "by_offset": "a light pass along each band of diagonals",
}


def output_facts(graph: VariantGraph) -> dict[str, dict[str, Any]]:
    """For each output: its formula and dimensions, the pass, and the terms of its gradient, or why it has none."""
    if not graph.outputs:
        return {}
    rows = ", ".join(symbol.name for symbol, _ in final_weight(graph).rows)
    light = {light.domain: light for light in passes(graph)}
    refusals = differentiable_outputs(graph)
    found = {}
    for output in graph.outputs:
        known = f", given {rows}" if light[output.domain].uses_weight and rows else ""
        found[output.name] = {
            "formula": output_text(output),
            "dims": ["b", "h", *output.domain.dims],
            "type": output.type,
            "pass": f"{_LOOPS[loop_of(output.domain)]}{known}",
            "gradient": _gradient(graph, output, refusals),
        }
    return found


def _gradient(graph: VariantGraph, output: Output, refusals: dict[str, Any]) -> dict[str, str]:
    if output.name not in refusals:
        return {"none": "an integer has none"}
    if refusals[output.name] is not None:
        return {"none": refusals[output.name].reason}
    given = tuple(entry.name for entry in named((output,)) if not entry.reduction.is_int)
    added = terms(graph, given)
    pairs = {"dweight": added.of_weight, "dscore": added.of_score}
    pairs |= {f"d{formula(read)}": expr for read, expr in added.of_reads}
    return {name: formula(expr) for name, expr in pairs.items() if expr != 0}


def output_lines(found: dict[str, dict[str, Any]]) -> list[str]:
    """The facts as text."""
    lines = []
    for name, entry in found.items():
        lines.append(f"{name}[{', '.join(entry['dims'])}] = {entry['formula']}")
        lines.append(f"    {entry['pass']}")
        for of, added in entry["gradient"].items():
            lines.append(f"    no gradient: {added}" if of == "none" else f"    backward: {of} += {added}")
    return lines
