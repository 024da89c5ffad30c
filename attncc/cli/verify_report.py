"""Collect the results of `attncc verify`, and format them: every result of a few specs, or a line for each of many."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from attncc.cli.output import err
from attncc.runtime.processes import Done

if TYPE_CHECKING:
    from attncc.language.hybrid import Hybrid
    from attncc.language.variant import Variant
    from attncc.runtime.verify import Row

OUT_OF_TIME = "not finished in time"


class Findings:
    """The results of some variants as they come in, from each of `count` places (shapes) or from all at once."""

    def __init__(self, variants: Sequence[Variant | Hybrid], count: int, start: float, *, told: bool):
        """`start`: time of the start, by time.monotonic; `told`: print progress on stderr."""
        self.variants = list(variants)
        self.seconds = {v.name: 0.0 for v in variants}
        self._count, self._told = count, told
        self._found: dict[str, dict[int, Done]] = {v.name: {} for v in variants}
        self._start = start

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def rows(self) -> dict[str, list[Row]]:
        """All results by their variant's name, in the order of the shapes."""
        return {
            name: [row for at in sorted(every) for row in every[at].value or ()] for name, every in self._found.items()
        }

    @property
    def ok(self) -> bool:
        """Whether all results are there, and right."""
        return not any(self.missing()) and all(row.ok for rows in self.rows.values() for row in rows)

    def begin(self, variant: Variant | Hybrid, how: str) -> None:
        """Report that a variant is about to be verified."""
        self._say(f"{variant.name}: {how} ...")

    def add(self, variant: Variant | Hybrid, place: int | None, done: Done) -> None:
        """Add the results of one shape of a variant; `place` is None for all shapes at once."""
        every = self._found[variant.name]
        every[place or 0] = done
        self.seconds[variant.name] += done.seconds
        if place is not None and len(every) == self._count:
            complete = sum(len(x) == self._count for x in self._found.values())
            wrong = [f"{row.check.name} at {row.shape}" for row in self.rows[variant.name] if not row.ok]
            errors = [x.error for x in every.values() if x.error]
            verdict = ", ".join([*errors, *wrong]) or "right"
            self._say(
                f"[{complete}/{len(self.variants)}] {variant.name}: {verdict}, {self.seconds[variant.name]:.0f} s"
            )

    def end(self, variant: Variant | Hybrid) -> None:
        """Declare a variant finished: shapes without results were not finished in time."""
        every = self._found[variant.name]
        for place in range(self._count):
            every.setdefault(place, Done(error=OUT_OF_TIME))

    def missing(self) -> Iterator[str]:
        """A line for each variant that lacks results, with the reasons."""
        for name, every in self._found.items():
            errors = [done.error for done in every.values() if done.error]
            if errors:
                which = (
                    "no results"
                    if len(errors) == len(every)
                    else f"{len(errors)} of {len(every)} shapes have no results"
                )
                yield f"{name}: {which}: {'; '.join(dict.fromkeys(errors))}"

    def _say(self, what: str) -> None:
        if self._told:
            err.print(what, style="dim")


def plain(name: str, row: Row) -> dict[str, Any]:
    """A result for programs."""
    c = row.check
    figures = {"max_error": c.max_err, "max_allowed": c.max_allowed, "rms_error": c.rms, "rms_allowed": c.rms_allowed}
    # NaN and infinity are no JSON
    finite = {key: value if abs(value) < float("inf") else None for key, value in figures.items()}
    return {
        "variant": name,
        "shape": str(row.shape),
        "result": c.name,
        "ok": row.ok,
        "repeatable": row.repeatable,
        "ordered": row.ordered,
        **finite,
    }


def every_result(results: Mapping[str, Sequence[Row]]) -> Table:
    """A line for each result."""
    table = _table(("", "variant", "shape", "result", "largest error", "allowed", "RMS error", "allowed"))
    for name, rows in results.items():
        before = ("", "")
        for row in rows:
            c = row.check
            figures = (f"{x:.1e}" for x in (c.max_err, c.max_allowed, c.rms, c.rms_allowed))
            case = (name, str(row.shape))
            shown = [now if case != before else "" for now in case]
            before = case
            table.add_row(_verdict(row), *shown, c.name, *figures)
    return table


def every_variant(results: Mapping[str, Sequence[Row]], seconds: Mapping[str, float]) -> Table:
    """A line for each variant: how many results, and the one that has most of what it may have of an error."""
    table = _table(("", "variant", "results", "of allowed", "largest error", "RMS error", "in", "at", "seconds"))
    for name, rows in results.items():
        if not rows:
            continue
        worst = max(rows, key=lambda row: (not row.ok, share(row)))
        c = worst.check
        figures = (f"{share(worst):.2f}", f"{c.max_err:.1e}", f"{c.rms:.1e}")
        table.add_row(
            *(_verdict(worst), name, str(len(rows)), *figures, c.name, str(worst.shape), f"{seconds.get(name, 0):.0f}")
        )
    return table


def share(row: Row) -> float:
    """The error of a result as a share of what is allowed, by the stricter of the two rules; above 1 it is wrong."""
    c = row.check
    pairs = ((c.max_err, c.max_allowed), (c.rms, c.rms_allowed))
    shares = [error / allowed if allowed else float(error > 0) for error, allowed in pairs]
    return math.inf if any(math.isnan(x) for x in shares) else max(shares)


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    figures = ("results", "of allowed", "largest error", "allowed", "RMS error", "seconds")
    whole = ("", "variant", "result", "in", "at", *figures) if "at" in columns else ("", "result", "allowed")
    for column in columns:
        table.add_column(column, justify="right" if column in figures else "left", no_wrap=column in whole)
    return table


def _verdict(row: Row) -> str:
    return "[green]ok[/]" if row.ok else "[red]WRONG[/]" if not row.check.ok else "[red]NOT REPEATABLE[/]"
