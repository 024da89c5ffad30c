"""`attncc tune`: measure the candidates on this machine's GPU."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from attncc.cli import sizes as written
from attncc.cli.options import (
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
    scalars,
)
from attncc.cli.output import err, out
from attncc.cli.spec import named, resolve
from attncc.errors import InputError

if TYPE_CHECKING:
    from attncc.ir.graph import VariantGraph
    from attncc.runtime.race import Progress as Standing
    from attncc.runtime.race import Result


def command(
    specs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SPEC...", help="Shipped names, spec.toml files, spec.py:name (executed).", show_default=False
        ),
    ] = None,
    similarity: Similarity = None,
    score: Score = None,
    mask: Mask = None,
    normalizer: Normalizer = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help='Shapes, parted by commas: "B4 H32/8 M1 N65536 D128, B1 H16 M8192 D64".'),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="60s, 5m, ...: the time for all of it, shared out evenly.")
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
        int | None, typer.Option(min=1, help="How many candidates of each kernel race.", show_default="16, or all")
    ] = None,
    against: Annotated[bool, typer.Option("--against", help="Time PyTorch's own attention beside.")] = False,
) -> None:
    """Measure candidate schedules on this machine's GPU, and keep the best: calls of these sizes then use it.

    Each candidate is checked against the reference, and for the same bits twice, before it may win. The cost model's
    first choice always races, and its order finds most of the gain early. Candidates compile side by side and are timed
    alone. Every result is in the cache as soon as it is measured: a race that is stopped goes on where it was.

    Examples
      attncc tune alibi --q-len 8192 --batch 4 --heads 16
      attncc tune causal alibi --shapes "B1 H32/8 M1 N65536, B4 H16 M8192" --budget 5m --against
      attncc tune spec.toml --q-len 4096 --head-dim 64 --limit 40
    """
    from attncc.runtime.explain import sizes_of
    from attncc.runtime.tune import gpu

    many = specs is not None and len(specs) > 1
    variants = (
        [named(spec) for spec in specs or ()]
        if many
        else [resolve(specs[0] if specs else None, similarity, score, mask, normalizer)]
    )
    graphs = [variant.graph for variant in variants]
    values = [scalars(graph, settings) for graph in graphs]
    defaults = sizes_of(q_len, kv_len, batch, heads, kv_heads, head_dim, head_dim_v)
    cells = written.shapes(shapes, defaults) if shapes else [defaults]
    if not cells:
        raise InputError("--shapes names no shape")
    seconds = written.seconds(budget) if budget else float("inf")
    limit = 16 if limit is None and budget is None else limit
    where, start = gpu(), time.monotonic()
    jobs = [(graph, numbers, cell) for graph, numbers in zip(graphs, values, strict=True) for cell in cells]
    for number, (graph, numbers, cell) in enumerate(jobs):
        share = (seconds - (time.monotonic() - start)) / (len(jobs) - number)
        _tune(graph, numbers, cell, dtype, where, limit, share, against)


def _tune(
    graph: VariantGraph,
    values: Mapping[str, Any],
    sizes: dict[str, int],
    dtype: DtypeName,
    where: Any,
    limit: int | None,
    seconds: float,
    against: bool,
) -> None:
    """One variant at one shape: its race, then what came of it."""
    from attncc.codegen.plan import Plan
    from attncc.codegen.problem import problem_of
    from attncc.runtime.explain import kernels_of
    from attncc.runtime.op import AttentionOp
    from attncc.runtime.race import race
    from attncc.runtime.samples import Shape
    from attncc.runtime.tune import Track
    from attncc.schedule.cache import Cache
    from attncc.schedule.device import device_of

    plan, device = Plan(graph), device_of(where)
    problem = problem_of(plan, sizes, dtype.value, AttentionOp(graph).engine.precision(), values)
    s = sizes
    shape = Shape(s["b"], s["h"], s["h_kv"], s["q_idx"], s["kv_idx"], s["d_qk"], s["d_v"])
    kernels = kernels_of(plan)
    track = Track(graph, shape, dtype.value, where, values)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=err.console) as bar:
        task = bar.add_task("the model's first choice", total=None, left="")

        def progress(standing: Standing) -> None:
            last = standing.last
            time_of = f"{last.us:.1f} us" if last.us is not None else last.failure
            best = ", ".join(f"{kernel} {trial.us:.0f} us" for kernel, trial in standing.best.items())
            left = f"{standing.seconds_left:.0f} s left"
            bar.update(task, completed=standing.done, total=standing.total, description=f"best: {best}", left=left)
            mark = " <- best" if standing.best.get(last.kernel) is last else ""
            bar.console.print(f"{last.kernel:<8} {last.schedule}: {time_of}{mark}", markup=False)

        what = f"{graph.name} {shape} {dtype} on {device.title}"
        result = race(
            problem, device, kernels, track, Cache(), limit=limit, seconds=seconds, what=what, progress=progress
        )
    out.print(f"{graph.name}  {shape} {dtype}  on {device.title}")
    out.print(_results(result, kernels))
    if result.resumed:
        out.print(f"{result.resumed} of {len(result.trials)} results were there from an earlier race")
    if result.unmeasured:
        out.print(f"{result.unmeasured} candidates were left when the time was up; the same command goes on with them")
    if against:
        out.print(_beside(result, track.against("dkdv" in kernels)))


def _results(result: Result, kernels: tuple[Any, ...]) -> Table:
    """The best of each kernel beside the model's choice."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("kernel", "best", "us", "model's choice", "us"):
        table.add_column(column, justify="right" if column == "us" else "left")
    for kernel in kernels:
        best, first = result.best(kernel), result.first(kernel)
        best_us, first_us = (f"{t.us:.1f}" if t is not None and t.us is not None else "-" for t in (best, first))
        table.add_row(kernel, str(best.schedule) if best else "-", best_us, str(first.schedule), first_us)
    return table


def _beside(result: Result, peers: Mapping[str, tuple[float | None, float | None]]) -> Table:
    """Forward and backward of this variant, and of PyTorch's attention at the same sizes."""
    forward, backward = result.best("forward"), [result.best(k) for k in ("dkdv", "dq")]
    # a trial of a backward kernel times the whole backward
    ours = min((t.us for t in backward if t is not None and t.us is not None), default=None)
    rows = {"attncc": (forward.us if forward else None, ours), **peers}
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for column in ("forward us", "backward us"):
        table.add_column(column, justify="right")
    for name, times in rows.items():
        table.add_row(name, *("-" if us is None else f"{us:.1f}" for us in times))
    return table
