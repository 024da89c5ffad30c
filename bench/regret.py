"""What the cost model's first choices lose: its ranking beside what was measured. Needs no GPU.

Two kinds of files: those of the regret suite, whole directions of an op with both backends in the race, and those of
the sweep suite, single kernels of the Triton backend with every tiling. To fit the model again after a template or a
compiler has changed: measure; then change `schedules/model.toml`, and the estimate of registers in
attncc/schedule/registers.py, until this table is low.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch

import attncc as ac
from attncc.errors import UnsupportedError
from attncc.runtime.race import order
from attncc.schedule import Device, KernelSchedule, Problem, Schedule, device_names, load_device, ranked
from attncc.schedule.choose import choose
from attncc.schedule.problem import Kernel
from bench.case import Shape
from bench.record import load
from bench.regret_cells import Cell, first_choices, problem_of
from bench.suites.sweep import CASES

COLUMNS = ("cell", "what", "first choice", "us", "best", "us", "regret")
FIELDS = ("block_m", "block_n", "num_warps", "num_stages")
#: the kernels that a tuner of a direction races
KINDS: dict[str, tuple[Kernel, ...]] = {"forward": ("forward",), "backward": ("dkdv", "dq")}


@dataclass(frozen=True)
class Regret:
    """One direction, or one kernel, of one cell. `first` is the model's choice, `us` its time; where it was not
    measured itself, that of the next of the model's order that was. `used_us`: the time of what calls use, which may be
    a shipped schedule, where that is known. `tenth_us`: the best that a tuner knows after a tenth of its search."""

    cell: str
    what: str
    first: str
    measured: bool
    us: float
    best: str
    best_us: float
    used_us: float | None = None
    tenth_us: float | None = None

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


class NotMeasuredError(ValueError):
    """A first choice of today of which nothing raced, as where Gluon has a kernel since."""


def regrets(path: Path) -> tuple[list[Regret], list[str]]:
    """One entry a row of a file of either suite, but for rows that failed; and the cells of which nothing can be said,
    since the file knows no kernel like the first choice of today."""
    data = load(path)
    device = card(data["gpu"])
    of_row = of_direction if data["suite"] == "regret" else of_kernel
    found, unknown = [], []
    for row in data["rows"]:
        if "error" in row:
            continue
        try:
            found.append(of_row(row, device))
        except NotMeasuredError as error:
            unknown.append(f"{row['case']} {row.get('mode', row.get('kernel'))}: {error}")
    return found, unknown


@dataclass(frozen=True)
class Measured:
    """The times of one row of the regret suite, by tiling: directions that one kernel makes, and the two kernels of a
    backward apart, with what is launched beside those."""

    whole: Mapping[KernelSchedule, float]
    parts: Mapping[str, Mapping[KernelSchedule, float]]
    beside: float

    @classmethod
    def of(cls, row: dict[str, Any]) -> Measured:
        """The times in a result row."""
        data = row["measured"]

        def listed(entries: list[dict[str, Any]]) -> dict[KernelSchedule, float]:
            return {KernelSchedule.from_json({k: v for k, v in e.items() if k != "us"}): e["us"] for e in entries}

        return cls(listed(data["whole"]), {p: listed(data[p]) for p in ("dkdv", "dq")}, data.get("beside_us", 0.0))

    def among(self, raced: Collection[tuple[str, KernelSchedule]]) -> Measured:
        """Those of the tilings that raced, by their kernels."""
        whole = {ks: us for ks, us in self.whole.items() if ("forward", ks) in raced or ("dkdv", ks) in raced}
        parts = {part: {ks: us for ks, us in t.items() if (part, ks) in raced} for part, t in self.parts.items()}
        return Measured(whole, parts, self.beside)

    def best(self) -> tuple[str, float]:
        """The fastest of all, and its time."""
        kernels, us = self._best()
        return " | ".join(map(str, kernels)), us

    def best_kernels(self) -> tuple[KernelSchedule, ...]:
        """The tiling of the fastest kernel that makes all, or those of dkdv and dq."""
        return self._best()[0]

    def _best(self) -> tuple[tuple[KernelSchedule, ...], float]:
        found: list[tuple[tuple[KernelSchedule, ...], float]] = [((ks,), us) for ks, us in self.whole.items()]
        if all(self.parts.values()):
            pair = tuple(min(times, key=times.__getitem__) for times in self.parts.values())
            us = sum(times[ks] for times, ks in zip(self.parts.values(), pair, strict=True)) + self.beside
            found.append((pair, us))
        return min(found, key=lambda entry: entry[1])

    def time(self, schedule: Schedule, mode: str, problem: Problem, device: Device) -> tuple[float, bool]:
        """The time of a direction with a schedule, or, where that was not measured, with the nearest one in the model's
        order behind it; and whether it was."""
        kernel = schedule.forward if mode == "forward" else schedule.dkdv
        if mode == "forward" or kernel.backend == "gluon":
            name: Any = "forward" if mode == "forward" else "dkdv"
            order = [ks for ks, _ in ranked(name, problem, device, kernel.backend)]
            found, was = _nearest(kernel, order, self.whole)
            return self.whole[found], was
        us, all_were = self.beside, True
        for part in ("dkdv", "dq"):
            own: Any = part
            order = [ks for ks, _ in ranked(own, problem, device)]
            found, was = _nearest(schedule.of(own), order, self.parts[part])
            us, all_were = us + self.parts[part][found], all_were and was
        return us, all_were


def _nearest(
    wanted: KernelSchedule, order: Sequence[KernelSchedule], times: Mapping[KernelSchedule, float]
) -> tuple[KernelSchedule, bool]:
    """`wanted`, or the first behind it in `order` that has a time, else the first of all; and if it is `wanted`."""
    if wanted in times:
        return wanted, True
    start = order.index(wanted) if wanted in order else 0
    found = next((ks for ks in (*order[start:], *order) if ks in times), None)
    if found is None:
        raise NotMeasuredError(f"neither {wanted} nor any other of its order was measured")
    return found, False


def cell_of(row: dict[str, Any]) -> Cell:
    """The cell of a row of the regret suite."""
    sizes = {"b": row["B"], "h": row["Hq"], "hkv": row["Hkv"], "m": row["M"], "n": row["N"]}
    shape = Shape(**sizes, d=row["Dqk"], dv=row["Dv"], dtype=getattr(torch, row["dtype"]))
    return Cell(row["case"], shape, row["mode"])


def of_direction(row: dict[str, Any], device: Device) -> Regret:
    """A row of the regret suite, with the choices of the model as it is now."""
    cell = cell_of(row)
    problem, times = problem_of(cell), Measured.of(row)
    first = first_choices(problem, device)
    us, measured = times.time(first, cell.mode, problem, device)
    used, _ = times.time(choose(problem, device), cell.mode, problem, device)
    best, best_us = times.best()
    entries = order(problem, device, KINDS[cell.mode])
    tenth = times.among(set(entries[: ceil(len(entries) / 10)]))
    known = [us, *([tenth.best()[1]] if tenth.whole or all(tenth.parts.values()) else [])]
    whole = cell.mode == "forward" or first.dkdv.backend == "gluon"
    name = str(first.forward if cell.mode == "forward" else first.dkdv) if whole else f"{first.dkdv} | {first.dq}"
    return Regret(str(cell), cell.mode, name, measured, us, best, best_us, used, min(known))


def of_kernel(row: dict[str, Any], device: Device) -> Regret:
    """A row of the sweep suite; ValueError where no candidate was measured."""
    times = {KernelSchedule(*(entry[name] for name in FIELDS)): entry["us"] for entry in row["measured"]}
    order = [ks for ks, _ in ranked(row["kernel"], problem(row), device)]
    timed, measured = _nearest(order[0], order, times)
    best = min(times, key=times.__getitem__)
    group = f" G={row['Hq'] // row['Hkv']}" * (row["Hq"] != row["Hkv"])
    cell = f"{row['case']} D={row['Dqk']} S={row['N']}{group}"
    return Regret(cell, row["kernel"], str(order[0]), measured, times[timed], str(best), times[best])


def problem(row: dict[str, Any]) -> Problem:
    """The scheduler's problem of a row of the sweep suite."""
    names = {"b": "B", "h": "Hq", "h_kv": "Hkv", "q_idx": "M", "kv_idx": "N", "d_qk": "Dqk", "d_v": "Dv"}
    sizes = {name: row[column] for name, column in names.items()}
    engine: Any = ac.compile(CASES[row["case"]].variant).engine
    found: Problem = engine.problem(sizes, getattr(torch, row["dtype"]), {})
    return found


