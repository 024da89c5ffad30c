"""`attncc tune`: measure candidate schedules on this machine's GPU, and keep the fastest."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from attncc.cli import sizes as written
from attncc.cli.jobs import Against, Job, Shapes, Specs, jobs
from attncc.cli.options import (
    Backend,
    Batch,
    Dtype,
    DtypeName,
    HeadDim,
    HeadDimV,
    Heads,
    KvHeads,
    KvLen,
    Mask,
    Normalizer,
    QLen,
    Score,
    Set,
    Similarity,
)
from attncc.cli.output import REFUSED, err, out, report
from attncc.errors import AttnccError, InputError, UnsupportedError
from attncc.runtime.compilers import compilers

#: the exit code of a command that Ctrl-C ended, as shells have it
INTERRUPTED = 130

if TYPE_CHECKING:
    from attncc.runtime.race import Progress as Standing
    from attncc.runtime.race import Result
    from attncc.schedule.cache import Cache


def command(
    specs: Specs = None,
    similarity: Similarity = None,
    score: Score = None,
    mask: Mask = None,
    normalizer: Normalizer = None,
    shapes: Shapes = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Total time, divided evenly over specs and shapes: 60s, 5m, ...")
    ] = None,
    dtype: Dtype = DtypeName.bf16,
    q_len: QLen = 8192,
    kv_len: KvLen = None,
    batch: Batch = 1,
    heads: Heads = 16,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = 128,
    head_dim_v: HeadDimV = None,
    settings: Set = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Candidates per kernel; default: 16, or all that fit a --budget."),
    ] = None,
    backend: Backend = None,
    forward: Annotated[bool, typer.Option("--forward", help="Tune the forward only, as for inference.")] = False,
    against: Against = False,
) -> None:
    """Measure candidate schedules on this machine's GPU, and cache the fastest; calls of these sizes then use it.

    Before it may win, each candidate is checked against the reference, and for bitwise equality of two runs. Candidates
    compile in parallel processes and are timed one at a time, in the order that the cost model predicts; its first
    choice always takes part. Every result is cached as soon as it is measured, so the same command continues a run that
    was stopped.

    Examples
      attncc tune alibi --q-len 8192 --batch 4 --heads 16
      attncc tune causal alibi --shapes "B1 H32/8 M1 N65536, B4 H16 M8192" --budget 5m --against
      attncc tune spec.toml --q-len 4096 --head-dim 64 --limit 40
      attncc tune softcap --shapes "B8 H32/8 M1 N8192" --forward
    """
    seconds = written.seconds(budget) if budget else float("inf")
    written.shapes(shapes or (), {})  # what is mistyped is said before anything starts
    with compilers() as count:  # start now, while this process imports torch and asks for the GPU
        err.print(f"starting torch{f', and {count} processes that compile' if count else ''}")
        given = (q_len, kv_len, batch, heads, kv_heads, head_dim, head_dim_v)
        found = jobs(specs, (similarity, score, mask, normalizer), shapes, settings, given)
        limit = 16 if limit is None and budget is None else limit
        asked = backend.value if backend is not None else None
        _races(found, dtype, limit, time.monotonic() + seconds, against, asked, forward)


def _races(
    found: Sequence[Job],
    dtype: DtypeName,
    limit: int | None,
    end: float,
    against: bool,
    backend: Any,
    forward: bool,
) -> None:
    """Run the races one after the other, dividing the time until `end` (of time.monotonic) evenly. One of several that
    ends with an error does not end the others, unless it leaves the GPU unusable."""
    from attncc.runtime.binaries import drop_waiting
    from attncc.runtime.race import LostDeviceError
    from attncc.runtime.tune import gpu
    from attncc.schedule.cache import Cache

    where, cache, failed = gpu(), Cache(), []
    for name, why in _by_rule(found).items():
        err.print(f"{name}: {why}")
    try:
        for number, job in enumerate(found):
            share = (end - time.monotonic()) / (len(found) - number)
            try:
                _tune(job, dtype, where, limit, share, against, backend, forward, cache)
            except AttnccError as error:
                if len(found) == 1 or isinstance(error.__cause__, LostDeviceError):
                    raise
                report(error)
                failed.append(f"{job.graph.name} {job.shape}")
    except KeyboardInterrupt:
        drop_waiting()
        if not cache.unwritten:
            err.print("stopped: every result so far is in the cache, and the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if cache.unwritten:
            err.print(
                f"results are lost: {cache.directory} cannot be written. Set ATTNCC_CACHE_DIR to a folder that can be"
            )
    if failed:
        err.print(f"{len(failed)} of {len(found)} ended with an error: {'; '.join(failed)}")
        raise typer.Exit(REFUSED)


def _by_rule(found: Sequence[Job]) -> dict[str, str]:
    """For each variant that has a plan in chunks, which is not tuned, the message that says so. UnsupportedError: a
    recurrence, which has nothing to tune."""
    from attncc.passes.linearize import linearize

    told = {}
    for graph in {job.graph.name: job.graph for job in found}.values():
        if graph.recurrent:
            raise UnsupportedError(
                f"there is nothing to tune: '{graph.name}' is a recurrence, whose chunks are cut by rule",
                remedy="`attncc explain` shows how",
            )
        with suppress(UnsupportedError):
            linearize(graph)
            told[graph.name] = "this tunes the plan of all pairs; that of chunks, in linear time, is cut by rule"
    return told


def _tune(
    job: Job,
    dtype: DtypeName,
    where: Any,
    limit: int | None,
    seconds: float,
    against: bool,
    backend: Any,
    forward: bool,
    cache: Cache,
) -> None:
    """Tune one variant at one shape, and print the results. InputError: its tensors do not fit."""
    import torch

    from attncc.codegen.plan import Plan
    from attncc.codegen.problem import problem_of
    from attncc.runtime.explain import kernels_of
    from attncc.runtime.op import AttentionOp
    from attncc.runtime.race import race
    from attncc.runtime.tune import Track
    from attncc.schedule.device import device_of

    graph, shape = job.graph, job.shape
    plan, device = Plan(graph), device_of(where)
    problem = problem_of(plan, job.sizes, dtype.value, AttentionOp(graph).engine.precision(), job.values)
    kernels: tuple[Any, ...] = ("forward",) if forward else kernels_of(plan)
    what = f"{graph.name} {shape} {dtype} on {device.title}"
    err.print(f"{what}: the model's first choices compile")
    try:
        track = Track(graph, shape, dtype.value, where, job.values)
    except torch.OutOfMemoryError as error:
        raise InputError(f"the tensors of {graph.name} {shape} do not fit in the memory of {device.title}") from error
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=err.console) as bar:
        task = bar.add_task("the model's first choices", total=None, left="")

        def progress(standing: Standing) -> None:
            last = standing.last
            time_of = f"{last.us:.1f} us" if last.us is not None else last.failure
            best = ", ".join(f"{kernel} {trial.us:.0f} us" for kernel, trial in standing.best.items())
            left = f"{standing.seconds_left:.0f} s left"
            bar.update(task, completed=standing.done, total=standing.total, description=f"best: {best}", left=left)
            mark = " <- best" if standing.best.get(last.kernel) is last else ""
            count = f"{standing.done:>{len(str(standing.total))}}/{standing.total}"
            bar.console.print(f"{count}  {last.kernel:<8} {last.schedule}: {time_of}{mark}; {left}", markup=False)

        result = race(
            problem,
            device,
            kernels,
            track,
            cache,
            limit=limit,
            seconds=seconds,
            what=what,
            progress=progress,
            backend=backend,
        )
    out.print(f"{graph.name}  {shape} {dtype}  on {device.title}")
    out.print(_results(result, kernels))
    if result.resumed:
        out.print(f"{result.resumed} of {len(result.trials)} results were there from an earlier race")
    if result.unmeasured:
        out.print(f"{result.unmeasured} candidates were left when the time was up; the same command goes on with them")
    if track.cramped:
        out.print(
            "the reference does not fit at this size: it checked a slice, and at full size candidates were compared"
        )
    if against:
        out.print(_beside(result, track.against("dkdv" in kernels)))


def _results(result: Result, kernels: tuple[Any, ...]) -> Table:
    """The fastest schedule of each kernel, and the model's choice."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("kernel", "best", "us", "model's choice", "us"):
        table.add_column(column, justify="right" if column == "us" else "left")
    for kernel in kernels:
        best, first = result.best(kernel), result.first(kernel)
        if first is None:  # a dq beside a dkdv that makes dQ
            continue
        best_us, first_us = (f"{t.us:.1f}" if t is not None and t.us is not None else "-" for t in (best, first))
        table.add_row(kernel, str(best.schedule) if best else "-", best_us, str(first.schedule), first_us)
    return table


def _beside(result: Result, peers: Mapping[str, tuple[float | None, float | None]]) -> Table:
    """Times of this variant, and of PyTorch's attention at the same sizes."""
    forward = result.best("forward")
    rows = {"attncc": (forward.us if forward else None, result.backward_us), **peers}
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for column in ("forward us", "backward us"):
        table.add_column(column, justify="right")
    for name, times in rows.items():
        table.add_row(name, *("-" if us is None else f"{us:.1f}" for us in times))
    return table
