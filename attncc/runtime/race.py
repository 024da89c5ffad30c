"""Race candidates: in the order of the model, checked before they may win, recorded as they are measured, resumable.

Nothing here depends on a GPU: candidates are run by a `Stick`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from attncc.errors import ScheduleError
from attncc.runtime.trial import Beside, Trial, fastest, with_tiling
from attncc.schedule.cache import Cache
from attncc.schedule.choose import choose, facts_of, first_choice, schedule_key, sizes_of
from attncc.schedule.cost import Prediction, ranked
from attncc.schedule.device import Device
from attncc.schedule.problem import Backend, Kernel, KernelSchedule, Problem, Schedule

#: candidates that are compiled side by side, and how many of these are new at least, behind the first choices
BATCH, AT_ONCE = 12, 6
#: how much slower than predicted a candidate is taken to be for each one of the same tile that came before it
ALIKE = 0.05
#: seconds that a candidate is taken to need before any was measured
FIRST_GUESS = 2.0


class TrialError(Exception):
    """A candidate that cannot win: it is wrong, or it does not run. The text says which."""


class LostDeviceError(Exception):
    """A candidate after which this process can use the GPU no more: it read or wrote what is not its own."""


class Stick(Protocol):
    """What candidates are measured with. `check` and `time` raise TrialError for a candidate that may not win, and
    LostDeviceError for one after which no other can be measured."""

    def begin(self, trials: Sequence[tuple[Kernel, Schedule]]) -> None:
        """Start to compile what these need, side by side: each is checked and timed when its turn comes."""

    def check(self, kernel: Kernel, schedule: Schedule) -> None:
        """Hold the kernel's results against the reference, and a second run's bits against the first's."""

    def time(self, kernel: Kernel, schedule: Schedule, best_us: float) -> float:
        """Microseconds of the kernel, alone on the machine; roughly, where it is far behind `best_us`."""


@dataclass(frozen=True)
class Result:
    """The schedule that won, all trials in order and what stood beside them, how many of them were on disk already, and
    how many candidates the budget left unmeasured."""

    schedule: Schedule
    trials: tuple[Trial, ...]
    beside: Beside
    resumed: int
    unmeasured: int = 0

    def best(self, kernel: Kernel) -> Trial | None:
        """The fastest right candidate of a kernel."""
        return fastest(self.trials, kernel)

    @property
    def backward_us(self) -> float | None:
        """The time of the fastest backward."""
        found = self.beside.backward(self.trials)
        return None if found is None else found[0]

    def first(self, kernel: Kernel) -> Trial | None:
        """The cost model's first choice; None where the budget did not reach a candidate of the kernel."""
        return next((t for t in self.trials if t.kernel == kernel), None)


@dataclass(frozen=True)
class Progress:
    """Where a race stands after a trial: how many are done of how many, the best so far, and seconds to go."""

    done: int
    total: int
    last: Trial
    best: Mapping[Kernel, Trial]
    seconds_left: float


def race(
    problem: Problem,
    device: Device,
    kernels: Iterable[Kernel],
    stick: Stick,
    cache: Cache,
    *,
    limit: int | None = None,
    seconds: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
    what: str = "",
    progress: Callable[[Progress], None] | None = None,
    backend: Backend | None = None,
) -> Result:
    """Measure candidates in `order`, at most `limit` of each kernel, for at most `seconds`; at least the model's first
    choices are measured, but for a dq that Gluon's dkdv makes needless. `backend` is that of `candidates`; with None,
    both languages race.

    From the first success on, the best schedule so far is in `cache` after every trial, with all trials: a race that
    is cut off loses nothing, and goes on where it stopped. ScheduleError if a kernel has no candidate that runs and is
    right, or if a candidate took the GPU with it: that one is kept as failed, and the next race goes on behind it.
    """
    start, kernels = clock(), tuple(kernels)
    entries = order(problem, device, kernels, limit, backend)
    lead = len({kernel for kernel, _ in entries[: len(kernels)]})  # first choices that race before anything else
    beside = _beside(entries, choose(problem, device, backend=backend), problem, device)
    entries = _with_incumbent(entries, choose(problem, device, cache, backend), kernels, lead)
    key, head = schedule_key(problem, device), {"sizes": sizes_of(problem), "beside": beside.to_json()}
    known, facts = _known(cache.get(key), head), facts_of(problem, device)
    trials: list[Trial] = []
    spent: list[float] = []  # seconds of each trial that was measured now
    resumed = 0
    begun: set[tuple[Kernel, KernelSchedule]] = set()

    def each() -> float:
        """Seconds of a trial: those of the first choices have more to prepare than others."""
        later = spent[lead:]
        return sum(later) / len(later) if later else min([FIRST_GUESS, *spent])

    def keep() -> None:
        """Write down the trials so far beside those that lie there, of an earlier race or of one that runs now."""
        own = {(t.kernel, t.schedule): t for t in trials}

        def merged(stored: Mapping[str, Any] | None) -> Mapping[str, Any]:
            every = [*trials, *(t for entry, t in _known(stored, head).items() if entry not in own)]
            value = {"kind": "schedule", "schedule": beside.best(every).to_json(), "what": what, **facts, **head}
            return {**value, "us": beside.times(every), "trials": [t.to_json() for t in every]}

        if any(t.us is not None for t in trials):  # what never won is not what calls should use
            cache.update(key, merged)

    for number, (kernel, ks) in enumerate(entries):
        trial = known.get((kernel, ks))
        resumed += trial is not None
        if trial is None:
            began = clock()
            if number >= lead and began - start + each() > seconds:
                break
            try:
                room = BATCH if seconds == float("inf") else max(int((seconds - (began - start)) / each()), 1)
                window = lead - number if number < lead else min(room, BATCH)  # the first results come soon
                ahead = [e for e in entries[number:] if e not in known][:window]
                new = [e for e in ahead if e not in begun]
                if (kernel, ks) in new or len(new) >= AT_ONCE:
                    begun.update(new)
                    stick.begin([(k, beside.asked(k, tiling)) for k, tiling in new])
                trial = _measured(stick, kernel, beside.asked(kernel, ks), fastest(trials, kernel))
            except LostDeviceError as error:
                trials.append(Trial(kernel, ks, None, str(error)))
                keep()
                raise ScheduleError(
                    f"the {kernel} kernel with {ks} took the GPU with it: {error}",
                    kernel=kernel,
                    remedy="it is kept as one that fails; the same command goes on behind it",
                ) from error
            spent.append(clock() - began)
        trials.append(trial)
        if (kernel, ks) not in known:
            keep()
        if progress is not None:
            winners = {k: t for k in kernels if (t := fastest(trials, k)) is not None}
            rest = sum(e not in known for e in entries[number + 1 :]) * each()
            left = min(rest, max(seconds - (clock() - start), 0.0))
            progress(Progress(len(trials), len(entries), trial, winners, left))
    _require(kernels, trials, beside)
    return Result(beside.best(trials), tuple(trials), beside, resumed, len(entries) - len(trials))