def summary(found: Sequence[Regret]) -> str:
    """Median, 95th percentile and worst of the regrets; then those of what calls use, where it is known."""
    text = f"{len(found)} first choices: {spread(each.share for each in found)}"
    used = [each.used_us / each.best_us - 1 for each in found if each.used_us is not None]
    tenth = [each.tenth_us / each.best_us - 1 for each in found if each.tenth_us is not None]
    text += f"\nwith the shipped schedules: {spread(used)}" if used else ""
    return text + (f"\nwith a tuner after a tenth of its search: {spread(tenth)}" if tenth else "")


def spread(shares: Iterable[float]) -> str:
    """Median, 95th percentile and worst."""
    ordered = sorted(shares)
    high = ordered[min(int(0.95 * len(ordered)), len(ordered) - 1)]
    return f"median regret {statistics.median(ordered):.1%}, 95th percentile {high:.1%}, worst {ordered[-1]:.1%}"


def lines(found: Iterable[Regret]) -> list[list[str]]:
    """The table's lines; "~" marks a first choice that was not measured, with the time of the next that was."""
    return [
        [
            each.cell,
            each.what,
            each.first,
            f"{'' if each.measured else '~'}{each.us:.1f}",
            each.best,
            f"{each.best_us:.1f}",
            f"{each.share:.1%}",
        ]
        for each in found
    ]


