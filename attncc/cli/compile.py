"""`attncc compile`: from a spec to one self-contained file of kernels, or to a target's assembly, and its resource
usage."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

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
    Output,
    QLen,
    Score,
    Set,
    Similarity,
    Spec,
    Target,
    scalars,
)
from attncc.cli.output import err, out, print_json, write_file
from attncc.cli.spec import resolve
from attncc.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from attncc.codegen.crosscompile import CompiledKernel
    from attncc.codegen.plan import Plan
    from attncc.ir.graph import VariantGraph
    from attncc.schedule.device import Device
    from attncc.schedule.problem import Backend as Language
    from attncc.schedule.problem import Dtype as Precise
    from attncc.schedule.problem import Problem, Schedule


class Emit(StrEnum):
    """The kind of output: Triton source in one file, or the target's assembly or binary in one file per kernel."""

    triton = "triton"
    ptx = "ptx"
    cubin = "cubin"


def command(
    spec: Spec = None,
    similarity: Similarity = None,
    score: Score = None,
    mask: Mask = None,
    normalizer: Normalizer = None,
    target: Target = None,
    output: Output = None,
    emit: Annotated[
        Emit,
        typer.Option(
            help="triton: one file that needs no attncc; ptx, cubin (on AMD: amdgcn, hsaco): a file per kernel."
        ),
    ] = Emit.triton,
    dtype: Dtype = DtypeName.bf16,
    head_dim: HeadDim = 128,
    head_dim_v: HeadDimV = None,
    q_len: QLen = 8192,
    kv_len: KvLen = None,
    batch: Batch = 1,
    heads: Heads = 16,
    kv_heads: KvHeads = None,
    settings: Set = None,
    backend: Backend = None,
    json: Json = False,
) -> None:
    """Cross-compile a spec for a GPU, and print registers, spills and shared memory of each kernel. Needs no GPU.

    Head dimensions and dtype are fixed at compile time. The lengths only guide the choice of tiling; the kernels accept
    any.

    Examples
      attncc compile alibi --target h100 -o alibi.py
      attncc compile spec.toml --target sm_89 --head-dim 64 --dtype fp16
      attncc compile --mask "kv_idx <= q_idx" --target gfx942
      attncc compile causal --target h100 --emit ptx -o causal.ptx
    """
    from attncc.codegen.plan import Plan
    from attncc.codegen.problem import problem_of
    from attncc.runtime.explain import explained_device, sizes_of

    if emit is not Emit.triton and output is None:
        raise InputError(
            f"--emit {emit} needs a file to write to", remedy=f"add -o kernel.{emit}: each kernel gets one of that name"
        )
    spelled = resolve(spec, similarity, score, mask, normalizer).graph
    graph = spelled.core
    device = explained_device(target)
    sizes = sizes_of(q_len, kv_len, batch, heads, kv_heads, head_dim, head_dim_v, graph)
    if graph.recurrent:
        if backend is BackendName.gluon:
            err.print("all is in Triton: a recurrence has no kernels in Gluon")
        _recurrence(graph, sizes, dtype, device, emit, output, json)
        return
    plan = Plan(graph)
    problem = problem_of(plan, sizes, dtype.value, "ieee", scalars(graph, settings))
    schedule, source, kernels = _compiled(plan, problem, device, backend.value if backend else None)
    written = _write(emit, output, source, kernels)
    used = {"forward": schedule.forward, "decode": schedule.forward, "dkdv": schedule.dkdv, "dq": schedule.dq}
    chosen = {name: str(used[stem]) if (stem := name.removesuffix("_kernel")) in used else "" for name in kernels}
    if json:
        print_json(
            {
                "name": graph.name,
                "target": device.target,
                "device": device.name,
                "origin": schedule.origin,
                "schedule": schedule.to_json(),
                "kernels": {k: _usage(v) for k, v in kernels.items()},
                "files": [str(path) for path in written],
            }
        )
        return
    out.print(
        f"{graph.name} for {device.title} ({device.target}), {dtype}, head dimensions {sizes['d_qk']}/{sizes['d_v']}"
    )
    out.print(_table(kernels, chosen))
    _warn(kernels)
    for note in _notes(spelled, plan, problem, device, backend):
        err.print(note)
    for path in written:
        out.print(f"wrote {path}")


def _compiled(
    plan: Plan, problem: Problem, device: Device, backend: Language | None
) -> tuple[Schedule, str, dict[str, CompiledKernel]]:
    """The schedule, the source of the file, and its compiled kernels. Observed spills are recorded, and the choice of
    schedule repeated until they change nothing."""
    from attncc.codegen.crosscompile import cross_compile, spilled
    from attncc.codegen.module import load_source
    from attncc.codegen.standalone import standalone
    from attncc.schedule.cache import Cache
    from attncc.schedule.choose import choose
    from attncc.schedule.hopper_backward import deals
    from attncc.schedule.spills import note_spills

    graph, dtype, cache = plan.graph, problem.dtype, Cache()
    schedule, looked_at = choose(problem, device, cache, backend), None
    while schedule != looked_at:
        dealt = schedule.dkdv.backend == "gluon" and deals(schedule.dkdv, problem)
        source = standalone(plan, problem.d_qk, problem.d_v, schedule, dtype, device, dealt)
        module = load_source(source, graph.name)
        kernels = cross_compile(module, graph, schedule, device, dtype, group=problem.group)
        if schedule.origin != "tuned":
            note_spills(spilled(kernels, schedule), problem, device, cache)
        schedule, looked_at = choose(problem, device, cache, backend), schedule
    return schedule, source, kernels


