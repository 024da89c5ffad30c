"""Every candidate schedule of each kernel, timed: what the cost model's first choice gives away, and what is best.

Cells are cases x head dimensions x lengths (--variant, --head-dim, --length). Candidates are compiled first, in many
processes that share Triton's disk cache; then each runs here alone, and a profiler reads the time of each kernel, so
that one run times one candidate of all three. A candidate that cannot run, or whose result differs, is listed with its
error.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

import torch

import attncc as ac
from attncc.schedule.problem import KERNELS, Kernel, KernelSchedule, Schedule
from bench import ours
from bench.case import Case, Shape, Tensors
from bench.check import PEER_TOLERANCE, CheckFailedError, gradients, relative_rms, require
from bench.dense_cases import DENSE
from bench.record import Results
from bench.run import Run
from bench.suites.dense import TOKENS
from bench.suites.sigmoid import SIGMOID

CASES = {case.name: case for case in (*DENSE, SIGMOID)}
REPEATS = 5


@dataclass(frozen=True)
class Cell:
    """One variant at one shape, by name, so that it can be sent to another process."""

    case: str
    head_dim: int
    length: int

    @property
    def shape(self) -> Shape:
        """32k tokens, and as many heads as make 2048 channels."""
        return Shape(b=max(1, TOKENS // self.length), h=2048 // self.head_dim, m=self.length, d=self.head_dim)

    def __str__(self) -> str:
        return f"{self.case} D={self.head_dim} S={self.length}"


class Bench:
    """The tensors of one cell, and forward and backward of an op on them."""

    def __init__(self, cell: Cell):
        self.case: Case = CASES[cell.case]
        self.q, self.k, self.v = cell.shape.tensors()
        self.inputs: Tensors = self.case.inputs(cell.shape, "cuda")
        self.grad = torch.randn_like(self.q)

    def compile(self, schedule: Schedule | None = None) -> Any:
        """The op of the cell's variant; without a schedule, as a user gets it."""
        return ac.compile(self.case.variant, schedule=schedule)

    def run(self, op: Any) -> Tensors:
        """out and the gradients of q, k, v."""
        out = op(self.q, self.k, self.v, **self.inputs)
        return {"out": out.detach(), **gradients(out, self.grad, {"dq": self.q, "dk": self.k, "dv": self.v})}


