"""`attncc list`: the shelf."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from attncc.cli.options import Json
from attncc.cli.output import out, print_json


def command(
    mechanisms: Annotated[
        bool, typer.Option("--mechanisms", help="List published mechanisms instead, and what answers each.")
    ] = False,
    json: Json = False,
) -> None:
    """List the variants that ship: formula, passes over the keys, kernels, what has a gradient, source.

    Examples
      attncc list
      attncc list --mechanisms
      attncc list --json
    """
    if mechanisms:
        _mechanisms(json)
        return
    from attncc.gallery import shelf

    entries = shelf()
    if json:
        print_json(entries)
        return
    table = _table("family", "name", "what it is", "formula", "passes", "kernels", "status", "source")
    family = ""
    for entry in entries:
        formulas = "\n".join(f"{stage}: {text}" for stage, text in entry["stages"].items())
        texts = (entry["title"], formulas, str(entry["passes"]), str(len(entry["kernels"])), _status(entry))
        shown = "" if entry["family"] == family else entry["family"]
        family = entry["family"]
        table.add_row(shown, Text(entry["name"], style="bold"), *(Text(t) for t in (*texts, entry["cites"])))
    out.print(table)


def _mechanisms(json: bool) -> None:
    from attncc.catalogue import VERDICTS, mechanisms

    if json:
        print_json([vars(row) for row in mechanisms()])
        return
    table = _table("family", "mechanism", "verdict", "answered by", "note", "paper")
    for row in mechanisms():
        texts = (row.family, row.name, row.verdict, ", ".join(row.by), row.note, row.paper)
        table.add_row(*(Text(t) for t in texts))
    out.print(table)
    for verdict, meaning in VERDICTS.items():
        out.print(f"{verdict}: {meaning}", style="dim")


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("name", "family", "verdict", "passes", "kernels"))
    return table


def _status(entry: dict[str, Any]) -> str:
    gradients = f"d {' '.join(entry['gradients'])}" if entry["gradients"] else "forward only"
    return f"{gradients}, O(N)" if entry["linear"] else gradients
