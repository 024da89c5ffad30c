"""One run of the bench: where results go, how much time is left, and the rows as they appear on the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from attncc.runtime.processes import Done, side_by_side
from bench.record import RESULTS, Results, environment, slug
from bench.timing import Budget

#: processes that compile and check ahead of the timing, and the share of a run's seconds that they may take
WORKERS, AHEAD_SHARE = 14, 0.6
#: seconds after which a piece of work is told of
SLOW = 10


class NotReadyError(Exception):
    """A case that failed, or was not finished, ahead of the timing."""


@dataclass
class Run:
    """What every suite gets. `quick` asks for the first few cases only, as a trial of the machine."""

    out: Path | None = None
    quick: bool = False
    budget: Budget = field(default_factory=lambda: Budget(math.inf))
    options: dict[str, Any] = field(default_factory=dict)
    console: Console = field(default_factory=lambda: Console(width=150))
    failures: list[str] = field(default_factory=list)

    def results(self, suite: str) -> Results:
        """A fresh result file of `suite`: under `out`, else among the committed results of this GPU."""
        meta = environment()
        folder = self.out if self.out is not None else RESULTS / slug(meta["gpu"])
        results = Results(suite, folder / f"{suite}.json", self.quick, meta)
        results.write()
        return results

    def take(self, items: list[Any], quick: int) -> list[Any]:
        """`items`, or the first `quick` of them in a quick run."""
        return items[:quick] if self.quick else items

    def ahead(self, function: Callable[[Any], Any], arguments: Sequence[Any]) -> list[Done]:
        """`function` of each argument, side by side in processes of their own: it compiles and checks what this process
        then times alone, with every kernel in the caches on disk."""
        left = self.budget.seconds - self.budget.elapsed()

        def told(at: int, done: Done) -> None:
            """What failed, and what took long, for a run that is cut off keeps what it printed."""
            if done.error is None and done.seconds > SLOW:
                what = f"{self.budget.elapsed():4.0f} s  {arguments[at]}: {done.seconds:.0f} s"
                self.console.print(what, markup=False, highlight=False)
            if done.error is not None:
                what = f"{arguments[at]}: {done.error}\n{done.trace}"
                self.console.print(what, style="red", markup=False, highlight=False)

        return side_by_side(function, arguments, workers=WORKERS, seconds=AHEAD_SHARE * left, finished=told)

    def out_of_time(self, results: Results, remaining: str) -> bool:
        """Whether the budget is spent; then the file says so, with what was left to do."""
        if not self.budget.spent():
            return False
        results.note("stopped", f"time budget of {self.budget.seconds:.0f} s spent before {remaining}")
        self.console.print(f"[yellow]{results.suite}: {results.meta['stopped']}[/]")
        return True

    def fail(self, results: Results, label: str, error: Exception, **row: Any) -> None:
        """Put a failed case into the results, without a time, and let the run end with a non-zero code."""
        results.add(**row, error=f"{type(error).__name__}: {error}")
        self.failures.append(f"{results.suite}: {label}: {error}")
        self.console.print(f"[red]{label}: {type(error).__name__}: {error}[/]")

    def show(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A table; the first column is left-aligned, the others right-aligned."""
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)


Suite = Callable[[Run], None]
