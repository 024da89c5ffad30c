"""The output of every command: results go to stdout, errors and warnings to stderr."""

from __future__ import annotations

import codecs
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from attncc.errors import AttnccError, AttnccWarning, InputError

#: exit codes: the answer is negative (a failed verification, a spec with errors), or the command could not run
FAILED, REFUSED = 1, 2


#: what stands for the blocks of a picture where an encoding has none
_BLOCKS = str.maketrans("█▀▄·", "#',.")
_PLAIN = "attncc.plain"


def _plain(error: UnicodeError) -> tuple[str, int]:
    """What is written for characters that an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end].translate(_BLOCKS)
    return "".join(c if c.isascii() else "?" for c in lacking), error.end


codecs.register_error(_PLAIN, _plain)


class _Console:
    """A rich console on the current sys.stdout or sys.stderr, looked up at each use because tests replace them."""

    def __init__(self, stream: str):
        self._stream = stream

    @property
    def console(self) -> Console:
        """The console itself, for tables and progress bars. Text is never cut off: a pipe gets long lines."""
        stream = getattr(sys, self._stream)
        width = None if stream.isatty() else 160
        return Console(file=stream, highlight=False, soft_wrap=False, width=width)

    def print(self, text: Any = "", style: str | None = None) -> None:
        """Print text as it is (brackets are the user's, not markup), or any rich renderable."""
        if isinstance(text, str):
            self.console.print(Text(text, style=style or ""), soft_wrap=True)
        else:
            self.console.print(text)


out = _Console("stdout")
err = _Console("stderr")


def report(error: AttnccError) -> None:
    """An error as the user sees it: its kind, then the finding with place, reason and remedy."""
    err.console.print(Text.assemble((type(error).__name__, "bold red"), ": ", str(error)), soft_wrap=True)


def print_json(value: Any) -> None:
    """A value as JSON on stdout, and nothing else."""
    print(json.dumps(value, indent=2, sort_keys=False, allow_nan=False))


def write_file(path: Path, data: str | bytes) -> None:
    """Write a result. InputError: it cannot be written."""
    try:
        if isinstance(data, str):
            path.write_text(data, encoding="utf-8")
        else:
            path.write_bytes(data)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


class ReportingGroup(TyperGroup):
    """The command group: an AttnccError ends a command with its text and exit code 2, never with a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors=_PLAIN)
        with warnings.catch_warnings():
            warnings.simplefilter("always", AttnccWarning)
            shown = warnings.showwarning

            def show(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
                if issubclass(category, AttnccWarning):
                    err.console.print(Text.assemble(("warning", "bold yellow"), ": ", str(message)), soft_wrap=True)
                else:
                    shown(message, category, *args, **kwargs)

            warnings.showwarning = show
            try:
                return super().invoke(ctx)
            except AttnccError as error:
                report(error)
                raise typer.Exit(REFUSED) from None
