"""The command line: one file per command, which reads its options, calls the other packages, and prints."""

from __future__ import annotations

from typing import Annotated

import typer

from attncc.cli import bench, cache, check, compile, doctor, explain, list, show, tune, verify
from attncc.cli.options import help_text
from attncc.cli.output import ReportingGroup, out
from attncc.version import __version__

_HELP = """Compile the formula of an attention variant to GPU kernels; forward, backward and merge are derived from it.

A SPEC is one of

\b
  alibi                a shipped variant (attncc list)
  spec.toml            a file of formulas; parsed, never executed
  spec.py:name         a Variant in a Python file, which is executed
  --mask "kv_idx <= q_idx" --score "score + 0.1 * (kv_idx - q_idx)"
                       formulas on the command line, without a file

\b
Start with
  attncc show alibi
  attncc explain alibi --target h100
  attncc compile alibi --target h100 -o alibi_kernel.py
  attncc verify alibi
"""

app = typer.Typer(
    cls=ReportingGroup,
    help=_HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"attncc {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Without a command, show the help."""


#: each line is short enough for the help of `attncc` at 80 columns
_COMMANDS = {
    list: "List the shipped variants.",
    show: "Show a spec's formulas and draw its mask.",
    check: "Report errors and likely mistakes in a spec.",
    explain: "Show what is derived, and the schedule.",
    compile: "Compile for any GPU; none is needed here.",
    verify: "Check kernels against the reference.",
    tune: "Find the fastest schedule on this GPU.",
    bench: "Time a spec on this GPU.",
    doctor: "Report what works on this machine.",
}
for _command, _line in _COMMANDS.items():
    _name = _command.__name__.rpartition(".")[2]
    app.command(_name, help=help_text(_command.command), short_help=_line)(_command.command)
app.add_typer(cache.app, name="cache", short_help="Manage cached schedules and sources.")
