"""Tuning: candidates race on the caller's own sizes; each is checked before it may win; the best so far is on disk.

`race` knows nothing of GPUs: it orders, records and resumes. `Track` runs one candidate on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from attncc.errors import ScheduleError, UnsupportedError
from attncc.ir.graph import VariantGraph
from attncc.language.variant import Variant
from attncc.runtime.op import AttentionOp
from attncc.runtime.samples import Shape, sample_inputs
from attncc.runtime.verify import verify_variant
from attncc.schedule.cache import Cache
from attncc.schedule.choose import choose, schedule_key, sizes_of
from attncc.schedule.cost import ranked
from attncc.schedule.device import Device
from attncc.schedule.problem import Dtype, Kernel, KernelSchedule, Origin, Problem, Schedule

#: the longest sequence at which a candidate is checked against the quadratic reference
CHECKED_LENGTH = 512
TORCH_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class TrialError(Exception):
    """A candidate that cannot win: it is wrong, or it does not run. The text says which."""


@dataclass(frozen=True)
class Trial:
    """One candidate of one kernel: its time in microseconds, or None and why there is none."""

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


@dataclass(frozen=True)
class Result:
    """The schedule that won, all trials in order, and how many of them were on disk already."""

    schedule: Schedule
    trials: tuple[Trial, ...]
    resumed: int

    def best(self, kernel: Kernel) -> Trial | None:
        """The fastest right candidate of a kernel."""
        timed = [t for t in self.trials if t.kernel == kernel and t.us is not None]
        return min(timed, key=lambda t: cast(float, t.us), default=None)

    def first(self, kernel: Kernel) -> Trial:
        """The cost model's first choice."""
        return next(t for t in self.trials if t.kernel == kernel)


#: the microseconds of the kernel under that schedule of all kernels; TrialError if it may not win
Measure = Callable[[Kernel, Schedule], float]
#: told after each trial: trials done, trials in all, and the last one
Progress = Callable[[int, int, Trial], None]


def race(
    problem: Problem,
    device: Device,
    kernels: Iterable[Kernel],
    measure: Measure,
    cache: Cache,
    *,
    limit: int = 16,
    what: str = "",
    progress: Progress | None = None,
) -> Result:
    """Measure the `limit` candidates of each kernel that the model likes best, its first choice before all others.

    From the first success on, the best schedule so far is in `cache` after every trial, with all trials: a race that
    is cut off goes on where it stopped. ScheduleError if a kernel has no candidate that runs and is right.
    """
    entries = [(k, ks) for k in kernels for ks in [ks for ks, _ in ranked(k, problem, device)][:limit]]
    sizes = sizes_of(problem)
    key = schedule_key(problem, device)
    known = _known(cache.get(key), sizes)
    best = choose(problem, device)
    best_us: dict[Kernel, float] = {}
    trials: list[Trial] = []
    resumed = 0
    for kernel, ks in entries:
        trial = known.get((kernel, ks))
        resumed += trial is not None
        if trial is None:
            trial = _tried(measure, kernel, ks, best)
        trials.append(trial)
        if trial.us is not None and trial.us < best_us.get(kernel, float("inf")):
            best_us[kernel] = trial.us
            best = _with(best, kernel, ks, "tuned")
        if best_us:  # what never won is not what calls should use
            value = {"kind": "schedule", "schedule": best.to_json(), "what": what, "sizes": sizes}
            cache.put(key, {**value, "trials": [t.to_json() for t in trials]})
        if progress is not None:
            progress(len(trials), len(entries), trial)
    for kernel in dict.fromkeys(k for k, _ in entries):
        if kernel not in best_us:
            failures = {t.failure for t in trials if t.kernel == kernel}
            raise ScheduleError(
                f"no candidate of the {kernel} kernel won: {'; '.join(sorted(failures))}", kernel=kernel
            )
    return Result(best, tuple(trials), resumed)


