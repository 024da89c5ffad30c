"""Race candidates: in the order of the model, checked before they may win, recorded as they are measured, resumable.

Nothing here depends on a GPU: candidates are run by a `Stick`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from attncc.errors import ScheduleError
from attncc.runtime.trial import Beside, Trial, fastest, with_tiling
from attncc.schedule.cache import Cache
from attncc.schedule.choose import choose, facts_of, first_choice, schedule_key, sizes_of
from attncc.schedule.cost import Prediction, ranked
from attncc.schedule.device import Device
from attncc.schedule.problem import Backend, Kernel, KernelSchedule, Problem, Schedule

#: most candidates that compile ahead in parallel, and least number of new ones to start at once (after the first
#: choices)
BATCH, AT_ONCE = 12, 6
#: ordering: a candidate's predicted time grows by this share for each earlier candidate of the same tile
ALIKE = 0.05
#: expected seconds of a trial before any was measured
FIRST_GUESS = 2.0
#: races that end without a word while a candidate is under way, before it is taken for the reason
FALLS = 2


class TrialError(Exception):
    """A candidate that cannot win: its results are wrong, or it does not run."""


class LostDeviceError(Exception):
    """A candidate after which this process can no longer use the GPU: it accessed memory out of bounds."""


class Stick(Protocol):
    """Runs candidates. `check` and `time` raise TrialError for a candidate that may not win, and LostDeviceError for
    one after which no other can be measured."""

    def begin(self, trials: Sequence[tuple[Kernel, Schedule]]) -> None:
        """Start to compile these candidates in parallel; each is checked and timed later."""

    def check(self, kernel: Kernel, schedule: Schedule) -> None:
        """Check the kernel's results against the reference, and a second run for bitwise equality."""

    def time(self, kernel: Kernel, schedule: Schedule, best_us: float) -> float:
        """Microseconds of the kernel, alone on the machine; only roughly if it is far slower than `best_us`."""


@dataclass(frozen=True)
class Result:
    """The winning schedule, all trials in order, the schedules they ran `beside`, the number of trials that were
    resumed from disk, and the number of candidates left unmeasured for lack of time."""

    schedule: Schedule
    trials: tuple[Trial, ...]
    beside: Beside
    resumed: int
    unmeasured: int = 0

    def best(self, kernel: Kernel) -> Trial | None:
        """The fastest correct candidate of a kernel, or None."""
        return fastest(self.trials, kernel)

    @property
    def backward_us(self) -> float | None:
        """Microseconds of the fastest backward, or None."""
        found = self.beside.backward(self.trials)
        return None if found is None else found[0]

    def first(self, kernel: Kernel) -> Trial | None:
        """The cost model's first choice, or None if no candidate of the kernel was measured."""
        return next((t for t in self.trials if t.kernel == kernel), None)


@dataclass(frozen=True)
class Progress:
    """The standing after a trial: trials done and in total, the last one, the best so far per kernel, and seconds
    left."""

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
    """Measure candidates in `order`, at most `limit` per kernel, for at most `seconds`. The model's first choices are
    always measured, except for a dq that Gluon's dkdv makes unnecessary. `backend` is that of `candidates`; with None,
    both languages race. `what` describes the race in the cache; `progress` is called after every trial.

    From the first success on, `cache` has the best schedule so far and all trials after every trial, so that the same
    call continues a race that was cut off. ScheduleError: a kernel has no candidate that runs and is right, or a
    candidate made the GPU unusable; that one is recorded as failed, and the next race continues after it. So it
    does after a candidate with which two races ended without a word, as they do if it hangs until they are killed.
    """
    start, kernels = clock(), tuple(kernels)
    entries = order(problem, device, kernels, limit, backend)
    lead = len({kernel for kernel, _ in entries[: len(kernels)]})
    beside = _beside(entries, choose(problem, device, backend=backend), problem, device)
    entries = _with_incumbent(entries, choose(problem, device, cache, backend), kernels, lead)
    record = _Record(cache, schedule_key(problem, device), problem, device, beside, what)
    running = _Race(entries, lead, beside, stick, clock, start, seconds, record)
    for number, (kernel, ks) in enumerate(entries):
        known = record.known.get((kernel, ks))
        if known is None and running.out_of_time(number):
            break
        running.trials.append(known or running.measured(number))
        if known is None:
            record.keep(running.trials)
        if progress is not None:
            progress(running.progress(kernels))
    trials = tuple(running.trials)
    _require(kernels, trials, beside)
    resumed = len(trials) - len(running.spent)
    return Result(beside.best(trials), trials, beside, resumed, len(entries) - len(trials))