def kernel_us(call: Callable[[], object]) -> dict[Kernel, float]:
    """Microseconds of each of the three kernels in one `call`: the mean of a few calls, read by a profiler."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(REPEATS):
            call()
        torch.cuda.synchronize()
    found: dict[Kernel, float] = {}
    for event in profile.key_averages():
        for kernel in KERNELS:
            if event.key.startswith(f"{kernel}_kernel"):
                found[kernel] = event.self_device_time_total / REPEATS
    missing = set(KERNELS) - set(found)
    if missing:
        raise RuntimeError(f"the profiler saw no kernel of {', '.join(sorted(missing))}")
    return found


def rotate(candidates: dict[Kernel, list[KernelSchedule]]) -> Iterator[Schedule]:
    """Schedules in which every candidate of every kernel occurs, as few as possible; short lists start over."""
    longest = max(len(each) for each in candidates.values())
    columns = (itertools.islice(itertools.cycle(candidates[kernel]), longest) for kernel in KERNELS)
    for forward, dkdv, dq in zip(*columns, strict=True):
        yield Schedule(forward, dkdv, dq, origin="user")


def precompile(cell: Cell, schedule: Schedule) -> str | None:
    """In another process: compile and run once, into the shared cache. Returns what went wrong, or None."""
    try:
        bench = Bench(cell)
        bench.run(bench.compile(schedule))
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return None


def measure(bench: Bench, schedule: Schedule, expected: Tensors) -> dict[Kernel, float]:
    """Check a schedule's results against the default schedule's, then time its kernels."""
    op = bench.compile(schedule)
    actual = bench.run(op)
    errors = {name: relative_rms(actual[name], expected[name]) for name in expected}
    require(errors, PEER_TOLERANCE, "the default schedule")
    return kernel_us(lambda: bench.run(op))


def sweep(cell: Cell, run: Run, results: Results) -> list[list[str]]:
    """Time all candidates of one cell; one result row a kernel. Returns the lines of the table."""
    bench = Bench(cell)
    op = bench.compile()
    expected = bench.run(op)
    default_us = kernel_us(lambda: bench.run(op))
    default = ours.schedule_of(op, bench.q, bench.k, bench.v, bench.inputs)
    candidates = ours.every_candidate(op, bench.q, bench.k, bench.v, bench.inputs)
    if run.quick:
        candidates = {kernel: found[:4] for kernel, found in candidates.items()}
    taken: dict[Kernel, dict[KernelSchedule, float]] = {kernel: {} for kernel in KERNELS}
    failed: dict[Kernel, dict[KernelSchedule, str]] = {kernel: {} for kernel in KERNELS}

    def note(schedule: Schedule, kernels: tuple[Kernel, ...]) -> str | None:
        try:
            us = measure(bench, schedule, expected)
        except (CheckFailedError, RuntimeError, ac.AttnccError) as error:
            return f"{type(error).__name__}: {error}"[:300]
        for kernel in kernels:
            taken[kernel][schedule.of(kernel)] = us[kernel]
        return None

    schedules = list(rotate(candidates))
    workers = min(run.options["workers"], len(schedules))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(precompile, cell, schedule) for schedule in schedules]
        for done, future in enumerate(as_completed(waiting), 1):
            future.result()
            print(f"\r{cell}: compiled {done} of {len(schedules)}", end="", flush=True)
    print()
    for schedule in schedules:
        if run.budget.spent():
            break
        if note(schedule, KERNELS) is None:
            continue
        for kernel in KERNELS:  # one of the three is to blame: each alone, beside the defaults of the others
            alone = replace(default, **{kernel: schedule.of(kernel)}, origin="user")
            if schedule.of(kernel) not in taken[kernel] and (error := note(alone, (kernel,))) is not None:
                failed[kernel][schedule.of(kernel)] = error

    lines = []
    for kernel in KERNELS:
        ranked = sorted(taken[kernel].items(), key=lambda item: item[1])
        if not ranked:
            continue
        best, best_us = ranked[0]
        regret = default_us[kernel] / best_us - 1
        results.add(
            case=cell.case,
            **cell.shape.row(),
            kernel=kernel,
            digest=op.graph.digest,
            default={**default.of(kernel).to_json(), "us": round(default_us[kernel], 2)},
            best={**best.to_json(), "us": round(best_us, 2)},
            regret=round(regret, 4),
            measured=[{**ks.to_json(), "us": round(us, 2)} for ks, us in ranked],
            failed=[{**ks.to_json(), "error": error} for ks, error in failed[kernel].items()],
        )
        figures = [f"{default_us[kernel]:.0f}", f"{best_us:.0f}", f"{regret:.1%}"]
        counts = f"{len(ranked)} + {len(failed[kernel])}"
        lines.append([str(cell), kernel, str(default.of(kernel)), str(best), *figures, counts])
    return lines


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("sweep")
    names = run.options.get("variant") or ["causal"]
    unknown = set(names) - set(CASES)
    if unknown:
        raise SystemExit(f"no case is called {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    cells = itertools.product(names, run.options.get("head_dim") or [128], run.options.get("length") or [8192])
    lines = []
    for cell in (Cell(*cell) for cell in cells):
        if run.out_of_time(results, str(cell)):
            break
        try:
            lines += sweep(cell, run, results)
        except Exception as error:
            run.fail(results, str(cell), error, case=cell.case, **cell.shape.row())
    columns = ["cell", "kernel", "default", "best", "default us", "best us", "regret", "timed + failed"]
    run.show(f"sweep, {results.meta['gpu']}", columns, lines)
