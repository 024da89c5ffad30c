"""`attncc cache`: list, move and clear the schedules and sources that are kept on disk."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from attncc.cli.options import Json
from attncc.cli.output import out, print_json, write_file
from attncc.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Manage tuned schedules and generated sources, kept in $ATTNCC_CACHE_DIR, else the user's cache folder.

\b
Examples
  attncc cache list
  attncc cache export tuned.json      (then, on another machine)
  attncc cache import tuned.json
  attncc cache table h100 schedules/tuned/h100/mine.json
""",
)


def _cache() -> Any:
    from attncc.schedule.cache import Cache

    return Cache()


@app.command("list")
def list_(json: Json = False) -> None:
    """List the entries, newest first."""
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


@app.command("export", short_help="Write all entries to a file, for another machine.")
def export(file: Annotated[Path, typer.Argument(help="The JSON file to write.")]) -> None:
    """Write all entries to a file, for another machine with the same GPU."""
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


@app.command("table", short_help="Write tuned schedules as a table that ships with attncc.")
def table(
    device: Annotated[str, typer.Argument(help="Device file of the GPU they were tuned on: h100, ...")],
    file: Annotated[Path, typer.Argument(help="The JSON file to write, e.g. schedules/tuned/h100/mine.json.")],
    least: Annotated[
        str, typer.Option(metavar="PERCENT", help="Least gain in time over the model's first choice.")
    ] = "2%",
) -> None:
    """Write tuned schedules as a table that ships with attncc. Calls on such a GPU use an entry if variant, dtype and
    head dimensions match, and their lengths round up to the same powers of two."""
    from attncc.schedule.choose import shipped_row, table_text
    from attncc.schedule.device import load_device

    share = _share(least)
    name = load_device(device).name
    entries = sorted(_cache().list(), key=lambda e: (str(e.value.get("what")), e.key))
    tuned = [e.value for e in entries if e.kind == "schedule" and e.value.get("device") == name]
    if not tuned:
        raise InputError(
            f"nothing in the cache was tuned on {device}", remedy="`attncc tune` on such a GPU comes first"
        )
    rows = [row for value in tuned if (row := shipped_row(value, share)) is not None]
    write_file(file, table_text(rows))
    out.print(f"wrote {len(rows)} of {len(tuned)} to {file}; the others save less than {share:.1%}")


def _share(text: str) -> float:
    try:
        return float(text.strip().removesuffix("%")) / 100
    except ValueError:
        raise InputError(f"'{text}' is no percentage", remedy="write 2 or 2%") from None


@app.command("clear")
def clear() -> None:
    """Remove all entries, including unreadable ones."""
    count = _cache().clear()
    out.print(f"removed {count} {'entry' if count == 1 else 'entries'}")