class _Record:
    """The trials of a race in the cache: those of an earlier race (`known`), and how new ones are added. Beside them is
    the candidate under way, for a process that is killed cannot say what it was doing."""

    def __init__(self, cache: Cache, key: str, problem: Problem, device: Device, beside: Beside, what: str):
        self._cache, self._key, self._beside, self._what = cache, key, beside, what
        self._head = {"sizes": sizes_of(problem), "beside": beside.to_json()}
        self._facts = facts_of(problem, device)
        stored = cache.get(key)
        self._fallen = _fallen(stored)
        given_up = {e: Trial(*e, None, _GIVEN_UP) for e, times in self._fallen.items() if times >= FALLS}
        self.known = given_up | _known(stored, self._head)

    def keep(self, trials: Sequence[Trial], under_way: tuple[Kernel, KernelSchedule] | None = None) -> None:
        """Merge the trials so far with those in the cache, of an earlier race or of one that runs now. Nothing is
        written before the first success, because calls would use it."""
        if all(t.us is None for t in trials):
            return
        own = {(t.kernel, t.schedule): t for t in trials}

        def merged(stored: Mapping[str, Any] | None) -> Mapping[str, Any]:
            every = [*trials, *(t for entry, t in _known(stored, self._head).items() if entry not in own)]
            best = self._beside.best(every).to_json()
            value = {"kind": "schedule", "schedule": best, "what": self._what, **self._facts, **self._head}
            value |= {"us": self._beside.times(every), "trials": [t.to_json() for t in every]}
            if under_way is not None:
                kernel, ks = under_way
                value["under_way"] = [kernel, ks.to_json(), self._fallen.get(under_way, 0) + 1]
            return value

        self._cache.update(self._key, merged)


@dataclass(eq=False)
class _Race:
    """A race that is under way. Its first `lead` entries, the model's first choices, are measured whatever the time.
    `trials` are all so far, `spent` the seconds of those that were measured now; `begun` are compiled or being so."""

    entries: Sequence[tuple[Kernel, KernelSchedule]]
    lead: int
    beside: Beside
    stick: Stick
    clock: Callable[[], float]
    start: float
    seconds: float
    record: _Record
    trials: list[Trial] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)
    begun: set[tuple[Kernel, KernelSchedule]] = field(default_factory=set)

    def seconds_per_trial(self) -> float:
        """The expected seconds of a trial. First choices do not count once there are others: they prepare more."""
        later = self.spent[self.lead :]
        return sum(later) / len(later) if later else min([FIRST_GUESS, *self.spent])

    def out_of_time(self, number: int) -> bool:
        """Whether entry `number` is expected to end after the time is up."""
        return number >= self.lead and self.clock() - self.start + self.seconds_per_trial() > self.seconds

    def measured(self, number: int) -> Trial:
        """Measure entry `number`, after it and some of the next ones have begun to compile."""
        kernel, ks = self.entries[number]
        began = self.clock()
        try:
            ahead = [e for e in self.entries[number:] if e not in self.record.known][: self._window(number, began)]
            new = [e for e in ahead if e not in self.begun]
            if (kernel, ks) in new or len(new) >= AT_ONCE:
                self.begun.update(new)
                self.stick.begin([(k, self.beside.asked(k, tiling)) for k, tiling in new])
            self.record.keep(self.trials, under_way=(kernel, ks))
            trial = _measured(self.stick, kernel, self.beside.asked(kernel, ks), fastest(self.trials, kernel))
        except KeyboardInterrupt:  # no fault of the candidate's
            self.record.keep(self.trials)
            raise
        except LostDeviceError as error:
            self.record.keep([*self.trials, Trial(kernel, ks, None, str(error))])
            raise ScheduleError(
                f"the {kernel} kernel with {ks} took the GPU with it: {error}",
                kernel=kernel,
                remedy="it is kept as one that fails; the same command goes on behind it",
            ) from error
        self.spent.append(self.clock() - began)
        return trial

    def _window(self, number: int, now: float) -> int:
        """How many entries from `number` on to compile ahead: as many as there is time for. First choices compile by
        themselves, so that the first results come soon."""
        if number < self.lead:
            return self.lead - number
        if self.seconds == float("inf"):
            return BATCH
        return min(max(int((self.seconds - (now - self.start)) / self.seconds_per_trial()), 1), BATCH)

    def progress(self, kernels: Sequence[Kernel]) -> Progress:
        """The standing after the last trial."""
        done = len(self.trials)
        winners = {k: t for k in kernels if (t := fastest(self.trials, k)) is not None}
        rest = sum(e not in self.record.known for e in self.entries[done:]) * self.seconds_per_trial()
        left = min(rest, max(self.seconds - (self.clock() - self.start), 0.0))
        return Progress(done, len(self.entries), self.trials[-1], winners, left)


