"""`attncc doctor`: report which parts of attncc work on this machine."""

from __future__ import annotations

import typer
from rich.table import Table
from rich.text import Text

from attncc.cli.options import Json
from attncc.cli.output import FAILED, out, print_json


def command(json: Json = False) -> None:
    """Report versions, GPUs, interpreter, cross-compilation and cache. The exit code is 1 if anything is broken.

    Examples
      attncc doctor
    """
    from attncc.runtime.doctor import examine

    findings = examine()
    if json:
        print_json([{"name": f.name, "ok": f.ok, "detail": f.detail} for f in findings])
    else:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for f in findings:
            mark = Text("ok", "green") if f.ok else Text("broken", "bold red")
            table.add_row(mark, f.name, Text(f.detail))
        out.print(table)
    if not all(f.ok for f in findings):
        raise typer.Exit(FAILED)
