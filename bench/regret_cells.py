"""The cells of the regret table: shipped variants at shapes drawn over lengths, head dimensions, groups and decoding,
and the candidates of each that the scheduler itself weighs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any, Literal

import torch

import attncc as ac
from attncc.runtime.engine import scheduled_sizes
from attncc.runtime.shapes import Bound, bind
from attncc.schedule import Device, KernelSchedule, Problem, Schedule, ranked
from attncc.schedule.choose import choose, first_choice
from attncc.schedule.problem import Kernel
from bench.case import Case, Shape
from bench.suites import variants

Mode = Literal["forward", "backward"]
#: Candidates race in rounds: first those that the model predicts to take up to so many times what its first choice
#: takes, with all of Gluon's, then those up to the next bound, and with the last bound all.
REACHES = (1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, math.inf)

#: variant, heads / key heads, (head dimension of q and k, of v), then (batch, queries, keys) of each shape
_DRAWN: tuple[tuple[str, int, int, int, int, tuple[tuple[int, int, int], ...]], ...] = (
    ("causal", 16, 16, 128, 128, ((32, 512, 512), (8, 2048, 2048), (2, 8192, 8192), (2, 2048, 8192))),
    ("full", 16, 16, 128, 128, ((8, 1024, 1024), (2, 8192, 8192))),
    ("causal", 32, 32, 64, 64, ((8, 2048, 2048), (2, 8192, 8192))),
    ("causal", 32, 8, 128, 128, ((2, 4096, 4096),)),
    ("causal", 28, 4, 128, 128, ((3, 4096, 4096),)),
    ("alibi", 16, 16, 128, 128, ((16, 1024, 1024), (2, 8192, 8192))),
    ("softcap", 16, 16, 128, 128, ((8, 2048, 2048), (2, 8192, 8192))),
    ("sliding_window", 16, 16, 128, 128, ((8, 2048, 2048), (2, 8192, 8192))),
    ("document", 16, 16, 128, 128, ((4, 4096, 4096), (2, 8192, 8192))),
    ("sink", 16, 16, 128, 128, ((4, 4096, 4096),)),
    ("causal", 32, 8, 128, 128, ((2, 1, 65536), (8, 1, 8192), (64, 1, 8192))),
    ("softcap", 32, 8, 128, 128, ((8, 1, 8192), (3, 1, 32768))),
    ("alibi", 32, 8, 128, 128, ((8, 1, 8192),)),
    ("causal", 32, 32, 64, 64, ((8, 4, 8192),)),
    ("sigmoid", 16, 16, 128, 128, ((4, 4096, 4096),)),
    ("relu", 16, 16, 128, 128, ((4, 4096, 4096),)),
    ("gemma2_local", 16, 8, 256, 256, ((2, 8192, 8192),)),
    ("gemma2_global", 16, 8, 128, 128, ((4, 4096, 4096),)),
    ("causal", 8, 8, 256, 256, ((8, 2048, 2048), (2, 8192, 8192))),
    ("causal", 16, 16, 192, 128, ((4, 4096, 4096),)),
    ("causal", 16, 16, 96, 96, ((4, 4096, 4096),)),
    ("full", 32, 32, 64, 64, ((2, 8192, 8192),)),
    ("alibi", 32, 32, 64, 64, ((4, 4096, 4096),)),
    ("causal", 16, 16, 128, 128, ((2, 16384, 16384),)),
    ("softmax1", 16, 16, 128, 128, ((4, 4096, 4096),)),
    ("prefix_lm", 16, 16, 128, 128, ((4, 4096, 4096),)),
    ("taylor", 16, 16, 64, 64, ((4, 4096, 4096),)),
    ("qk_temperature", 16, 16, 128, 128, ((4, 4096, 4096),)),
    ("cog", 16, 16, 128, 128, ((4, 4096, 4096),)),
    ("differential", 16, 16, 128, 128, ((4, 4096, 4096),)),
    ("dense_bias", 16, 16, 64, 64, ((8, 2048, 2048),)),
)


@dataclass(frozen=True)
class Cell:
    """One direction of a shipped variant at one shape; by name, so that it can be sent to another process."""

    variant: str
    shape: Shape
    mode: Mode

    @property
    def family(self) -> tuple[Any, ...]:
        """What cells share whose kernels are the same binaries: lengths and batches are arguments."""
        s = self.shape
        return self.variant, s.d, s.dv, s.group, s.dtype, s.b == 1, s.m == 1, s.h == 1

    @property
    def case(self) -> Case:
        """The variant with its inputs."""
        return _case(self.variant)

    def __str__(self) -> str:
        s = self.shape
        dims = f"{s.d}" if s.d == s.dv else f"{s.d}/{s.dv}"
        length = f"S={s.m}" if s.m == s.n else f"{s.m} x {s.n}"
        group = f" {s.h}/{s.hkv} heads" if s.group > 1 else ""
        return f"{self.variant} D={dims} B={s.b} {length}{group}"


@dataclass(frozen=True)
class Trial:
    """A schedule to be timed for the sake of one or two of its kernels: a forward; a Gluon dkdv, which makes dQ, too;
    or one dkdv and one dq of Triton."""

    schedule: Schedule
    mode: Mode

    @property
    def whole(self) -> bool:
        """Does one kernel make all results of the direction?"""
        return self.mode == "forward" or self.schedule.dkdv.backend == "gluon"

    @property
    def kernels(self) -> dict[Mode, tuple[Any, ...]]:
        """By direction the tilings of what is launched, and the backend of what the generated module has beside them.
        Below a backward there is a forward."""
        s = self.schedule
        forward = (s.forward, s.dkdv.backend)
        if self.mode == "forward":
            return {"forward": forward}
        return {"forward": forward, "backward": (s.dkdv, None if self.whole else s.dq, s.forward.form)}


@dataclass(frozen=True)
class Plan:
    """A cell with all candidates that race in it, round by round of REACHES. `model`: the cost model's own first
    choices; `used`: what a call gets, which may be a shipped schedule."""

    cell: Cell
    model: Schedule
    used: Schedule
    rounds: tuple[tuple[Trial, ...], ...]

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Those of all rounds."""
        return tuple(trial for trials in self.rounds for trial in trials)