def _require(kernels: Sequence[Kernel], trials: Sequence[Trial], beside: Beside) -> None:
    """Raise ScheduleError for a kernel without a correct candidate; a backward in one kernel needs no dq."""
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
    """The schedule that candidates run beside: the model's first choices, or what calls use for kernels that do not
    race."""
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
    """The candidates of all kernels in the order in which they race: kernels alternate, the model's first choices
    first. If the first choice of dkdv is Gluon's, which computes dQ as well, candidates of dq come last: they only
    matter beside one of Triton's, or for the gradient of an input that is read per row.

    Within a kernel the order is by predicted time. But an error of the model about a tile applies to all its warps and
    stages, so each candidate moves back for every earlier one of the same tile (`ALIKE`): a tenth of the search then
    covers most tiles.
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
    """The entries with the schedule that calls use now after the first choices, so that no winner is slower than it."""
    known = set(entries)
    now = [(kernel, incumbent.of(kernel)) for kernel in kernels]
    return [*entries[:lead], *(e for e in now if e not in known), *entries[lead:]]


def _tile(ks: KernelSchedule) -> tuple[str, int, int]:
    return ks.backend, ks.block_m, ks.block_n


def _measured(stick: Stick, kernel: Kernel, asked: Schedule, best: Trial | None) -> Trial:
    """Check a candidate, then time it."""
    ks = asked.of(kernel)
    best_us = best.us if best is not None and best.us is not None else float("inf")
    try:
        stick.check(kernel, asked)
        return Trial(kernel, ks, stick.time(kernel, asked, best_us))
    except TrialError as error:
        return Trial(kernel, ks, None, str(error))


_GIVEN_UP = f"{FALLS} races ended, or hung, while it was under way"


def _fallen(value: Mapping[str, Any] | None) -> dict[tuple[Kernel, KernelSchedule], int]:
    """The candidate with which earlier races ended without a word, and how many did."""
    try:
        kernel, tiling, times = (value or {})["under_way"]
        return {(kernel, KernelSchedule.from_json(tiling)): int(times)}
    except (KeyError, TypeError, ValueError):
        return {}


def _known(value: Mapping[str, Any] | None, head: Mapping[str, Any]) -> dict[tuple[Kernel, KernelSchedule], Trial]:
    """The trials of an earlier race at the same sizes and beside the same tilings."""
    if value is None or any(value.get(name) != wanted for name, wanted in head.items()):
        return {}
    try:
        trials = [Trial.from_json(entry) for entry in value.get("trials", [])]
    except ValueError:
        return {}  # of another version: measured again
    return {(t.kernel, t.schedule): t for t in trials}
