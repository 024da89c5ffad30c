"""`attncc list`: the variants that ship."""

from __future__ import annotations

import sys
from typing import Any

from rich.table import Table
from rich.text import Text

from attncc.cli.options import Json
from attncc.cli.output import out, print_json


def command(json: Json = False) -> None:
    """List the variants that ship: name, what it is, where it differs from plain attention, and its source.

    Examples
      attncc list
      attncc list --json
    """
    from attncc import variants

    entries = [_entry(name) for name in variants.names()]
    if json:
        print_json(entries)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for column in ("name", "what it is", "formula", "source"):
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for entry in entries:
        formulas = "\n".join(f"{stage}: {text}" for stage, text in entry["stages"].items())
        table.add_row(Text(entry["name"], style="bold"), *(Text(t) for t in (entry["title"], formulas, entry["cites"])))
    out.print(table)


def _entry(name: str) -> dict[str, Any]:
    from attncc import variants
    from attncc.ir.formulas import own_stages

    graph = variants.get(name).graph
    documentation = sys.modules[f"attncc.variants.{name}"].__doc__ or ""
    return {
        "name": name,
        "title": " ".join(documentation.partition("\n\n")[0].split()),
        "stages": own_stages(graph),
        "inputs": {d.name: list(d.pattern) for d in graph.inputs},
        "scalars": {s.name: s.default for s in graph.scalars},
        "cites": graph.cites,
        "digest": graph.digest,
    }
