"""The launch parameters of a kind of call, and an inspection of its kernels once they are compiled."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from attncc.runtime.compiler import spilled_bytes
from attncc.schedule.cache import Cache
from attncc.schedule.device import Device
from attncc.schedule.problem import Kernel, KernelSchedule, Problem, Schedule
from attncc.schedule.spills import note_spills


@dataclass(frozen=True)
class Prepared:
    """The launch of a kind of call: the module, the launch parameters of its schedule, and the constants of its
    kernels.

    `chosen_for`: the problem and device of a schedule that was chosen by the model, neither given nor measured here.
    `started`: kernels that are compiled or being compiled, each with its companions. `ran`: the kernels that a call
    has run or is about to run."""

    module: ModuleType
    schedule: Schedule
    meta: dict[str, dict[str, int]]
    options: dict[str, Any]
    interpreted: bool
    chosen_for: tuple[Problem, Device] | None = None
    started: dict[Kernel, list[Future[Any]]] = field(default_factory=dict)
    ran: set[Kernel] = field(default_factory=set)

    def kept_in(self, schedule: Schedule) -> Schedule:
        """A schedule with the tilings of the kernels that ran, so that later calls have the same bits."""
        return replace(schedule, **{kernel: getattr(self.schedule, kernel) for kernel in self.ran})


def spills_anew(prepared: Prepared, kernels: tuple[Kernel, ...], cache: Cache) -> bool:
    """Whether one of these kernels spills although its tiling was not expected to. The spill is recorded. Waits for
    compilation."""
    if prepared.chosen_for is None:
        return False
    problem, device = prepared.chosen_for
    found: dict[tuple[Kernel, KernelSchedule], int] = {}
    for kernel in kernels:
        # what does not compile fails again at its launch, with its reason
        started = [future.result() for future in prepared.started.get(kernel, ()) if future.exception() is None]
        if started and not problem.spilled(kernel, tiling := prepared.schedule.of(kernel)):
            found[kernel, tiling] = max(map(spilled_bytes, started))
    return note_spills(found, problem, device, cache)
