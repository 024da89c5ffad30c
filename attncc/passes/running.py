"""Running sums as inputs of a core variant: cumsum(g[b, h, kv_idx]) becomes an element of the input `g_sum`.

Quadratic kernels are generated from the core. The caller sums the tensor along its tokens first, and PyTorch's autograd
propagates the gradient of the sums.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from attncc.ir import symbols as sym
from attncc.ir.graph import InputDecl, VariantGraph
from attncc.ir.outputs import Output
from attncc.ir.vocabulary import Read, cumsum


@dataclass(frozen=True)
class RunningSum:
    """The input `name` of a core variant: the sum of the user's input `of` along its dimension `axis`."""

    name: str
    of: str
    axis: int


def running_sums(graph: VariantGraph) -> tuple[RunningSum, ...]:
    """The running sums that a graph's formulas read, each once."""
    found = {(c.args[0].input, c.axis) for s in graph.stages for c in s.expr.atoms(cumsum)}
    found |= {(c.args[0].input, c.axis) for o in graph.outputs for e in _formulas(o) for c in e.atoms(cumsum)}
    taken = {d.name for d in graph.inputs} | {s.name for s in graph.scalars} | {s.name for s in graph.stages}
    sums: list[RunningSum] = []
    for of, axis in sorted(found):
        name = f"{of}_sum"
        while name in taken:
            name += "_"
        taken.add(name)
        sums.append(RunningSum(name, of, axis))
    return tuple(sums)


def without_running_sums(graph: VariantGraph) -> VariantGraph:
    """The core: the graph in which each running sum is an input, with a gradient if the summed input has one."""
    sums = running_sums(graph)
    if not sums:
        return graph
    names = {(s.of, s.axis): s.name for s in sums}

    def core(expr: Any) -> Any:
        reads = {c: c.args[0] for c in expr.atoms(cumsum)}
        names_of = {c: names[read.input, c.axis] for c, read in reads.items()}
        return expr.xreplace({c: Read(sym.input_symbol(names_of[c], False), *reads[c].index) for c in reads})

    stages = [replace(s, expr=core(s.expr)) for s in graph.stages]
    outputs = [
        replace(
            o,
            expr=core(o.expr),
            reductions=tuple(replace(r, expr=core(r.expr), when=core(r.when)) for r in o.reductions),
        )
        for o in graph.outputs
    ]
    used = {s.name for stage in stages for s in stage.expr.free_symbols}
    used |= {s.name for o in outputs for s in o.free_symbols}
    inputs = [d for d in graph.inputs if d.name in used]
    for s in sums:
        of = graph.input(s.of)
        inputs.append(InputDecl(s.name, of.pattern, "float", of.grad))
    return graph.changed(stages=stages, inputs=inputs, outputs=outputs)


def _formulas(output: Output) -> tuple[Any, ...]:
    return (output.expr, *(e for r in output.reductions for e in (r.expr, r.when)))
