"""What the scheduler's first choices cost against the best of their candidates, forward and backward, both backends.

Cells are shipped variants at shapes of all kinds (bench/regret_cells.py). All candidates race, in rounds over all
cells, those first that the model predicts to be fast; a time budget cuts the last rounds off, and each row says how far
its own went. Processes without a GPU compile the candidates; each is held against the first choice's values, then timed
alone by a profiler; the fastest and first choices then race in turns, so that heat and clocks fall on all alike.
`python -m bench regret` shows the table, with the choices of the model as it is now.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch.autograd import DeviceType

import attncc as ac
from attncc.runtime.op import AttentionOp
from attncc.schedule import KernelSchedule, Schedule
from attncc.schedule.device import device_of
from bench.ahead import Ahead
from bench.case import Tensors
from bench.check import PEER_TOLERANCE, CheckFailedError, gradients, require
from bench.regret_cells import REACHES, Cell, Plan, Trial, cells, op_of
from bench.run import Run

#: calls of a first look; rounds of the race of the fastest, and calls of each in a round
LOOKS, ROUNDS, CALLS = 3, 3, 3
#: how far behind the best a candidate may be after the first look to be timed again, and how many are at most
CLOSE, CONTENDERS = 1.06, 4
#: the kernels whose times are told apart where a backward is made of two
PARTS = ("dkdv", "dq")


@cache
def _scheduled(variant: str, schedule: Schedule) -> AttentionOp:
    """An op with a given schedule; cells of one variant share it, and its loaded kernels."""
    return AttentionOp(op_of(variant).graph, schedule)


class Bench:
    """The tensors of one cell, and its direction with any schedule."""

    def __init__(self, cell: Cell):
        self.cell = cell
        self.q, self.k, self.v = cell.shape.tensors()
        self.inputs: dict[str, Any] = cell.case.inputs(cell.shape, "cuda")

    def call(self, schedule: Schedule) -> Callable[[], Tensors]:
        """The direction, to be called again and again."""
        op = _scheduled(self.cell.variant, schedule)
        if self.cell.mode == "forward":

            def forward() -> Tensors:
                with torch.no_grad():
                    return {"out": op(self.q, self.k, self.v, **self.inputs)}

            return forward
        out = op(self.q, self.k, self.v, **self.inputs)
        grad = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda", dtype=out.dtype)
        wanted = {"dq": self.q, "dk": self.k, "dv": self.v}
        return lambda: gradients(out, grad, wanted, retain_graph=True)


def device_us(call: Callable[[], object], calls: int) -> dict[str, float]:
    """Microseconds that a call keeps the GPU busy, with "all" kernels and with those of PARTS, by a profiler."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    ran = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    if not ran:
        raise RuntimeError("the profiler saw no kernel")
    kernels = [(event.name, event.time_range.start, event.time_range.end) for event in ran]
    parts = {part: [(a, b) for name, a, b in kernels if name.startswith(f"{part}_kernel")] for part in PARTS}
    return {name: busy(spans) / calls for name, spans in {"all": [(a, b) for _, a, b in kernels], **parts}.items()}


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of these spans lasts: a kernel may begin while the one before it still runs, as what merges
    the parts of a row does."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, until), 0.0)
        until = max(until, end)
    return total


