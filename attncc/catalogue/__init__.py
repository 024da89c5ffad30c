"""The catalogue: published mechanisms, and the variant or recipe that answers each. Its data is mechanisms.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

VERDICTS = {
    "kernel": "one generated kernel from a spec",
    "program": "a short program of generated kernels",
    "outside": "a recipe without a kernel",
}


@dataclass(frozen=True)
class Mechanism:
    """One row. `by`: variants by name, recipes as "recipes.name", outputs as "outputs.name"."""

    family: str
    name: str
    verdict: str
    by: tuple[str, ...]
    note: str = ""
    paper: str = ""

    @property
    def variants(self) -> tuple[str, ...]:
        """The shipped variants among what answers."""
        return tuple(name for name in self.by if "." not in name)


@cache
def mechanisms() -> tuple[Mechanism, ...]:
    """All rows, in the file's order."""
    data = tomllib.loads(files(__name__).joinpath("mechanisms.toml").read_text(encoding="utf-8"))
    return tuple(
        Mechanism(family, name, **{**row, "by": tuple(row["by"])})
        for family, rows in data.items()
        for name, row in rows.items()
    )
