"""A TOML file as its text: each table and key with its place, so that carets stand under the user's characters."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attncc.errors import Span, SpecError
from attncc.language.expression import Source


@dataclass(frozen=True)
class Document:
    """A table of a TOML file. `within` names the tables that it lies in, from the top; () for the file itself."""

    file: str
    lines: tuple[str, ...]
    data: Mapping[str, Any]
    within: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str, file: str) -> Document:
        """The file's own table. Raises SpecError, with the place, where the text is no TOML."""
        lines = tuple(re.split("\r\n|\n", text))
        try:
            return cls(file, lines, tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            span = _syntax_span(str(error), lines, file)
            bare = span is not None and re.match(r"\s*[\w.]+\s*=\s*[A-Za-z(]", span.text)
            remedy = 'a formula is a string: score = "..."' if bare else None
            raise SpecError(f"not valid TOML: {error}", span=span, remedy=remedy) from None

    @property
    def name(self) -> str:
        """What it is called that says no name: as its file, or as its own table."""
        if self.within:
            return self.within[-1]
        return Path(self.file).stem if self.file.endswith(".toml") else "variant"

    def table(self, key: str) -> Document:
        """The table of that name, empty where there is none. SpecError for what is none."""
        value = self.data.get(key, {})
        if not isinstance(value, dict):
            raise SpecError(f"'{key}' must be a table", span=self.key_span(key), remedy=f"write [{self.path(key)}]")
        return replace(self, data=value, within=(*self.within, key))

    def path(self, key: str) -> str:
        """The full name of one of its keys, as a header has it."""
        return ".".join((*self.within, key))

    def string(self, key: str, default: str) -> str:
        """The text of a key. SpecError where it is none."""
        value = self.data.get(key, default)
        if not isinstance(value, str):
            raise SpecError(f"'{key}' must be a string, got {type(value).__name__}", span=self.key_span(key))
        return value

    def check_keys(self, known: Collection[str], elsewhere: Mapping[str, str]) -> None:
        """SpecError for a key that is not among those known; `elsewhere` says of some where they belong."""
        for key, value in self.data.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                remedy = f"did you mean '{near[0]}'?" if near else f"the keys are: {', '.join(known)}"
                raise SpecError(
                    f"unknown {'table' if isinstance(value, dict) else 'key'} '{key}'",
                    span=self.key_span(key) or self._header_span(key),
                    remedy=elsewhere.get(key, remedy),
                )

    @contextmanager
    def placed(self, key: str) -> Iterator[None]:
        """An error in here gets the place of this key, where it has none."""
        try:
            yield
        except SpecError as error:
            raise error.at(self.key_span(key) or self._header_span(key), None) from None

    def key_span(self, key: str) -> Span | None:
        """The place of a key, None where the file does not show it."""
        found = self._find(key)
        if found is None:
            return None
        line, col = found
        end = len(self.lines[line].split("=", 1)[0].rstrip())
        return Span(self.file, line + 1, col, end, self.lines[line])

    def source(self, key: str, value: str) -> Source:
        """The text of a stage or output with its place in the file."""
        found = self._find(key)
        opening = re.search(r"=\s*(\"\"\"|'''|\"|')", self.lines[found[0]]) if found else None
        if found is None or opening is None:
            return Source(value, f"{self.file}: {key}")  # an inline table: positions count within the text itself
        line, col = found[0] + 1, opening.end()
        if len(opening[1]) == 3 and self.lines[line - 1][col:].strip() == "":
            line, col = line + 1, 0  # TOML drops a newline right after the opening quotes
        own = value.split("\n")
        at_hand = line <= len(self.lines)
        there = [self.lines[line - 1][col:], *self.lines[line : line + len(own) - 1]] if at_hand else []
        if not all(row.startswith(text) for row, text in zip(there, own, strict=False)):
            return Source(value, f"{self.file}:{line}: {key}")  # escapes: the file's characters are not the text's
        return Source(value, self.file, line, col, list(self.lines))

    def _find(self, key: str) -> tuple[int, int] | None:
        """Line (0-based) and column of a key: in its table's section, or dotted in that of a table around it."""
        section: tuple[str, ...] = ()
        for number, line in enumerate(self.lines):
            header = re.match(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(#.*)?$", line)
            if header:
                section = tuple(p.strip().strip("\"'") for p in header[1].split("."))
                continue
            if section == self.within:
                named = rf"(['\"]?){re.escape(key)}\1"
            elif section == self.within[: len(section)]:
                named = r"\s*\.\s*".join(map(re.escape, (*self.within[len(section) :], key)))
            else:
                continue
            if re.match(rf"\s*{named}\s*=", line):
                return number, len(line) - len(line.lstrip())
        return None

    def _header_span(self, table: str) -> Span | None:
        """The place of `[table]`, or of one within it."""
        named = r"\s*\.\s*".join(map(re.escape, (*self.within, table)))
        for number, line in enumerate(self.lines, start=1):
            found = re.match(rf"\s*\[\s*({named})\s*[\].]", line)
            if found:
                return Span(self.file, number, found.start(1), found.end(1), line)
        return None


def _syntax_span(message: str, lines: tuple[str, ...], file: str) -> Span | None:
    """The place that TOML's parser names: a line and a column, or the end of the document."""
    found = re.search(r"line (\d+), column (\d+)", message)
    if found:
        line, col = int(found[1]), int(found[2]) - 1
    elif "end of document" in message:
        line = max((n for n, row in enumerate(lines, start=1) if row.strip()), default=1)
        col = len(lines[line - 1].rstrip())
    else:
        return None
    return Span(file, line, col, col + 1, lines[line - 1] if line <= len(lines) else "")