def _with(schedule: Schedule, kernel: Kernel, ks: KernelSchedule, origin: Origin) -> Schedule:
    """The schedule with one kernel's tiling replaced."""
    changes: dict[str, Any] = {kernel: ks, "origin": origin}
    return replace(schedule, **changes)


def _known(value: Mapping[str, Any] | None, sizes: dict[str, int]) -> dict[tuple[Kernel, KernelSchedule], Trial]:
    """The trials of an earlier race at the very same sizes."""
    if value is None or value.get("sizes") != sizes:
        return {}
    try:
        trials = [Trial.from_json(entry) for entry in value.get("trials", [])]
    except ValueError:
        return {}  # of another version: measured again
    return {(t.kernel, t.schedule): t for t in trials}


def _tried(measure: Measure, kernel: Kernel, ks: KernelSchedule, best: Schedule) -> Trial:
    try:
        return Trial(kernel, ks, measure(kernel, _with(best, kernel, ks, "user")))
    except TrialError as error:
        return Trial(kernel, ks, None, str(error))


def gpu() -> torch.device:
    """The GPU to measure on; UnsupportedError if there is none."""
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "tuning measures on a GPU, and there is none that torch can use",
            remedy="run it on the machine with the GPU; `attncc cache export` carries the result to others",
        )
    return torch.device("cuda", torch.cuda.current_device())


class Track:
    """Runs candidates of a variant at one size on a GPU: first checked on a slice, then timed at full size."""

    def __init__(
        self, graph: VariantGraph, shape: Shape, dtype: Dtype, device: torch.device, scalars: Mapping[str, Any]
    ):
        self.graph, self.shape, self.dtype, self.device = graph, shape, TORCH_DTYPES[dtype], device
        sample = sample_inputs(graph, shape, self.dtype, device)
        self.inputs = {**sample.inputs, **scalars}
        differentiable = [d.name for d in graph.inputs if d.grad]
        self.qkv = [t.requires_grad_() for t in (sample.q, sample.k, sample.v) if t is not None]
        self.leaves = [*self.qkv, *(self.inputs[name].requires_grad_() for name in differentiable)]
        self.dout = torch.randn((*sample.q.shape[:3], graph.value or shape.d_v), device=device, dtype=self.dtype)

    def __call__(self, kernel: Kernel, schedule: Schedule) -> float:
        """The time of the forward, or of the whole backward for a kernel of it, in microseconds."""
        from triton.testing import do_bench

        op = AttentionOp(self.graph, schedule)
        try:
            self._check(op, kernel)
            if kernel == "forward":
                with torch.no_grad():
                    ms = do_bench(lambda: op(*self.qkv, **self.inputs), return_mode="median")
            else:
                out = op(*self.qkv, **self.inputs)
                ms = do_bench(
                    lambda: torch.autograd.grad(out, self.leaves, self.dout, retain_graph=True), return_mode="median"
                )
        except TrialError:
            raise
        except Exception as error:  # out of registers, out of shared memory, a compiler's refusal: it does not win
            raise TrialError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
        return float(ms) * 1e3

    def _check(self, op: AttentionOp, kernel: Kernel) -> None:
        rows = verify_variant(Variant.from_graph(self.graph), self.device, self.dtype, [sliced(self.shape)], op=op)
        wrong = [row.check.name for row in rows if not row.ok]
        if kernel == "forward":  # gradients come from other kernels
            wrong = [name for name in wrong if name in ("out", "lse")]
        if wrong:
            raise TrialError(f"wrong: {', '.join(wrong)}")


def sliced(shape: Shape) -> Shape:
    """One sequence and one key/value head of a shape, shortened with its ratio of queries to keys."""
    factor = max(-(-max(shape.q_len, shape.kv_len) // CHECKED_LENGTH), 1)
    return replace(
        shape,
        batch=1,
        heads=shape.heads // shape.kv_heads,
        kv_heads=1,
        q_len=max(shape.q_len // factor, 1),
        kv_len=max(shape.kv_len // factor, 1),
    )
