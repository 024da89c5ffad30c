"""The command line. Each command is a file; what it does is in the other rooms."""

from __future__ import annotations

from typing import Annotated

import typer

from attncc.cli import bench, cache, check, compile, doctor, explain, list, show, tune, verify
from attncc.cli.options import help_text
from attncc.cli.output import ReportingGroup, out
from attncc.version import __version__

_HELP = """Attention kernels from the formula: forward, backward and merge are derived from it and checked against it.

A SPEC, wherever a command takes one, is

\b
  alibi                a variant that ships: attncc list
  spec.toml            a file of formulas, which is data and never executed
  spec.py:name         a Variant in a Python file, which is executed to find it
  --mask "kv_idx <= q_idx" --score "score + 0.1 * (kv_idx - q_idx)"
                       no file at all: formulas on the command line

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
    """What `attncc` alone does: show the help."""


#: each in a line that the help of `attncc` has room for at 80 columns
_COMMANDS = {
    list: "The variants that ship, with their formulas.",
    show: "A spec's formulas, and its mask as a picture.",
    check: "What is wrong with a spec, or may go wrong.",
    explain: "What is derived and why, and which tilings.",
    compile: "Kernels for a GPU, which need not be here.",
    verify: "Kernels against the float64 reference.",
    tune: "Measure tilings on this GPU, keep the best.",
    bench: "Time a spec on this machine's GPU.",
    doctor: "What this machine can do.",
}
for _command, _line in _COMMANDS.items():
    _name = _command.__name__.rpartition(".")[2]
    app.command(_name, help=help_text(_command.command), short_help=_line)(_command.command)
app.add_typer(cache.app, name="cache", short_help="Tuned schedules and sources, kept on disk.")
