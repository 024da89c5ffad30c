"""`attncc tune`: measure the candidates on this machine's GPU."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

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
    Spec,
    scalars,
)
from attncc.cli.output import err, out
from attncc.cli.spec import resolve


def command(
    spec: Spec = None,
    similarity: Similarity = None,
    score: Score = None,
    mask: Mask = None,
    normalizer: Normalizer = None,
    dtype: Dtype = DtypeName.bf16,
    q_len: QLen = 8192,
    kv_len: KvLen = None,
    batch: Batch = 1,
    heads: Heads = 16,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = 128,
    head_dim_v: HeadDimV = None,
    settings: Set = None,
    limit: Annotated[int, typer.Option(min=1, help="How many candidates of each kernel race.")] = 16,
) -> None:
    """Measure candidate schedules on this machine's GPU, and keep the best: calls of these sizes then use it.

    Each candidate is checked against the reference before it may win. The cost model's first choice always races.
    Every result is in the cache as soon as it is measured: a race that is stopped goes on where it was.

    Examples
      attncc tune alibi --q-len 8192 --batch 4 --heads 16
      attncc tune spec.toml --q-len 4096 --head-dim 64 --limit 40
    """
    from attncc.codegen.plan import Plan
    from attncc.codegen.problem import problem_of
    from attncc.runtime.explain import kernels_of, sizes_of
    from attncc.runtime.op import AttentionOp
    from attncc.runtime.samples import Shape
    from attncc.runtime.tune import Track, Trial, gpu, race
    from attncc.schedule.cache import Cache
    from attncc.schedule.device import device_of

    graph = resolve(spec, similarity, score, mask, normalizer).graph
    values = scalars(graph, settings)
    sizes = sizes_of(q_len, kv_len, batch, heads, kv_heads, head_dim, head_dim_v, graph)
    where = gpu()
    plan, device = Plan(graph), device_of(where)
    problem = problem_of(plan, sizes, dtype.value, AttentionOp(graph).engine.precision(), values)
    s = sizes
    shape = Shape(
        s["b"], s["h"], s["h_kv"], s["q_idx"], s["kv_idx"], s["d_qk"] // graph.branches - (graph.value or 0), s["d_v"]
    )
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err.console) as bar:
        task = bar.add_task("the model's first choice", total=None)

        def progress(done: int, total: int, trial: Trial) -> None:
            time = f"{trial.us:.1f} us" if trial.us is not None else trial.failure
            bar.update(task, completed=done, total=total, description=f"{trial.kernel} {trial.schedule}")
            bar.console.print(f"{trial.kernel:<8} {trial.schedule}: {time}", markup=False)

        result = race(
            problem,
            device,
            kernels_of(plan),
            Track(graph, shape, dtype.value, where, values),
            Cache(),
            limit=limit,
            what=f"{graph.name} {shape} {dtype} on {device.title}",
            progress=progress,
        )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("kernel", "best", "us", "model's choice", "us"):
        table.add_column(column, justify="right" if column == "us" else "left")
    for kernel in kernels_of(plan):
        best, first = result.best(kernel), result.first(kernel)
        times = (f"{t.us:.1f}" if t is not None and t.us is not None else "-" for t in (best, first))
        best_us, first_us = times
        table.add_row(kernel, str(best.schedule) if best else "-", best_us, str(first.schedule), first_us)
    out.print(table)
    if result.resumed:
        out.print(f"{result.resumed} of {len(result.trials)} results were there from an earlier race")