def markdown(path: Path, found: Sequence[Regret], unknown: Sequence[str] = ()) -> str:
    """The table as a page of its own, with where its figures come from, and which cells it says nothing of."""
    data = load(path)
    then = [row["us"] / row["best_us"] - 1 for row in data["rows"] if "best_us" in row]
    fitted = f"with the model as it was when they were measured: {spread(then)}\n" if then else ""
    apart = f"{_held_out(data['held_out'])}\n" if "held_out" in data else ""
    head = (
        f"# First choices of the scheduler beside the best of their candidates\n\n{summary(found)}\n{fitted}{apart}\n"
        f"{data['gpu']}, torch {data['torch']}, triton {data['triton']}, {data['date'][:10]}, commit "
        f"{(data['commit'] or 'unknown')[:12]}: `{data['command']}`; this page: `python -m bench regret --write`. "
        f"{_searched(data['rows'])} Microseconds of all kernels of a direction. "
        "`~`: not measured itself; the next of the model's order that was.\n"
        + "".join(
            f"\n{line}\n"
            for line in (*([data["note"]] if "note" in data else []), *map("left out: {}".format, unknown))
        )
    )
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *lines(found)]
    return head + "\n" + "\n".join(f"| {' | '.join(cell.replace('|', '+') for cell in row)} |" for row in rows) + "\n"


def _held_out(found: Mapping[str, Any]) -> str:
    """What `bench.held_out` found."""
    return (
        f"leaving variants out, with the constants that serve all others best, of {found['draws']} random draws up to "
        f"twice as large or small as the shipped ones: {found['regret']}, mean {found['mean']}; of a draw that nothing "
        f"chose mean {found['any']}. Estimates of registers stay as they are"
    )


def _searched(rows: Sequence[Mapping[str, Any]]) -> str:
    """How far the search went."""
    reaches = [row["reach"] for row in rows if "reach" in row]
    if not reaches:  # of before the rounds
        return "All of Gluon's candidates raced, and Triton's in the model's order to a depth."
    whole = reaches.count(None)
    if whole == len(reaches):
        return "All candidates raced."
    least = min(reach for reach in reaches if reach is not None)
    return (
        f"All candidates raced in {whole} of {len(reaches)} cells; in the others all of Gluon's, and all that the "
        f"model predicts to take up to {least:g} times what its first choice takes, or more."
    )
