"""`python -m bench SUITE...` measures; `plot` and `readme` make pictures and tables from the committed results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from bench import suites
from bench.record import RESULTS
from bench.run import Run
from bench.timing import Budget


class _SuitesByDefault(TyperGroup):
    """`python -m bench dense` means `python -m bench run dense`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_SuitesByDefault, no_args_is_help=True, help=__doc__, add_completion=False)


@app.command()
def run(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="SUITE...", help="Suites by name; --list shows them.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the JSON files; default bench/results/<gpu>.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the suites and stop.")] = False,
    quick: Annotated[bool, typer.Option(help="A few cases only, to try the machine; marked so in the file.")] = False,
    budget_s: Annotated[float, typer.Option(help="Seconds after which no new row is started.")] = math.inf,
    variant: Annotated[list[str] | None, typer.Option(help="sweep, linear, regret: case names, e.g. causal.")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="sweep: head dimensions.")] = None,
    length: Annotated[list[int] | None, typer.Option(help="sweep, regret: numbers of queries.")] = None,
    group: Annotated[list[int] | None, typer.Option(help="sweep: query heads a key head.")] = None,
    tiling: Annotated[list[str] | None, typer.Option(help="sweep: only these, e.g. dkdv=64x128/8/2.")] = None,
    workers: Annotated[int, typer.Option(help="sweep: processes that compile candidates.")] = 12,
) -> None:
    """Run suites on this machine's GPU: every case is checked against the reference, then timed."""
    if listed or not names:
        for name in suites.NAMES:
            Console().print(f"[bold]{name:<12}[/] {suites.summary(name)}", highlight=False)
        return
    for name in names:
        if name not in suites.NAMES:
            raise typer.BadParameter(f"no suite is called '{name}'; there are {', '.join(suites.NAMES)}")
    import torch

    if not torch.cuda.is_available():
        typer.echo("bench measures a GPU, and torch sees none here", err=True)
        raise typer.Exit(2)
    options = {
        "variant": variant,
        "head_dim": head_dim,
        "length": length,
        "group": group,
        "tiling": tiling,
        "workers": workers,
    }
    session = Run(out, quick, Budget(budget_s), options)
    for name in names:
        suites.load(name)(session)
    for failure in session.failures:
        session.console.print(f"[red]FAILED {failure}[/]")
    if session.failures:
        raise typer.Exit(1)


@app.command()
def plot(results: Annotated[Path, typer.Option(help="Folder with one folder of JSON files a GPU.")] = RESULTS) -> None:
    """Draw each GPU's plots beside its JSON files."""
    from bench.plot import draw_all

    for path in draw_all(results):
        typer.echo(path)


@app.command()
def readme(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail if a page is stale.")] = False,
) -> None:
    """Write the measured tables into README.md and bench/results/README.md, between their markers."""
    from bench.readme import PAGES, refresh

    for page in PAGES:
        old = page.read_text()
        new = refresh(old, RESULTS)
        if check and new != old:
            typer.echo(f"{page} does not show the committed results: run `python -m bench readme`", err=True)
            raise typer.Exit(1)
        if not check:
            page.write_text(new)


@app.command()
def regret(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Files of the regret or the sweep suite; default: those of regret that are committed."),
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Write each table beside its file, as regret.md.")] = False,
    held_out: Annotated[
        int, typer.Option(help="Random draws to fit constants with, each variant left out in turn; kept in the file.")
    ] = 0,
) -> None:
    """Show what the cost model's first choices lose against the best that was measured; needs no GPU."""
    from bench.held_out import judge
    from bench.record import keep
    from bench.regret import COLUMNS, lines, markdown, regrets, summary

    for path in files or sorted(RESULTS.glob("*/regret.json")):
        if held_out:
            keep(path, "held_out", judge(path, held_out, typer.echo))
        found, unknown = regrets(path)
        Run().show("first choices beside the best that was measured", list(COLUMNS), lines(found))
        typer.echo("~: not measured itself; the next of the model's order that was")
        typer.echo("\n".join([summary(found), *(f"left out: {line}" for line in unknown)]))
        if write:
            path.with_suffix(".md").write_text(markdown(path, found, unknown))


@app.command()
def tuned(
    sweep: Annotated[Path, typer.Argument(help="The JSON file of the sweep or the regret suite.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="E.g. schedules/tuned/h100/causal.json.")],
    any_variant: Annotated[
        bool, typer.Option(help="Let the rows match every formula, not the swept one only.")
    ] = False,
    any_shape: Annotated[bool, typer.Option(help="Let the rows match every length and group.")] = False,
) -> None:
    """Write a sweep's best schedules, or those that correct the model's in a regret file, as a table that attncc
    ships."""
    from attncc.schedule.choose import table_text
    from bench.record import load
    from bench.tuned import corrections, table

    data = load(sweep)
    regret = data["suite"] == "regret"
    rows = corrections(data) if regret else table(data, any_variant=any_variant, any_shape=any_shape)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(table_text(rows))


if __name__ == "__main__":
    app()
