"""What the cost model's first choices lose: its ranking beside the tilings that a sweep measured. Needs no GPU.

To fit the model again after a template or a compiler has changed: `python -m bench sweep` on a GPU, for the cells that
matter; then change the constants at the top of attncc/schedule/cost.py and registers.py until this table is low.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import attncc as ac
from attncc.errors import UnsupportedError
from attncc.schedule import Device, KernelSchedule, Problem, device_names, load_device, ranked
from bench.record import load
from bench.suites.sweep import CASES

COLUMNS = ("cell", "kernel", "first choice", "us", "best", "us", "regret")
FIELDS = ("block_m", "block_n", "num_warps", "num_stages")


@dataclass(frozen=True)
class Regret:
    """One kernel of one cell. `first` is the model's choice; `us` the time of `timed`, the first of its order that was
    measured, which is `first` itself if `measured`."""

    cell: str
    kernel: str
    first: KernelSchedule
    timed: KernelSchedule
    us: float
    best: KernelSchedule
    best_us: float

    @property
    def measured(self) -> bool:
        """Whether the first choice itself was measured."""
        return self.first == self.timed

    @property
    def share(self) -> float:
        """The time lost, as a share of the best one."""
        return self.us / self.best_us - 1


def card(gpu: str) -> Device:
    """The device file that lists a GPU by the name that torch gives it; UnsupportedError if none does."""
    for device in map(load_device, device_names()):
        if any(re.search(rf"\b{re.escape(name)}\b", gpu) for name in device.cards):
            return device
    raise UnsupportedError(f"no device file lists {gpu!r}")


def problem(row: dict[str, Any]) -> Problem:
    """The scheduler's problem of a result row."""
    names = {"b": "B", "h": "Hq", "h_kv": "Hkv", "q_idx": "M", "kv_idx": "N", "d_qk": "Dqk", "d_v": "Dv"}
    sizes = {name: row[column] for name, column in names.items()}
    engine: Any = ac.compile(CASES[row["case"]].variant).engine
    found: Problem = engine.problem(sizes, getattr(torch, row["dtype"]), {})
    return found


def regrets(path: Path) -> Iterator[Regret]:
    """One entry a row of a sweep's file, but for rows that failed; ValueError where no candidate was measured."""
    data = load(path)
    device = card(data["gpu"])
    for row in data["rows"]:
        if "error" in row:
            continue
        times = {KernelSchedule(*(entry[name] for name in FIELDS)): entry["us"] for entry in row["measured"]}
        order = [ks for ks, _ in ranked(row["kernel"], problem(row), device)]
        timed = next((ks for ks in order if ks in times), None)
        if timed is None:
            raise ValueError(f"{path}: of the candidates of {row['case']}, {row['kernel']}, none was measured")
        best = min(times, key=times.__getitem__)
        group = f" G={row['Hq'] // row['Hkv']}" * (row["Hq"] != row["Hkv"])
        cell = f"{row['case']} D={row['Dqk']} S={row['N']}{group}"
        yield Regret(cell, row["kernel"], order[0], timed, times[timed], best, times[best])


def summary(found: Iterable[Regret]) -> str:
    """Median, 95th percentile and worst of the regrets."""
    shares = sorted(each.share for each in found)
    high = shares[min(int(0.95 * len(shares)), len(shares) - 1)]
    return (
        f"{len(shares)} first choices: median regret {statistics.median(shares):.1%}, "
        f"95th percentile {high:.1%}, worst {shares[-1]:.1%}"
    )


def lines(found: Iterable[Regret]) -> list[list[str]]:
    """The table's lines; "~" marks a first choice that was not measured, with the time of the next that was."""
    return [
        [
            each.cell,
            each.kernel,
            str(each.first),
            f"{'' if each.measured else '~'}{each.us:.0f}",
            str(each.best),
            f"{each.best_us:.0f}",
            f"{each.share:.1%}",
        ]
        for each in found
    ]
