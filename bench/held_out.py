"""How much of the first choices' quality is fitted to the very cells that it is told of.

The cost model's constants were fitted by hand to measurements, some of them these. So they are fitted again, by a
search that knows no more of a shipped constant than its size up to a factor of `SPAN`: random draws, of which for each
variant that one is taken that serves all other variants best. The variant that was left out then judges it. Estimates
of registers are not drawn, and what the templates do is known to both.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from attncc.schedule import cost, decode_cost, hopper, hopper_backward
from attncc.schedule.model import Model, model
from bench.record import load
from bench.regret import Measured, card, cell_of, spread
from bench.regret_cells import first_choices, problem_of

#: how many times larger or smaller than the shipped constant one that is drawn may be
SPAN = 2.0
#: constants that are shares of a rate
_SHARES = ("tensor_efficiency", "wide_efficiency", "matmul_share", "lockstep", "hidden", "cache_share")
#: where each table of the model is read
_READERS: dict[str, Any] = {
    "triton": cost,
    "decode": decode_cost,
    "gluon_forward": hopper,
    "gluon_backward": hopper_backward,
}


def drawn(dice: random.Random) -> Model:
    """The model with random constants."""

    def scaled(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: scaled(name, x) for key, x in value.items()}
        if isinstance(value, tuple):
            return tuple(scaled(name, x) for x in value)
        found = value * math.exp(dice.uniform(-1, 1) * math.log(SPAN))
        return min(found, 1.0) if name in _SHARES else found

    tables = {}
    for name in _READERS:
        table = getattr(model(), name)
        tables[name] = replace(table, **{f.name: scaled(f.name, getattr(table, f.name)) for f in fields(table)})
    return replace(model(), **tables)


@contextmanager
def reading(constants: Model) -> Iterator[None]:
    """The scheduler with these constants."""
    before = {name: reader.FIT for name, reader in _READERS.items()}
    cost.ranked.cache_clear()
    try:
        for name, reader in _READERS.items():
            reader.FIT = getattr(constants, name)
        yield
    finally:
        for name, reader in _READERS.items():
            reader.FIT = before[name]
        cost.ranked.cache_clear()


def held_out(variants: Sequence[str], shares: Sequence[Sequence[float]]) -> list[float]:
    """The regret of each cell with the draw that is best, on average, for the cells of all other variants. `shares`: by
    draw, then by cell; `variants`: that of each cell."""
    found = []
    for at, own in enumerate(variants):
        others = [i for i, name in enumerate(variants) if name != own]
        best = min(shares, key=lambda draw: statistics.mean(draw[i] for i in others))
        found.append(best[at])
    return found


def judge(path: Path, draws: int, told: Callable[[str], None]) -> dict[str, Any]:
    """What `draws` draws say of a file of the regret suite, for its key "held_out"."""
    data = load(path)
    device = card(data["gpu"])
    cells = [(cell_of(row), problem_of(cell_of(row)), Measured.of(row)) for row in data["rows"] if "error" not in row]
    dice, shares = random.Random(0), []
    for number in range(draws):
        with reading(drawn(dice)):
            shares.append(
                [
                    times.time(first_choices(problem, device), cell.mode, problem, device)[0] / times.best()[1] - 1
                    for cell, problem, times in cells
                ]
            )
        told(f"{number + 1:3}/{draws}  mean regret {statistics.mean(shares[-1]):.1%}")
    found = held_out([cell.variant for cell, *_ in cells], shares)
    typical = statistics.median(statistics.mean(draw) for draw in shares)
    return {"draws": draws, "regret": spread(found), "mean": f"{statistics.mean(found):.1%}", "any": f"{typical:.1%}"}