@dataclass(frozen=True)
class Times:
    """What was measured of one cell, in microseconds: directions by the one kernel that makes them, else the two
    kernels of a backward apart, and what is launched beside those."""

    whole: dict[KernelSchedule, float]
    parts: dict[str, dict[KernelSchedule, float]]
    beside: list[float]

    def note(self, trial: Trial, us: dict[str, float]) -> None:
        """Take down a trial; a later measurement replaces an earlier one."""
        s = trial.schedule
        if trial.whole:
            self.whole[s.forward if trial.mode == "forward" else s.dkdv] = us["all"]
            return
        for part, ks in (("dkdv", s.dkdv), ("dq", s.dq)):
            self.parts[part][ks] = us[part]
        self.beside.append(us["all"] - us["dkdv"] - us["dq"])

    def of(self, trial: Trial) -> float:
        """The time of a direction."""
        s = trial.schedule
        if trial.whole:
            return self.whole[s.forward if trial.mode == "forward" else s.dkdv]
        return self.parts["dkdv"][s.dkdv] + self.parts["dq"][s.dq] + statistics.median(self.beside)

    def row(self) -> dict[str, Any]:
        """As it stands in a result row."""

        def listed(times: dict[KernelSchedule, float]) -> list[dict[str, Any]]:
            return [{**ks.to_json(), "us": round(us, 2)} for ks, us in sorted(times.items(), key=lambda item: item[1])]

        beside = {"beside_us": round(statistics.median(self.beside), 2)} if self.beside else {}
        return {"whole": listed(self.whole), **{part: listed(self.parts[part]) for part in PARTS}, **beside}


class Standing:
    """How the race of one cell stands."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.first, self.used = Trial(plan.model, plan.cell.mode), Trial(plan.used, plan.cell.mode)
        self.times, self.failed = Times({}, {part: {} for part in PARTS}, []), dict[str, str]()
        self.rounds = 0

    def race(self, number: int) -> None:
        """Time the candidates of a round; then the fastest of all so far again, where this round brought one."""
        bench, times = Bench(self.plan.cell), self.times
        expected = {name: t.float() for name, t in bench.call(self.plan.model)().items()}
        before = set() if not number else {trial.kernels[trial.mode] for trial in self.contenders()}
        for trial in (self.first, self.used, *self.plan.rounds[number]):
            if _known(times, trial) or _name(trial) in self.failed:
                continue
            try:
                call = bench.call(trial.schedule)
                _agree(call(), expected)
                times.note(trial, device_us(call, LOOKS))
            except (CheckFailedError, RuntimeError, ac.AttnccError) as error:
                self.failed[_name(trial)] = f"{type(error).__name__}: {error}"[:300]
        self.rounds = number + 1
        again = self.contenders()
        if {trial.kernels[trial.mode] for trial in again} <= before:
            return
        taken: dict[Trial, list[dict[str, float]]] = {trial: [] for trial in again}
        for _ in range(ROUNDS):
            for trial in again:
                taken[trial].append(device_us(bench.call(trial.schedule), CALLS))
        for trial, rounds in taken.items():
            times.note(trial, {name: statistics.median(us[name] for us in rounds) for name in rounds[0]})

    def contenders(self) -> list[Trial]:
        """The first choices, and what was nearly as fast as the best."""
        plan, times, mode = self.plan, self.times, self.plan.cell.mode
        rivals = [trial for trials in plan.rounds[: self.rounds] for trial in trials]
        rivals = [trial for trial in rivals if trial.whole and _known(times, trial)]
        if all(times.parts.values()):
            dkdv, dq = (min(times.parts[part], key=times.parts[part].__getitem__) for part in PARTS)
            rivals.append(Trial(replace(plan.model, dkdv=dkdv, dq=dq, origin="user"), mode))
        best = min((times.of(trial) for trial in rivals), default=0.0)
        rivals = sorted((trial for trial in rivals if times.of(trial) <= CLOSE * best), key=times.of)
        distinct = {trial.kernels[mode]: trial for trial in (self.first, self.used, *rivals[:CONTENDERS])}
        return [trial for trial in distinct.values() if _known(times, trial)]

    def row(self) -> dict[str, Any]:
        """The row of the result file. `reach`: every candidate raced that the model predicts to take up to so many
        times what its first choice takes; null where all did. `left_out`: the pieces of work beyond."""
        plan, times = self.plan, self.times
        left = sum(map(len, plan.rounds[self.rounds :]))
        return {
            "digest": op_of(plan.cell.variant).graph.digest,
            "model": {kernel: plan.model.of(kernel).to_json() for kernel in ("forward", "dkdv", "dq")},
            "used": {kernel: plan.used.of(kernel).to_json() for kernel in ("forward", "dkdv", "dq")},
            "origin": plan.used.origin,
            "us": round(times.of(self.first), 2),
            "best_us": round(min(times.of(trial) for trial in self.contenders()), 2),
            "measured": times.row(),
            "failed": self.failed,
            "reach": REACHES[self.rounds - 1] if left else None,
            "left_out": left,
        }


def _known(times: Times, trial: Trial) -> bool:
    """Was it timed already, as the model's choice or a shipped one?"""
    s = trial.schedule
    if trial.whole:
        return (s.forward if trial.mode == "forward" else s.dkdv) in times.whole
    return s.dkdv in times.parts["dkdv"] and s.dq in times.parts["dq"]


