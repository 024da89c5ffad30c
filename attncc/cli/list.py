"""`attncc list`: the shipped variants by family, and the published mechanisms that they implement."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attncc.cli.options import Json
from attncc.cli.output import out, print_json
from attncc.errors import InputError

if TYPE_CHECKING:
    from attncc.catalogue import Mechanism

#: terminal width, in characters, from which a table is readable
WIDE = 140


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME | FAMILY]...", show_default=False, help="Variants or families to list in full."),
    ] = None,
    mechanisms: Annotated[
        bool, typer.Option("--mechanisms", help="List published mechanisms, and the variant or recipe for each.")
    ] = False,
    json: Json = False,
) -> None:
    """List the shipped variants. For each NAME: formula, passes over the keys, kernels, gradients, citation.

    Examples
      attncc list
      attncc list masks alibi
      attncc list --mechanisms
      attncc list --json
    """
    if mechanisms:
        if words:
            raise InputError("--mechanisms lists all of them", remedy=f"leave out '{words[0]}'")
        _mechanisms(json)
        return
    from attncc.gallery import shelf

    entries = _named(shelf(), words) if words else shelf()
    if json:
        print_json(entries)
    elif words:
        _in_full(entries)
    else:
        _blocks([(e["family"], e["name"], Text(e["title"])) for e in entries])
        out.print("In full: attncc list NAME, or a family of them: attncc list masks", style="dim")


def _named(entries: Sequence[dict[str, Any]], words: Sequence[str]) -> list[dict[str, Any]]:
    """The entries of these names and families. InputError for a word that is neither."""
    known = {word for entry in entries for word in (entry["name"], entry["family"])}
    for word in words:
        if word not in known:
            near = difflib.get_close_matches(word, sorted(known), n=1)
            remedy = f"did you mean '{near[0]}'?" if near else "attncc list shows the names, each under its family"
            raise InputError(f"no shipped variant, and no family of them, is called '{word}'", remedy=remedy)
    return [entry for entry in entries if entry["name"] in words or entry["family"] in words]


def _in_full(entries: Sequence[dict[str, Any]]) -> None:
    if out.console.width < WIDE:
        _blocks([(e["family"], e["name"], _about(e)) for e in entries])
        return
    table = _table("family", "name", "what it is", "formula", "passes", "kernels", "gradients", "source")
    family = ""
    for entry in entries:
        texts = (entry["title"], _formulas(entry), str(entry["passes"]), str(len(entry["kernels"])), _gradients(entry))
        shown = "" if entry["family"] == family else entry["family"]
        family = entry["family"]
        table.add_row(shown, Text(entry["name"], style="bold"), *(Text(t) for t in (*texts, entry["cites"])))
    out.print(table)


def _mechanisms(json: bool) -> None:
    from attncc.catalogue import VERDICTS, mechanisms

    if json:
        print_json([vars(row) for row in mechanisms()])
        return
    if out.console.width < WIDE:
        _blocks([(row.family, row.name, _answer(row)) for row in mechanisms()])
    else:
        _mechanism_table(mechanisms())
    for verdict, meaning in VERDICTS.items():
        out.print(f"{verdict}: {meaning}", style="dim")


def _mechanism_table(rows: Sequence[Mechanism]) -> None:
    table = _table("family", "mechanism", "verdict", "answered by", "note", "paper")
    for row in rows:
        texts = (row.family, row.name, row.verdict, ", ".join(row.by), row.note, row.paper)
        table.add_row(*(Text(t) for t in texts))
    out.print(table)


def _blocks(entries: Sequence[tuple[str, str, Text]]) -> None:
    """Print name and text side by side under a heading per family, for terminals too narrow for a table."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(max_width=28, overflow="fold")
    table.add_column(overflow="fold")
    heading = None
    for family, name, about in entries:
        if family != heading:
            table.add_row(Text(family, style="bold underline"))
        heading = family
        table.add_row(Padding(Text(name, style="bold"), (0, 0, 0, 2)), about)
    out.print(table)


def _about(entry: dict[str, Any]) -> Text:
    counts = [(entry["passes"], "pass", "passes"), (len(entry["kernels"]), "kernel", "kernels")]
    facts = [f"{n} {one if n == 1 else many}" for n, one, many in counts]
    facts += [_gradients(entry), *([entry["cites"]] if entry["cites"] else [])]
    formulas = _formulas(entry)
    return Text.assemble(entry["title"], "\n", formulas, "\n" * bool(formulas), ("; ".join(facts), "dim"))


def _answer(row: Mechanism) -> Text:
    return Text.assemble(
        f"{row.verdict}: {', '.join(row.by)}", ("".join(f"; {t}" for t in (row.note, row.paper) if t), "dim")
    )


def _formulas(entry: dict[str, Any]) -> str:
    return "\n".join(f"{stage}: {text}" for stage, text in entry["stages"].items())


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("name", "family", "verdict", "passes", "kernels"))
    return table


def _gradients(entry: dict[str, Any]) -> str:
    gradients = f"d {' '.join(entry['gradients'])}" if entry["gradients"] else "forward only"
    return f"{gradients}, O(N)" if entry["linear"] else gradients
