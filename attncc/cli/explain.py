"""`attncc explain`: what the passes derive from a spec, and how the scheduler chooses among the candidates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attncc.cli.options import (
    Backend,
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
    Spec,
    Target,
    scalars,
)
from attncc.cli.output import out, print_json
from attncc.cli.roofline import draw, lines
from attncc.cli.sizes import text_of as text_of_sizes
from attncc.cli.spec import resolve_any
from attncc.errors import InputError
from attncc.ir.graph import VariantGraph

if TYPE_CHECKING:
    from attncc.codegen.plan import Plan
    from attncc.schedule.device import Device
    from attncc.schedule.problem import Backend as Language
    from attncc.schedule.problem import Problem
    from attncc.schedule.roofline import Point


def command(
    spec: Spec = None,
    similarity: Similarity = None,
    score: Score = None,
    mask: Mask = None,
    normalizer: Normalizer = None,
    target: Target = None,
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
    top: Annotated[int, typer.Option(min=1, help="Number of candidates to show for each kernel.")] = 5,
    roofline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the kernels under the GPU's roofline into this file.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Explain a spec: passes over the keys and their proof, the derived backward, live tiles, candidate schedules.

    Nothing is compiled or measured. Needs no GPU.

    Examples
      attncc explain alibi --target h100
      attncc explain sliding_window --set window=4096 --q-len 32768 --kv-heads 4
      attncc explain spec.toml --target rtx4090 --dtype fp16 --head-dim 64
      attncc explain causal --target h100 --backend gluon
      attncc explain causal --json
      attncc explain softcap --q-len 1 --kv-len 65536 --heads 32 --kv-heads 8 --roofline roof.svg
    """
    from attncc.runtime.explain import explained_device, sizes_of

    graph = resolve_any(spec, similarity, score, mask, normalizer).graph
    device = explained_device(target)
    asked: Language | None = backend.value if backend is not None else None
    given = (q_len, kv_len, batch, heads, kv_heads, head_dim, head_dim_v)
    if isinstance(graph, VariantGraph):
        sizes = sizes_of(*given, graph)
        found, text, points = _explained(graph, sizes, dtype, device, settings, asked, top, roofline)
        if json:
            print_json(found)
            return
        out.print(text)
        if roofline is not None:
            _print_roofline(points, roofline)
        return
    if roofline is not None:
        raise InputError(f"'{graph.name}' is a hybrid: a roofline is of one variant", remedy="name one of its parts")
    from attncc.runtime.explain_hybrid import hybrid_facts, hybrid_text

    scalars(graph, settings)  # refuses what no part has
    whole = hybrid_facts(graph, sizes_of(*given))
    parts = {}
    for name, part in graph.parts:
        known = {s.name for s in part.scalars}
        own = [setting for setting in settings or () if setting.partition("=")[0] in known]
        parts[name] = _explained(part, sizes_of(*given, part), dtype, device, own, asked, top, None)
    if json:
        print_json({**whole, "parts": {name: found for name, (found, _, _) in parts.items()}})
        return
    out.print(hybrid_text(whole))
    for name, (_, text, _) in parts.items():
        out.print(f"\n== {name}\n{text}")


def _explained(
    graph: VariantGraph,
    sizes: dict[str, int],
    dtype: DtypeName,
    device: Device,
    settings: list[str] | None,
    backend: Language | None,
    top: int,
    roofline: Path | None,
) -> tuple[dict[str, Any], str, tuple[Point, ...]]:
    """The facts of one variant as JSON values and as text, and the points of the roofline that was drawn, if any."""
    if graph.recurrent:
        return *_recurrence(graph, sizes, dtype, device, roofline), ()
    from attncc.codegen.plan import Plan
    from attncc.runtime.explain import facts
    from attncc.runtime.explain_text import text_of
    from attncc.schedule.cache import Cache

    plan, values = Plan(graph), scalars(graph, settings)
    found = facts(plan, sizes, dtype.value, device, values, cache=Cache(), shown=top, backend=backend)
    points: tuple[Point, ...] = ()
    if roofline is not None:
        problem, points = _points(plan, sizes, dtype, device, values, backend)
        draw(
            points, problem, device, f"{graph.name}  {text_of_sizes(sizes)} {dtype.value}  on {device.title}", roofline
        )
        found |= {"roofline": [p.to_json() for p in points]}
    return found, text_of(found), points


def _print_roofline(points: tuple[Point, ...], path: Path) -> None:
    out.print("\nroofline of the GPU, and the share of it that each kernel reaches")
    for line in lines(points):
        out.print(f"  {line}")
    out.print(f"wrote {path}")


def _recurrence(
    graph: VariantGraph, sizes: dict[str, int], dtype: DtypeName, device: Device, roofline: Path | None
) -> tuple[dict[str, Any], str]:
    """Explain a recurrence, which has no pairs, candidates or roofline."""
    from attncc.runtime.explain_recurrence import recurrence_facts, recurrence_text

    if roofline is not None:
        raise InputError(f"'{graph.name}' is a recurrence, whose kernels are not modelled", remedy="drop --roofline")
    found = recurrence_facts(graph, sizes, dtype.value, device)
    return found, recurrence_text(found)


def _points(
    plan: Plan,
    sizes: dict[str, int],
    dtype: DtypeName,
    device: Device,
    values: dict[str, int | float],
    backend: Language | None,
) -> tuple[Problem, tuple[Point, ...]]:
    """The kernels as the model predicts them, and as `attncc tune` measured them at these sizes, if it did."""
    from attncc.codegen.problem import problem_of
    from attncc.runtime.explain import kernels_of
    from attncc.schedule.cache import Cache
    from attncc.schedule.choose import choose
    from attncc.schedule.roofline import measured, predicted_kernels

    problem = problem_of(plan, sizes, dtype.value, "ieee", values)
    schedule = choose(problem, device, Cache(), backend)
    points = predicted_kernels(kernels_of(plan), schedule, problem, device)
    return problem, (*points, *measured(schedule, problem, device, Cache()))
