"""`attncc bench`: time a variant on this machine's GPU, and compare it with the roofline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from attncc.cli.jobs import Against, Job, Shapes, Specs, jobs
from attncc.cli.options import (
    Backend,
    BackendName,
    Batch,
    Dtype,
    DtypeName,
    HeadDim,
    HeadDimV,
    Heads,
    Json,
    KvHeads,
    KvLen,
    Mask,
    Normalizer,
    QLen,
    Score,
    Set,
    Similarity,
)
from attncc.cli.output import FAILED, err, out, print_json
from attncc.cli.roofline import draw, lines

if TYPE_CHECKING:
    from attncc.schedule.roofline import Point


def command(
    specs: Specs = None,
    similarity: Similarity = None,
    score: Score = None,
    mask: Mask = None,
    normalizer: Normalizer = None,
    shapes: Shapes = None,
    dtype: Dtype = DtypeName.bf16,
    q_len: QLen = 8192,
    kv_len: KvLen = None,
    batch: Batch = 1,
    heads: Heads = 16,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = 128,
    head_dim_v: HeadDimV = None,
    settings: Set = None,
    backend: Backend = None,
    against: Against = False,
    roofline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the last case under the GPU's roofline into this file.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Time a spec's forward and backward on this machine's GPU, with the schedule that a call would use.

    Results are first checked against the reference. If one is wrong, it is not timed and the exit code is 1. Nothing is
    tuned.

    Examples
      attncc bench alibi --q-len 8192 --batch 4 --against
      attncc bench causal softcap --shapes "B1 H32/8 M1 N65536, B4 H16 M8192" --roofline roof.svg
    """
    from attncc.runtime.race import TrialError
    from attncc.runtime.tune import gpu

    given = (q_len, kv_len, batch, heads, kv_heads, head_dim, head_dim_v)
    found = jobs(specs, (similarity, score, mask, normalizer), shapes, settings, given)
    where = gpu()
    cases = []
    for job in found:
        try:
            case = _measured(job, dtype, where, against, backend)
        except TrialError as error:
            err.print(f"{job.graph.name}  {job.shape}: {error}")
            raise typer.Exit(FAILED) from None
        cases.append(case)
        if not json:
            _show(case)
    if roofline is not None:
        last = cases[-1]
        draw(last["points"], last["problem"], last["device"], last["what"], roofline)
        if not json:
            out.print(f"wrote {roofline}")
    if json:
        print_json([_plain(case) for case in cases])


def _measured(job: Job, dtype: DtypeName, where: Any, against: bool, backend: BackendName | None) -> dict[str, Any]:
    """Check one case, then time it. TrialError: a result is wrong."""
    from attncc.codegen.plan import Plan
    from attncc.codegen.problem import problem_of
    from attncc.runtime.explain import kernels_of
    from attncc.runtime.op import AttentionOp
    from attncc.runtime.tune import Track
    from attncc.schedule.cache import Cache
    from attncc.schedule.choose import choose
    from attncc.schedule.device import device_of
    from attncc.schedule.roofline import at_backward, at_forward, predicted

    plan, device = Plan(job.graph), device_of(where)
    problem = problem_of(plan, job.sizes, dtype.value, AttentionOp(job.graph).engine.precision(), job.values)
    schedule = choose(problem, device, Cache(), backend.value if backend is not None else None)
    track = Track(job.graph, job.shape, dtype.value, where, job.values)
    kernels = kernels_of(plan)
    points: list[Point] = []
    track.begin([("forward", schedule)])
    track.check("forward", schedule)
    points.append(predicted("forward", schedule.forward, problem, device))
    points.append(at_forward(track.time("forward", schedule, float("inf")), schedule, problem, device))
    if "dkdv" in kernels:
        track.check("dkdv", schedule)
        us = track.time("dkdv", schedule, float("inf"))
        points.append(at_backward(us, schedule, problem, device))
    return {
        "what": f"{job.graph.name}  {job.shape} {dtype.value}  on {device.title}",
        "schedule": schedule,
        "points": points,
        "peers": track.against("dkdv" in kernels) if against else {},
        "problem": problem,
        "device": device,
    }


def _show(case: dict[str, Any]) -> None:
    schedule = case["schedule"]
    out.print(case["what"])
    out.print(f"  forward {schedule.forward} ({schedule.origin})")
    for line in lines(case["points"]):
        out.print(f"  {line}")
    if case["peers"]:
        table = Table(box=None, padding=(0, 2, 0, 2))
        table.add_column("compared")
        for column in ("forward us", "backward us"):
            table.add_column(column, justify="right")
        ours = {p.name: p.us for p in case["points"] if p.source == "measured"}
        rows = {"attncc": (ours.get("forward"), ours.get("backward")), **case["peers"]}
        for name, times in rows.items():
            table.add_row(name, *("-" if us is None else f"{us:.1f}" for us in times))
        out.print(table)


def _plain(case: dict[str, Any]) -> dict[str, Any]:
    """A case as JSON."""
    return {
        "what": case["what"],
        "schedule": case["schedule"].to_json(),
        "points": [p.to_json() for p in case["points"]],
        "peers": {name: {"forward_us": f, "backward_us": b} for name, (f, b) in case["peers"].items()},
    }
