"""The IR of a hybrid: several variants over the same q, k and v, and how their output rows are combined.

hybrid  := name, (part name, graph)+, combine
combine := a graph of declarations and the one stage out = combine(expr), over the names of the parts, each one
           element of that part's output row, and inputs indexed by b, h, h_kv and q_idx as they stand
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import sympy

from attncc.ir.graph import InputDecl, ScalarDecl, VariantGraph
from attncc.ir.text import to_text


@dataclass(frozen=True)
class HybridGraph:
    """Several variants and the combination of their output rows. An input or scalar that several declare is one."""

    name: str
    parts: tuple[tuple[str, VariantGraph], ...]
    combine: VariantGraph
    cites: str = ""

    @property
    def graphs(self) -> tuple[VariantGraph, ...]:
        """The graphs of the parts, then that of their combination."""
        return (*(graph for _, graph in self.parts), self.combine)

    @property
    def inputs(self) -> tuple[InputDecl, ...]:
        """Every input of a call, each once, by name."""
        found = {d.name: d for graph in self.graphs for d in graph.inputs}
        return tuple(found[name] for name in sorted(found))

    @property
    def scalars(self) -> tuple[ScalarDecl, ...]:
        """Every scalar of a call, each once, by name."""
        found = {s.name: s for graph in self.graphs for s in graph.scalars}
        return tuple(found[name] for name in sorted(found))

    @property
    def has_scale(self) -> bool:
        """Whether any part uses `scale`."""
        return any(graph.has_scale for _, graph in self.parts)

    @property
    def expr(self) -> sympy.Expr:
        """An element of the output, as an expression over the names of the parts."""
        return self.combine["out"].expr

    @property
    def digest(self) -> str:
        """Identifies the mathematics, whatever the hybrid is called."""
        return hashlib.sha256(self.text(header=False).encode()).hexdigest()[:16]

    def text(self, header: bool = True) -> str:
        """The parts and their combination as text, each in the form of `to_text`."""
        lines = [f'hybrid "{self.name}"  # digest {self.digest}'] if header else []
        for name, graph in self.parts:
            lines += [f"part {name}", to_text(graph, header=False)]
        return "\n".join([*lines, "combine", to_text(self.combine, header=False)])
