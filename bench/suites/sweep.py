"""Every candidate schedule of each kernel, timed: what the cost model's first choice gives away, and what is best.

Cells are cases x head dimensions x lengths x query heads a key head (--variant, --head-dim, --length, --group); each
head dimension has a file of its own, `sweep-d128.json`. `--tiling dkdv=64x128/8/2` (rows x columns / warps / stages)
times this one, and others named so, instead of every candidate of its kernel; `dkdv@64=64x64/4/2` in cells of head
dimension 64 alone. Candidates are compiled first, in many processes that share Triton's disk cache; then each runs here
alone, and a profiler reads the time of each kernel, so that one run times one candidate of all three. A candidate that
cannot run, or whose result differs, is listed with its error.
"""

from __future__ import annotations

import itertools
import multiprocessing
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    group: int = 1

    @property
    def shape(self) -> Shape:
        """32k tokens, and as many heads as make 2048 channels."""
        heads = 2048 // self.head_dim
        batch = max(1, TOKENS // self.length)
        return Shape(b=batch, h=heads, hkv=heads // self.group, m=self.length, d=self.head_dim)

    def __str__(self) -> str:
        group = f" G={self.group}" if self.group > 1 else ""
        return f"{self.case} D={self.head_dim} S={self.length}{group}"


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


def precompile(cell: Cell, schedule: Schedule | None) -> str | None:
    """In another process: compile and run once, into the shared cache. Returns what went wrong, or None."""
    try:
        bench = Bench(cell)
        bench.run(bench.compile(schedule))
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return None


def compile_all(schedules: Mapping[Cell, list[Schedule]], workers: int) -> None:
    """Fill Triton's disk cache with every schedule of every cell, and with what a user of each gets."""
    jobs = [(cell, schedule) for cell, found in schedules.items() for schedule in (None, *found)]
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(precompile, *job) for job in jobs]
        for done, future in enumerate(as_completed(waiting), 1):
            future.result()
            print(f"\rcompiled {done} of {len(jobs)}", end="", flush=True)
    print()


def measure(bench: Bench, schedule: Schedule, expected: Tensors) -> dict[Kernel, float]:
    """Check a schedule's results against the default schedule's, then time its kernels."""
    op = bench.compile(schedule)
    actual = bench.run(op)
    errors = {name: relative_rms(actual[name], expected[name]) for name in expected}
    require(errors, PEER_TOLERANCE, "the default schedule")
    return kernel_us(lambda: bench.run(op))


def asked_for(tilings: Iterable[str], head_dim: int) -> dict[Kernel, list[KernelSchedule]]:
    """The tilings that the command line names for a head dimension, by kernel; SystemExit if one is not
    KERNEL=MxN/WARPS/STAGES or KERNEL@DIM=MxN/WARPS/STAGES."""
    found: dict[Kernel, list[KernelSchedule]] = {}
    for text in tilings:
        parts = re.fullmatch(r"(forward|dkdv|dq)(?:@(\d+))?=(\d+)x(\d+)/(\d+)/(\d+)", text)
        if parts is None:
            raise SystemExit(f"--tiling {text}: write e.g. dkdv=64x128/8/2, rows x columns / warps / stages")
        kernel: Any = parts[1]
        if parts[2] is None or int(parts[2]) == head_dim:
            found.setdefault(kernel, []).append(KernelSchedule(*(int(number) for number in parts.groups()[2:])))
    return found


def schedules_of(cell: Cell, run: Run) -> list[Schedule]:
    """The schedules to time in one cell: in them is each candidate, or each tiling that the command line names."""
    bench = Bench(cell)
    candidates = {
        **ours.every_candidate(bench.compile(), bench.q, bench.k, bench.v, bench.inputs),
        **asked_for(run.options.get("tiling") or (), cell.head_dim),
    }
    if run.quick:
        candidates = {kernel: found[:4] for kernel, found in candidates.items()}
    return list(rotate(candidates))


def sweep(cell: Cell, schedules: list[Schedule], run: Run, results: Results) -> list[list[str]]:
    """Time all schedules of one cell; one result row a kernel. Returns the lines of the table."""
    bench = Bench(cell)
    op = bench.compile()
    expected = bench.run(op)
    default_us = kernel_us(lambda: bench.run(op))
    default = ours.schedule_of(op, bench.q, bench.k, bench.v, **bench.inputs)
    taken: dict[Kernel, dict[KernelSchedule, float]] = {
        kernel: {default.of(kernel): default_us[kernel]} for kernel in KERNELS
    }
    failed: dict[Kernel, dict[KernelSchedule, str]] = {kernel: {} for kernel in KERNELS}

    def note(schedule: Schedule, kernels: tuple[Kernel, ...]) -> str | None:
        try:
            us = measure(bench, schedule, expected)
        except (CheckFailedError, RuntimeError, ac.AttnccError) as error:
            return f"{type(error).__name__}: {error}"[:300]
        for kernel in kernels:
            taken[kernel][schedule.of(kernel)] = us[kernel]
        return None

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
    names = run.options.get("variant") or ["causal"]
    unknown = set(names) - set(CASES)
    if unknown:
        raise SystemExit(f"no case is called {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    head_dims = run.options.get("head_dim") or [128]
    lengths = run.options.get("length") or [8192]
    groups = run.options.get("group") or [1]
    cells = [Cell(*each) for each in itertools.product(names, head_dims, lengths, groups)]
    schedules = {cell: schedules_of(cell, run) for cell in cells}
    compile_all(schedules, run.options["workers"])
    columns = ["cell", "kernel", "default", "best", "default us", "best us", "regret", "timed + failed"]
    for head_dim in head_dims:
        results = run.results(f"sweep-d{head_dim}")
        lines = []
        for cell in (cell for cell in cells if cell.head_dim == head_dim):
            if run.out_of_time(results, str(cell)):
                break
            try:
                lines += sweep(cell, schedules[cell], run, results)
            except Exception as error:
                run.fail(results, str(cell), error, case=cell.case, **cell.shape.row())
        run.show(f"{results.suite}, {results.meta['gpu']}", columns, lines)