def _name(trial: Trial) -> str:
    s = trial.schedule
    return str(s.forward) if trial.mode == "forward" else str(s.dkdv) if trial.whole else f"{s.dkdv} | {s.dq}"


def _agree(actual: Tensors, expected: Tensors) -> None:
    """CheckFailedError where results are not the first choice's; in float32, for there are many."""
    errors = {}
    for name, want in expected.items():
        difference = (actual[name].float() - want).square().mean().sqrt()
        errors[name] = float(difference / want.square().mean().sqrt())
    require(errors, PEER_TOLERANCE, "the first choice")


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("regret")
    variants, lengths = run.options.get("variant"), run.options.get("length")
    chosen = [c for c in cells() if (not variants or c.variant in variants) and (not lengths or c.shape.m in lengths)]
    ahead = Ahead(run.take(chosen, quick=4), device_of("cuda"), run.options["workers"])
    standings: dict[Cell, Standing] = {}
    rows: dict[Cell, dict[str, Any]] = {}
    try:
        for plan, number in ahead.ready(max(run.budget.seconds - run.budget.elapsed(), 1.0)):
            if run.out_of_time(results, f"round {number + 1} of {plan.cell}"):
                break
            if "error" in rows.get(plan.cell, ()):
                continue
            _go_on(run, results, rows, standings.setdefault(plan.cell, Standing(plan)), number)
            print("{:6.1f} s, {} of {} compiled".format(run.budget.elapsed(), *ahead.compiled))
            torch.cuda.synchronize()  # raises where a candidate took the GPU with it: no other can be timed
    finally:
        ahead.close()
    columns = ["cell", "direction", "first choice", "us", "best us", "regret", "timed", "reach"]
    lines = [_line(standings[cell], row) for cell, row in rows.items() if "error" not in row]
    run.show(f"regret, {results.meta['gpu']}", columns, lines)


def _go_on(run: Run, results: Any, rows: dict[Cell, dict[str, Any]], standing: Standing, number: int) -> None:
    """A round of one cell; its row is written anew, and keeps what earlier rounds found if this one fails."""
    cell = standing.plan.cell
    head = {"case": cell.variant, **cell.shape.row(), "mode": cell.mode}
    before = rows.get(cell)
    try:
        standing.race(number)
        found = {**head, **standing.row()}
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        found = {**head, "error": what} if before is None else {**before, "stopped": what}
        run.failures.append(f"regret: {cell} {cell.mode}: {error}")
    if before is None:
        rows[cell] = results.add(**found)
    else:
        before.update(found)
        results.write()
    said = [str(cell), cell.mode, found["error"]] if "error" in found else _line(standing, found)
    print(*said, sep="  ", end="; ")


def _line(standing: Standing, row: dict[str, Any]) -> list[str]:
    """The table's line of a cell with its row."""
    times = standing.times
    timed = len(times.whole) + sum(map(len, times.parts.values()))
    reach = "all" if row["reach"] is None else f"{row['reach']:g}x"
    name, share = _name(standing.first), f"{row['us'] / row['best_us'] - 1:.1%}"
    cell = standing.plan.cell
    return [str(cell), cell.mode, name, f"{row['us']:.1f}", f"{row['best_us']:.1f}", share, str(timed), reach]
