"""How times are taken: the median of do_bench, contestants in turn, so that heat and clocks fall on all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from triton.testing import do_bench

Name = TypeVar("Name")


@dataclass(frozen=True)
class Timing:
    """`ms`: the median over the rounds; `spread`: (slowest - fastest round) / median."""

    ms: float
    spread: float


def race(contestants: Mapping[str, Callable[[], object]], *, rounds: int = 3, rep_ms: int = 80) -> dict[str, Timing]:
    """Time callables that queue GPU work. Each round times every contestant once, in the same order."""
    medians: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            medians[name].append(do_bench(run, warmup=25, rep=rep_ms, return_mode="median"))
    return {
        name: Timing(statistics.median(ms), (max(ms) - min(ms)) / statistics.median(ms)) for name, ms in medians.items()
    }


def host_us(
    contestants: Mapping[Name, Callable[[], object]], *, rounds: int = 15, calls: int = 100
) -> dict[Name, float]:
    """Microseconds of host time a call, the GPU not waited for: those of the fastest round, since whatever else a host
    does only adds to it.

    Each round times every contestant once, in the same order: a host that is shared is slower for seconds at a time.
    """
    taken: dict[Name, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            run()  # of several that take turns in the processor's caches, the one before was another
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            taken[name].append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return {name: min(us) for name, us in taken.items()}


class Budget:
    """Seconds that a run may take. `spent()` is asked between rows, so a row under way is finished."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.start = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.start

    def spent(self) -> bool:
        """Whether the run should stop before its next row."""
        return self.elapsed() > self.seconds
