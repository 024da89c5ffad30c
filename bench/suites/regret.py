"""What the scheduler's first choices cost against the best of their candidates, forward and backward, both backends.

Cells are shipped variants at shapes of all kinds (bench/regret_cells.py). Where Gluon serves, all of its candidates
race beside the best predicted of Triton's; elsewhere Triton's do, to a depth. Processes without a GPU compile them;
each is held against the first choice's values, then timed alone by a profiler; the fastest and first choices then race
in turns, so that heat and clocks fall on all alike. `python -m bench regret` shows the table, with the choices of the
model as it is now.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

import attncc as ac
from attncc.runtime.op import AttentionOp
from attncc.schedule import KernelSchedule, Schedule
from attncc.schedule.device import device_of
from bench.ahead import Ahead
from bench.case import Tensors
from bench.check import PEER_TOLERANCE, CheckFailedError, gradients, require
from bench.regret_cells import Cell, Plan, Trial, cells, op_of
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
    """Microseconds that one of `calls` keeps the GPU busy: "all" kernels, and those of PARTS, read by a profiler."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    found = dict.fromkeys(("all", *PARTS), 0.0)
    for event in profile.key_averages():
        us = event.self_device_time_total / calls
        found["all"] += us
        for part in PARTS:
            if event.key.startswith(f"{part}_kernel"):
                found[part] += us
    if not found["all"]:
        raise RuntimeError("the profiler saw no kernel")
    return found


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


def measure(plan: Plan) -> tuple[Times, dict[str, str]]:
    """Time the candidates of one cell. Returns the times, and why candidates have none."""
    bench = Bench(plan.cell)
    mode = plan.cell.mode
    times, failed = Times({}, {part: {} for part in PARTS}, []), {}
    first = Trial(plan.model, mode)
    expected = {name: t.float() for name, t in bench.call(plan.model)().items()}
    for trial in (first, Trial(plan.used, mode), *plan.trials):
        if _known(times, trial):
            continue
        try:
            call = bench.call(trial.schedule)
            _agree(call(), expected)
            times.note(trial, device_us(call, LOOKS))
        except (CheckFailedError, RuntimeError, ac.AttnccError) as error:
            failed[_name(trial)] = f"{type(error).__name__}: {error}"[:300]
    again = _contenders(times, plan)
    taken: dict[Trial, list[dict[str, float]]] = {trial: [] for trial in again}
    for _ in range(ROUNDS):
        for trial in again:
            taken[trial].append(device_us(bench.call(trial.schedule), CALLS))
    for trial, rounds in taken.items():
        times.note(trial, {name: statistics.median(us[name] for us in rounds) for name in rounds[0]})
    return times, failed


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


def _contenders(times: Times, plan: Plan) -> list[Trial]:
    """The first choices, and what was nearly as fast as the best."""
    mode = plan.cell.mode
    close = [Trial(plan.model, mode), Trial(plan.used, mode)]
    rivals = [trial for trial in plan.trials if trial.whole and _known(times, trial)]
    if all(times.parts.values()):
        dkdv, dq = (min(times.parts[part], key=times.parts[part].__getitem__) for part in PARTS)
        rivals.append(Trial(replace(plan.model, dkdv=dkdv, dq=dq, origin="user"), mode))
    best = min(times.of(trial) for trial in rivals)
    rivals = [trial for trial in rivals if times.of(trial) <= CLOSE * best]
    close += sorted(rivals, key=times.of)[:CONTENDERS]
    distinct = {trial.kernels[mode]: trial for trial in close if _known(times, trial)}
    return list(distinct.values())


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("regret")
    wanted = run.options.get("variant")
    chosen = [cell for cell in cells() if wanted is None or cell.variant in wanted]
    device = device_of("cuda")
    ahead = Ahead(run.take(chosen, quick=4), device, run.options["workers"])
    lines: list[list[str]] = []
    try:
        for plan in ahead.ready(max(run.budget.seconds - run.budget.elapsed(), 1.0)):
            if run.out_of_time(results, str(plan.cell)):
                break
            lines += _row(run, results, plan, ahead)
    finally:
        ahead.close()
    columns = ["cell", "direction", "first choice", "us", "best us", "regret", "timed", "left out"]
    run.show(f"regret, {results.meta['gpu']}", columns, lines)


def _row(run: Run, results: Any, plan: Plan, ahead: Ahead) -> list[list[str]]:
    """Measure one cell and write its row. Returns the table's line, none where it failed."""
    cell = plan.cell
    head = {"case": cell.variant, **cell.shape.row(), "mode": cell.mode}
    try:
        times, failed = measure(plan)
        rivals = [t for t in (Trial(plan.model, cell.mode), *_contenders(times, plan)) if _known(times, t)]
        first, best = times.of(Trial(plan.model, cell.mode)), min(times.of(trial) for trial in rivals)
    except Exception as error:
        run.fail(results, f"{cell} {cell.mode}", error, **head)
        return []
    results.add(
        **head,
        digest=op_of(cell.variant).graph.digest,
        model={kernel: plan.model.of(kernel).to_json() for kernel in ("forward", "dkdv", "dq")},
        used={kernel: plan.used.of(kernel).to_json() for kernel in ("forward", "dkdv", "dq")},
        origin=plan.used.origin,
        us=round(first, 2),
        best_us=round(best, 2),
        measured=times.row(),
        failed=failed,
        left_out=plan.left_out,
    )
    timed = len(times.whole) + sum(map(len, times.parts.values()))
    share = f"{first / best - 1:.1%}"
    compiled = "{} of {} compiled".format(*ahead.compiled)
    print(f"{run.budget.elapsed():6.1f} s  {cell} {cell.mode}: {first:.1f} us, best {best:.1f}, {share}; {compiled}")
    name = _name(Trial(plan.model, cell.mode))
    return [[str(cell), cell.mode, name, f"{first:.1f}", f"{best:.1f}", share, str(timed), str(plan.left_out)]]
