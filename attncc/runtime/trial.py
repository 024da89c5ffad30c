"""The results of a race: trials of single tilings, and the schedule that they combine to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from attncc.schedule.problem import Kernel, KernelSchedule, Origin, Schedule


@dataclass(frozen=True)
class Trial:
    """One candidate of one kernel: its time in microseconds, or None and why there is none.

    The time of a kernel of the backward is that of the whole backward beside what `Beside` says.
    """

    kernel: Kernel
    schedule: KernelSchedule
    us: float | None
    failure: str = ""

    def to_json(self) -> dict[str, Any]:
        """A plain dict for the cache."""
        return {"kernel": self.kernel, "schedule": self.schedule.to_json(), "us": self.us, "failure": self.failure}

    @classmethod
    def from_json(cls, data: Any) -> Trial:
        """The inverse of `to_json`; ValueError if `data` is something else."""
        if not isinstance(data, dict) or set(data) != {"kernel", "schedule", "us", "failure"}:
            raise ValueError(f"a trial has exactly the fields kernel, schedule, us, failure; got {data!r}")
        if not isinstance(data["us"], int | float | None):
            raise ValueError(f"the time of a trial is a number; got {data['us']!r}")
        return cls(data["kernel"], KernelSchedule.from_json(data["schedule"]), data["us"], str(data["failure"]))


def fastest(trials: Iterable[Trial], kernel: Kernel) -> Trial | None:
    """The fastest right candidate of a kernel."""
    timed = [t for t in trials if t.kernel == kernel and t.us is not None]
    return min(timed, key=lambda t: cast(float, t.us), default=None)


@dataclass(frozen=True)
class Beside:
    """What stands beside a candidate while it is measured: `base`, the model's first choices, from the first trial to
    the last, so that the times of one kernel are comparable whatever was found out about another meanwhile. `apart`: a
    dkdv that leaves dQ to dq, in Triton, for candidates of dq: Gluon's makes dQ, too."""

    base: Schedule
    apart: KernelSchedule

    def asked(self, kernel: Kernel, ks: KernelSchedule) -> Schedule:
        """The schedule in which a candidate is measured."""
        base = with_tiling(self.base, "dkdv", self.apart, "user") if kernel == "dq" else self.base
        return with_tiling(base, kernel, ks, "user")

    def best(self, trials: Iterable[Trial]) -> Schedule:
        """The base with the fastest that the trials know in its place."""
        trials, found = tuple(trials), self.base
        singles: tuple[Kernel, ...] = ("forward", "pair")
        for kernel in singles:
            winner = fastest(trials, kernel)
            if winner is not None:
                found = with_tiling(found, kernel, winner.schedule, "tuned")
        backward = self.backward(trials)
        if backward is not None:
            _, dkdv, dq = backward
            found = replace(found, dkdv=dkdv, dq=dq, origin="tuned")
        return found

    def backward(self, trials: Iterable[Trial]) -> tuple[float, KernelSchedule, KernelSchedule] | None:
        """The fastest backward: its time, and the tilings of dkdv and dq. A backward as it was measured; or the best of
        Triton's dkdv with the best dq, each of which then saves what it saved alone."""
        trials = tuple(trials)
        of_dkdv = fastest((t for t in trials if t.schedule.backend == "triton"), "dkdv")
        of_dq = fastest(trials, "dq")
        # beside Gluon's dkdv, too, calls may want dq: for the gradients of a row's inputs
        own = self.base.dq if of_dq is None else of_dq.schedule
        known = [
            (t.us, t.schedule, own if t.schedule.backend == "gluon" else self.base.dq)
            for t in trials
            if t.kernel == "dkdv" and t.us is not None
        ]
        known += [(t.us, self.apart, t.schedule) for t in trials if t.kernel == "dq" and t.us is not None]
        neither = next((t.us for t in trials if t.kernel == "dq" and t.schedule == self.base.dq), None)
        if of_dkdv is not None and of_dq is not None and neither is not None:
            us = cast(float, of_dkdv.us) + cast(float, of_dq.us) - neither
            known.append((us, of_dkdv.schedule, of_dq.schedule))
        return min(known, key=lambda entry: entry[0], default=None)

    def times(self, trials: Iterable[Trial]) -> dict[str, float]:
        """Microseconds of the fastest "forward" and the fastest "backward", as far as they are known."""
        trials = tuple(trials)
        forward, backward = fastest(trials, "forward"), self.backward(trials)
        found = {} if forward is None else {"forward": cast(float, forward.us)}
        return found if backward is None else {**found, "backward": backward[0]}

    def to_json(self) -> Mapping[str, Any]:
        """What times of the backward's kernels depend on, for the cache."""
        return {"dkdv": self.apart.to_json(), "dq": self.base.dq.to_json(), "first": self.base.dkdv.to_json()}


def with_tiling(schedule: Schedule, kernel: Kernel, ks: KernelSchedule, origin: Origin) -> Schedule:
    """The schedule with one kernel's tiling replaced."""
    changes: dict[str, Any] = {kernel: ks, "origin": origin}
    return replace(schedule, **changes)