def _require(kernels: Sequence[Kernel], trials: Sequence[Trial], beside: Beside) -> None:
    """ScheduleError for what has no candidate that is right. A backward in one kernel needs no dq."""
    whole = beside.backward(trials) is not None
    for kernel in kernels:
        if fastest(trials, kernel) is None and not (whole and kernel in ("dkdv", "dq")):
            failures = {t.failure for t in trials if t.kernel == kernel}
            raise ScheduleError(
                f"no candidate of the {kernel} kernel won: {'; '.join(sorted(failures))}", kernel=kernel
            )


def _beside(
    entries: Sequence[tuple[Kernel, KernelSchedule]], base: Schedule, problem: Problem, device: Device
) -> Beside:
    """The model's first choices as what candidates are measured beside; of kernels that do not race, what calls use."""
    for kernel, ks in dict(reversed(entries)).items():  # of each kernel the first
        base = with_tiling(base, kernel, ks, "model")
    apart = base.dkdv if base.dkdv.backend == "triton" else first_choice("dkdv", problem, device, "triton")
    return Beside(base, apart)


def order(
    problem: Problem,
    device: Device,
    kernels: Sequence[Kernel],
    limit: int | None = None,
    backend: Backend | None = None,
) -> list[tuple[Kernel, KernelSchedule]]:
    """Candidates of all kernels in the order in which they race: in turn, the model's first choices first. Where
    Gluon's dkdv is one, which makes dQ, too, those of dq come last: they matter beside one of Triton's, and where a
    call wants the gradient of a row's input.

    Within a kernel by predicted time. But what the model gets wrong about a tile it gets wrong about all its warps and
    stages, so that each candidate moves back for those of its tile before it: a tenth of the search sees most tiles.
    """
    lanes = {
        kernel: _spread(ranked(kernel, problem, device, backend), first_choice(kernel, problem, device, backend))[
            :limit
        ]
        for kernel in kernels
    }
    late = {"dq"} if lanes.get("dkdv", [])[:1] and lanes["dkdv"][0].backend == "gluon" else set()
    longest = max((len(lane) for lane in lanes.values()), default=0)
    turns = [(i, kernel) for i in range(longest) for kernel in kernels if i < len(lanes[kernel])]
    turns.sort(key=lambda turn: turn[1] in late)
    return [(kernel, lanes[kernel][i]) for i, kernel in turns]


def _spread(found: Sequence[tuple[KernelSchedule, Prediction]], first: KernelSchedule) -> list[KernelSchedule]:
    left, ordered = [e for e in found if e[0] != first], [first]
    alike = Counter([_tile(first)])
    while left:
        chosen = min(left, key=lambda e: e[1].us * (1 + ALIKE * alike[_tile(e[0])]))
        left.remove(chosen)
        ordered.append(chosen[0])
        alike[_tile(chosen[0])] += 1
    return ordered


def _with_incumbent(
    entries: list[tuple[Kernel, KernelSchedule]], incumbent: Schedule, kernels: Sequence[Kernel], lead: int
) -> list[tuple[Kernel, KernelSchedule]]:
    """The race with what calls use now, behind the model's first choices: no winner is slower."""
    known = set(entries)
    now = [(kernel, incumbent.of(kernel)) for kernel in kernels]
    return [*entries[:lead], *(e for e in now if e not in known), *entries[lead:]]


def _tile(ks: KernelSchedule) -> tuple[str, int, int]:
    return ks.backend, ks.block_m, ks.block_n


def _measured(stick: Stick, kernel: Kernel, asked: Schedule, best: Trial | None) -> Trial:
    """Hold a candidate against the reference, then time it."""
    ks = asked.of(kernel)
    best_us = best.us if best is not None and best.us is not None else float("inf")
    try:
        stick.check(kernel, asked)
        return Trial(kernel, ks, stick.time(kernel, asked, best_us))
    except TrialError as error:
        return Trial(kernel, ks, None, str(error))


def _known(value: Mapping[str, Any] | None, head: Mapping[str, Any]) -> dict[tuple[Kernel, KernelSchedule], Trial]:
    """The trials of an earlier race at the very same sizes, beside the same tilings."""
    if value is None or any(value.get(name) != wanted for name, wanted in head.items()):
        return {}
    try:
        trials = [Trial.from_json(entry) for entry in value.get("trials", [])]
    except ValueError:
        return {}  # of another version: measured again
    return {(t.kernel, t.schedule): t for t in trials}