def _notes(
    spelled: VariantGraph, plan: Plan, problem: Problem, device: Device, backend: BackendName | None
) -> Iterator[str]:
    """What of the variant `spelled` the file does not have, and where it differs from what was asked for."""
    from attncc.passes.running import running_sums
    from attncc.schedule.choose import backend_of

    if spelled.outputs:
        names = ", ".join(o.name for o in spelled.outputs)
        yield f"not in the file: the auxiliary outputs ({names}); ask the op for them, ac.compile(...)"
    if _is_linear(spelled):
        yield "not in the file: the forms in linear time; these kernels compute all pairs, ac.compile(...) has both"
    for total in running_sums(spelled):
        yield f"the file takes {total.name}: {total.of}.cumsum({total.axis}), in float32, whose autograd is PyTorch's"
    if plan.has_backward is not None:
        yield f"no backward: {plan.has_backward}"
    for kernel in ("forward", "dkdv") if backend is BackendName.gluon else ():
        language, reason = backend_of(kernel, problem, device, "gluon")
        if language == "triton":
            yield f"{kernel} is in Triton: {reason}"


def _is_linear(graph: VariantGraph) -> bool:
    """Whether the variant has a form in linear time."""
    from attncc.passes.linearize import linearize

    try:
        linearize(graph)
    except UnsupportedError:
        return False
    return True


def _recurrence(
    graph: VariantGraph,
    sizes: dict[str, int],
    dtype: DtypeName,
    device: Device,
    emit: Emit,
    output: Path | None,
    json: bool,
) -> None:
    """Compile a recurrence: its kernels by chunks and by tokens. The file has no autograd of its own."""
    from attncc.codegen.crosscompile_linear import cross_compile_linear
    from attncc.codegen.module import load_source
    from attncc.passes.recur import Delta, recur
    from attncc.runtime.explain_recurrence import schedule_of, tiles_of
    from attncc.runtime.recurrence import RecurrenceOp

    source = RecurrenceOp(graph).source(sizes["d_qk"], sizes["d_v"])
    schedule = schedule_of(graph, sizes, dtype.value, device)
    states: Precise = dtype.value if isinstance(recur(graph), Delta) else "fp32"
    module = load_source(source, graph.name)
    kernels = cross_compile_linear(module, schedule, device, dtype.value, states=states)
    written = _write(emit, output, source, kernels)
    tiles = {name: tiles_of(schedule.kernels.get(name.removesuffix("_kernel"), {})) for name in kernels}
    if json:
        found: dict[str, Any] = {"name": graph.name, "target": device.target, "device": device.name}
        found["kernels"] = {name: _usage(kernel) for name, kernel in kernels.items()}
        print_json({**found, "files": [str(path) for path in written]})
        return
    dims = f"{sizes['d_qk']}/{sizes['d_v']}"
    out.print(f"{graph.name} for {device.title} ({device.target}), {dtype}, head dimensions {dims}")
    out.print(_table(kernels, tiles))
    _warn(kernels)
    for path in written:
        out.print(f"wrote {path}")
    if written and emit is Emit.triton:
        err.print("its forward, backward and step are called by ac.compile(...), which has the autograd")


def _write(emit: Emit, output: Path | None, source: str, kernels: dict[str, CompiledKernel]) -> list[Path]:
    """Write one file of Triton source, or a file per kernel: `out.ptx` becomes out.forward_kernel.ptx. The paths."""
    if output is None:
        return []
    if emit is Emit.triton:
        write_file(output, source)
        return [output]
    paths = []
    for name, kernel in kernels.items():
        path = output.with_name(f"{output.stem}.{name}{output.suffix}")
        write_file(path, kernel.ptx if emit is Emit.ptx else kernel.binary)
        paths.append(path)
    return paths


def _usage(kernel: CompiledKernel) -> dict[str, Any]:
    faults = [str(fault) for fault in kernel.faults]
    return {
        "registers": kernel.registers,
        "spill_bytes": kernel.spills,
        "shared_bytes": kernel.shared,
        "faults": faults,
    }


def _warn(kernels: dict[str, CompiledKernel]) -> None:
    """Print which kernels the assembler miscompiled, and the remedy."""
    wrong = [name for name, kernel in kernels.items() if kernel.faults]
    for name in wrong:
        first, *more = kernels[name].faults
        err.print(f"[red]{name} is wrong machine code[/]: {first}{f', and {len(more)} more' if more else ''}")
    if wrong:
        err.print("a fault of the assembler: TRITON_PTXAS_PATH may name the ptxas of a CUDA toolkit from 12.9 on")


def _table(kernels: dict[str, CompiledKernel], chosen: dict[str, str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("kernel", "registers", "spilled bytes", "shared bytes", "tiles"):
        table.add_column(column, justify="left" if column in ("kernel", "tiles") else "right")
    for name, kernel in kernels.items():
        spills = f"[red]{kernel.spills:,}[/]" if kernel.spills else "0"
        table.add_row(name, str(kernel.registers), spills, f"{kernel.shared:,}", chosen[name])
    return table
