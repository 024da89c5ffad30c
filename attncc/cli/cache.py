"""`attncc cache`: what is kept on disk between runs."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from attncc.cli.options import Json
from attncc.cli.output import out, print_json
from attncc.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""The folder of tuned schedules and generated sources: $ATTNCC_CACHE_DIR, else the user's cache folder.

\b
Examples
  attncc cache list
  attncc cache export tuned.json      (and on another machine)
  attncc cache import tuned.json
""",
)


def _cache() -> Any:
    from attncc.schedule.cache import Cache

    return Cache()


@app.command("list")
def list_(json: Json = False) -> None:
    """List the entries, the newest first."""
    cache = _cache()
    entries = cache.list()
    if json:
        print_json([{"key": e.key, "size": e.size, "written": e.written, "value": e.value} for e in entries])
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("key", "kind", "what", "bytes", "written"):
        table.add_column(column, justify="right" if column == "bytes" else "left", no_wrap=column != "what")
    for e in entries:
        written = datetime.datetime.fromtimestamp(e.written).strftime("%Y-%m-%d %H:%M")
        table.add_row(e.key[:12], e.kind, str(e.value.get("what", "")), f"{e.size:,}", written)
    if entries:
        out.print(table)
    out.print(f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'} in {cache.directory}")


@app.command("export")
def export(file: Annotated[Path, typer.Argument(help="The JSON file to write.")]) -> None:
    """Write every entry into one file, for another machine with the same GPU."""
    try:
        count = _cache().export(file)
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from error
    out.print(f"wrote {count} {'entry' if count == 1 else 'entries'} to {file}")


@app.command("import")
def import_(file: Annotated[Path, typer.Argument(help="A file that `attncc cache export` wrote.")]) -> None:
    """Add the entries of an exported file."""
    count = _cache().import_(file)
    out.print(f"read {count} {'entry' if count == 1 else 'entries'} from {file}")


@app.command("clear")
def clear() -> None:
    """Remove every entry, also unreadable ones."""
    count = _cache().clear()
    out.print(f"removed {count} {'entry' if count == 1 else 'entries'}")
