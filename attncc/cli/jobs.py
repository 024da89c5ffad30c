"""The measurements that `tune` and `bench` are asked for: each SPEC at each shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attncc.cli import sizes as written
from attncc.cli.options import scalars
from attncc.cli.spec import named, resolve
from attncc.errors import InputError

if TYPE_CHECKING:
    from attncc.ir.graph import VariantGraph
    from attncc.runtime.samples import Shape

Specs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SPEC...", help="Shipped names, spec.toml files, spec.py:name (executed).", show_default=False
    ),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help='Shapes, separated by commas: "B4 H32/8 M1 N65536 D128, B1 H16 M8192 D64".',
        show_default=False,
    ),
]
Against = Annotated[bool, typer.Option("--against", help="Also time PyTorch's own attention.")]


@dataclass(frozen=True)
class Job:
    """One variant at one size: `values` of its scalars, and `sizes` by their names in a formula (q_idx queries, kv_idx
    keys, b sequences, ...)."""

    graph: VariantGraph
    values: dict[str, int | float]
    sizes: dict[str, int]

    @property
    def shape(self) -> Shape:
        """The sizes as the shape of sample tensors."""
        from attncc.runtime.samples import Shape

        s, graph = self.sizes, self.graph
        d_qk = s["d_qk"] // graph.branches - (graph.value or 0)
        return Shape(s["b"], s["h"], s["h_kv"], s["q_idx"], s["kv_idx"], d_qk, s["d_v"])


def jobs(
    specs: Sequence[str] | None,
    inline: Sequence[str | None],
    shapes: Sequence[str] | None,
    settings: Sequence[str] | None,
    given: Sequence[int | None],
) -> list[Job]:
    """Every spec at every shape. `inline`: the formulas given instead of a spec; `given`: queries, keys, sequences,
    heads, key heads, head dimensions of q and v, for what shapes leave out. InputError, SpecError for what is wrong."""
    from attncc.runtime.explain import sizes_of

    if specs is not None and len(specs) > 1 and not any(inline):
        graphs = [named(spec).graph for spec in specs]
    elif specs is not None and len(specs) > 1:
        raise InputError("formulas on the command line are one spec", remedy="give either them or SPECs")
    else:
        graphs = [resolve(specs[0] if specs else None, *inline).graph]
    values = [scalars(graph, settings) for graph in graphs]
    arguments: Any = given
    defaults = sizes_of(*arguments)
    cells = written.shapes(shapes, defaults) if shapes else [defaults]
    if not cells:
        raise InputError("--shapes names no shape")
    found = []
    for graph, numbers in zip(graphs, values, strict=True):
        for c in cells:
            sizes = sizes_of(c["q_idx"], c["kv_idx"], c["b"], c["h"], c["h_kv"], c["d_qk"], c["d_v"], graph)
            found.append(Job(graph, numbers, sizes))
    return found
