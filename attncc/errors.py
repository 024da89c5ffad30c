"""What attncc raises. A message says what is wrong, where (file, line, a caret), why, and what to do.

gemma.toml:4: mask: expected a boolean, got an index
   mask = "q_idx - kv_idx"
           ^^^^^^^^^^^^^^
   did you mean a comparison, e.g. "q_idx - kv_idx < 4096"?
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Self

_INDENT = "   "
_PACKAGE = "attncc."


@dataclass(frozen=True)
class Span:
    """A place in a source: columns `col` to `end_col` (0-based, end excluded) of line `line` (1-based).

    `text` is that whole line. `file` is what the user called the source: a path, or a name such as "<mask>".
    An expression over several lines is pointed at on its first line; `end_col` may then lie past the text's end.
    """

    file: str
    line: int
    col: int
    end_col: int
    text: str

    @property
    def location(self) -> str:
        """`file:line`, the form editors and terminals make clickable."""
        return f"{self.file}:{self.line}"

    def pointed(self) -> str:
        """The source line and a row of carets under the span, two lines without indentation of their own."""
        text = self.text.rstrip()
        lead = len(text) - len(text.lstrip())
        start = min(max(self.col, lead), len(text))
        width = max(1, min(self.end_col, len(text)) - start)
        # A tab before the span is kept as a tab, so that the carets stand under the span at any tab width.
        pad = "".join("\t" if char == "\t" else " " for char in text[lead:start])
        return f"{text[lead:]}\n{pad}{'^' * width}"


class AttnccError(Exception):
    """Every error that attncc raises on purpose. `reason` is the finding, `remedy` (or None) is what to do about it."""

    def __init__(self, reason: str, *, remedy: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return self.reason if self.remedy is None else f"{self.reason}\n{_INDENT}{self.remedy}"

    def __reduce__(self) -> tuple[Callable[..., AttnccError], tuple[Any, ...]]:
        # Exception.__reduce__ passes positional arguments only; ours are keywords too, and errors cross processes.
        return _rebuild, (type(self), dict(self.__dict__))


class Diagnostic(AttnccError):
    """An error about a spec: it may know the stage (score, mask, ...) and the place in the user's source."""

    def __init__(
        self, reason: str, *, stage: str | None = None, span: Span | None = None, remedy: str | None = None
    ) -> None:
        super().__init__(reason, remedy=remedy)
        self.stage = stage
        self.span = span

    def at(self, span: Span | None = None, stage: str | None = None) -> Self:
        """A copy with `span` and `stage` where this one has None: a caller adds what the raiser could not know."""
        return type(self)(
            self.reason,
            stage=stage if self.stage is None else self.stage,
            span=span if self.span is None else self.span,
            remedy=self.remedy,
        )

    def __str__(self) -> str:
        where = [self.span.location] if self.span else []
        where += [self.stage] if self.stage else []
        lines = [": ".join([*where, self.reason])]
        if self.span and self.span.text.strip():  # Python keeps no lines of what a prompt or `python -c` was given
            lines += self.span.pointed().splitlines()
        lines += self.remedy.splitlines() if self.remedy else []
        return f"\n{_INDENT}".join(lines)


class SpecError(Diagnostic):
    """The spec is wrong: an unknown name, a type mismatch, a mask that is no boolean, a normalizer that reads `v`."""


class UnsupportedError(Diagnostic):
    """The request makes sense, but attncc cannot do it yet: the message names what is missing and what would work."""


class InputError(AttnccError):
    """The tensors of a call do not match the spec or each other: shape, dtype, device, a missing or an extra input."""


class ScheduleError(AttnccError):
    """No tiling of a kernel fits the device: `kernel`, `buffer`, `bytes_over` say what is too large, by how much."""

    def __init__(
        self,
        reason: str,
        *,
        kernel: str | None = None,
        buffer: str | None = None,
        bytes_over: int | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(reason, remedy=remedy)
        self.kernel = kernel
        self.buffer = buffer
        self.bytes_over = bytes_over


class AttnccWarning(UserWarning):
    """Something that the user should know of, and that went on: an unreadable cache entry, a spec with a risk."""


def warn(message: str, category: type[Warning] = AttnccWarning) -> None:
    """Warn at the line outside of this package from which the call came."""
    level, _ = _caller()
    warnings.warn(message, category, stacklevel=level + 1)


def calling_line() -> tuple[str, int]:
    """The file and line outside of this package from which the call came."""
    _, frame = _caller()
    return frame.f_code.co_filename, frame.f_lineno


def _caller() -> tuple[int, FrameType]:
    """How many frames above the function that asks the first one outside of this package is, and that frame."""
    level, frame = 1, sys._getframe(2)
    while frame.f_back is not None and f"{frame.f_globals.get('__name__')}.".startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    return level, frame


def _rebuild(cls: type[AttnccError], attributes: dict[str, Any]) -> AttnccError:
    """The error `cls` with these attributes: the inverse of `AttnccError.__reduce__`."""
    error = cls.__new__(cls)
    error.args = (attributes["reason"],)
    error.__dict__.update(attributes)
    return error