@cache
def _case(name: str) -> Case:
    return variants.case(name)


def cells() -> list[Cell]:
    """All cells, those of one family side by side; few queries have no backward."""
    found = []
    for name, heads, kv_heads, d, dv, sizes in _DRAWN:
        for b, m, n in sizes:
            shape = Shape(b=b, h=heads, hkv=kv_heads, m=m, n=n, d=d, dv=dv)
            found += [Cell(name, shape, mode) for mode in (("forward", "backward") if m >= 16 else ("forward",))]
    return found


@cache
def op_of(variant: str) -> Any:
    """The op of a shipped variant over all pairs, with the schedule that the scheduler chooses."""
    return ac.compile(_case(variant).variant, plan="parallel")


def bound_of(cell: Cell) -> tuple[Bound, tuple[torch.Tensor, ...]]:
    """The cell's call on tensors that are never written or read."""
    op, s = op_of(cell.variant), cell.shape
    q, k, v = (
        torch.empty((s.b, heads, length, dim), dtype=s.dtype)
        for heads, length, dim in ((s.h, s.m, s.d), (s.hkv, s.n, s.d), (s.hkv, s.n, s.dv))
    )
    inputs = op.kernel_inputs(q, k, None, cell.case.inputs(s, "cpu"))
    return bind(op.engine.graph, q, k, v, None, inputs), (q, k, v)


def problem_of(cell: Cell) -> Problem:
    """The scheduler's problem."""
    bound, (q, _, _) = bound_of(cell)
    found: Problem = op_of(cell.variant).engine.problem(scheduled_sizes(bound.sizes), q.dtype, bound.scalars)
    return found


def first_choices(problem: Problem, device: Device) -> Schedule:
    """What the cost model chooses by itself: no table, no cache."""
    return Schedule(
        forward=first_choice("forward", problem, device, None),
        dkdv=first_choice("dkdv", problem, device, None),
        dq=first_choice("dq", problem, device),
        pair=first_choice("pair", problem, device) if problem.pairs else None,
    )


def plan(cell: Cell, device: Device) -> Plan:
    """All candidates of a cell that the scheduler weighs, those first that it predicts to be fast."""
    problem = problem_of(cell)
    model, used = first_choices(problem, device), choose(problem, device)
    rounds: list[list[Trial]] = [[] for _ in REACHES]

    def note(ratio: float, **tilings: KernelSchedule) -> None:
        schedule = replace(model, origin="user", **tilings)  # type: ignore[arg-type]
        rounds[next(i for i, reach in enumerate(REACHES) if ratio <= reach)].append(Trial(schedule, cell.mode))

    if cell.mode == "forward":
        times = dict(_predicted("forward", problem, device))
        for ks, us in times.items():
            early = ks.backend == "gluon" or ks == used.forward
            note(1.0 if early else us / times[model.forward], forward=ks)
    else:
        dkdv, dq = (_predicted(kernel, problem, device) for kernel in ("dkdv", "dq"))
        triton = [entry for entry in dkdv if entry[0].backend == "triton"]
        first = dict(dkdv)[model.dkdv] + (dict(dq)[model.dq] if model.dkdv.backend == "triton" else 0.0)
        for ks, _ in dkdv:
            if ks.backend == "gluon":
                note(1.0, dkdv=ks)
        for i in range(max(len(triton), len(dq))):
            pair = triton[i % len(triton)], dq[i % len(dq)]
            # a kernel is told by the fastest backward that it could be part of
            beside = (dq[0][1], triton[0][1]) if triton and dq else (0.0, 0.0)
            early = used.dkdv == pair[0][0] or used.dq == pair[1][0]
            own = [us + b for (_, us), b, new in zip(pair, beside, (i < len(triton), i < len(dq)), strict=True) if new]
            note(1.0 if early else min(own) / first, dkdv=pair[0][0], dq=pair[1][0])
    return Plan(cell, model, used, tuple(map(tuple, rounds)))


def _predicted(kernel: Kernel, problem: Problem, device: Device) -> list[tuple[KernelSchedule, float]]:
    """Every candidate of a kernel in the model's order, with its predicted microseconds. One that the model ranks lower
    than its time, as those that spill, counts as slow as what it stands behind."""
    ordered = ranked(kernel, problem, device, None)
    return list(zip((ks for ks, _ in ordered), accumulate((found.us for _, found in ordered), max), strict=True))
