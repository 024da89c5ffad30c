"""`attncc verify`: check kernels against the float64 reference, forward and backward."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from attncc.cli import sizes as written
from attncc.cli.options import DtypeName, Json, Mask, Normalizer, Score, Similarity
from attncc.cli.output import FAILED, err, out, print_json
from attncc.cli.spec import named_any, resolve
from attncc.cli.verify_report import OUT_OF_TIME, Findings, every_result, every_variant, plain
from attncc.errors import InputError, UnsupportedError
from attncc.language.hybrid import Hybrid
from attncc.language.variant import Variant
from attncc.runtime.processes import Done, side_by_side, told

if TYPE_CHECKING:
    from attncc.runtime.verify import Row


#: GPU memory per process: a context, the code of kernels, and the tensors of the largest shape
_BYTES_PER_PROCESS = 2 << 30


class DeviceName(StrEnum):
    """Where the kernels run."""

    cpu = "cpu"
    cuda = "cuda"


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
    all_: Annotated[bool, typer.Option("--all", help="Verify every shipped variant.")] = False,
    dtype: Annotated[
        DtypeName | None,
        typer.Option(help="Dtype of q, k, v; default: bf16 on a GPU, fp32 on a CPU.", show_default=False),
    ] = None,
    device: Annotated[
        DeviceName | None,
        typer.Option(help="cpu runs Triton's interpreter; default: the GPU, if there is one.", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Verify the first shape only.")] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            help="Number of processes (compiling takes longest); default: 1, on a GPU one per core.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Time limit: 60s, 5m, ...; variants not finished by then fail.")
    ] = None,
    json: Json = False,
) -> None:
    """Run a spec's kernels, and check outputs and all gradients against the float64 reference.

    A result is right if its largest error is at most 2 times that of plain PyTorch in the same dtype (gradients: 3
    times), its relative RMS error is small, and a second run gives the same bits. The exit code is 1 if any result is
    wrong or missing.

    With --all, each variant has one line, of the result closest to its allowed error; wrong results are listed in full.

    Examples
      attncc verify alibi
      attncc verify spec.toml spec.py:mine --device cpu --dtype fp16
      attncc verify --all --budget 5m
    """
    start = time.monotonic()
    from attncc import variants
    from attncc.runtime.verify import shapes_for

    where, kind = _device_and_dtype(device, dtype)
    if all_ and (specs or similarity or score or mask or normalizer):
        raise InputError("both --all and a spec are given", remedy="--all is every variant that ships, and no other")
    seconds = written.seconds(budget) if budget else math.inf
    wanted = [*(specs or ()), *((*variants.names(), *variants.recurrences()) if all_ else ())]
    chosen = [named_any(spec) for spec in wanted]
    inline = None
    if not chosen or score or mask or normalizer or similarity:
        inline = resolve(None, similarity, score, mask, normalizer)
    places = tuple(range(1 if quick else len(shapes_for(where))))
    found = Findings([*chosen, *([inline] if inline else [])], len(places), start, told=not json)
    workers = workers or (_processes() if where == "cuda" else 1)
    if workers > 1 and len(chosen) > 1:
        _beside(found, wanted, Case("", where, kind, places), workers, seconds - found.elapsed)
        alone: Sequence[Variant | Hybrid] = [inline] if inline else []
    else:
        alone = found.variants
    _here(found, alone, Case("", where, kind, places), seconds)
    if json:
        print_json([plain(name, row) for name, rows in found.rows.items() for row in rows])
    else:
        _show(found, each=not all_)
    for variant in found.variants:
        reason = _without_gradients(variant, found.rows[variant.name])
        if reason is not None:
            err.print(f"{variant.name}: outputs alone were checked: {reason}", style="yellow")
        if isinstance(variant, Hybrid) and (why := _without_state(variant)) is not None:
            err.print(f"{variant.name}: no state was checked, for there is none: {why}", style="yellow")
    for line in found.missing():
        err.print(line, style="bold red")
    if not found.ok:
        raise typer.Exit(FAILED)


def _device_and_dtype(device: DeviceName | None, dtype: DtypeName | None) -> tuple[str, str]:
    """Where kernels run and the dtype of q, k, v, with their defaults. InputError, UnsupportedError: they cannot."""
    import torch

    where = device.value if device else "cuda" if torch.cuda.is_available() else "cpu"
    kind = dtype.value if dtype else "fp32" if where == "cpu" else "bf16"
    if where == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no GPU that torch can use", remedy="--device cpu runs through Triton's interpreter")
    if where == "cpu" and kind == "bf16":
        raise UnsupportedError(
            "Triton's interpreter multiplies bf16 matrices wrongly", remedy="use --dtype fp32 or fp16, or a GPU"
        )
    return where, kind


@dataclass(frozen=True)
class Case:
    """A unit of work of one process: a SPEC by name, a device, a dtype, and the shapes, as indices of `shapes_for`."""

    spec: str
    device: str
    dtype: str
    places: tuple[int, ...]


def verified(case: Case) -> list[Row]:
    """The results of a case. Runs in a worker process, on one thread."""
    import torch

    torch.set_num_threads(1)
    return _rows(_known(case.spec), case.device, case.dtype, case.places)


@functools.cache
def _known(spec: str) -> Variant | Hybrid:
    """The variant of a SPEC, kept because a process may get several of its shapes."""
    return named_any(spec)


def _beside(found: Findings, specs: list[str], each: Case, workers: int, seconds: float) -> None:
    """Verify in worker processes; each SPEC at each shape is a case of its own, so that none is long. Cases run from
    last to first: the last variants have most kernels, and the last shapes the widest heads, which compile slowest."""
    places = [(at, place) for at in reversed(range(len(specs))) for place in reversed(each.places)]
    cases = [replace(each, spec=specs[at], places=(place,)) for at, place in places]

    def finished(case: int, done: Done) -> None:
        at, place = places[case]
        found.add(found.variants[at], place, done)

    side_by_side(verified, cases, workers=workers, seconds=seconds, finished=finished)
    for variant in found.variants[: len(specs)]:
        found.end(variant)


def _here(found: Findings, variants: Sequence[Variant | Hybrid], each: Case, seconds: float) -> None:
    """Verify in this process, one variant after the other, while fewer than `seconds` have passed since the start."""
    import torch

    for variant in variants:
        if found.elapsed > seconds:
            found.add(variant, None, Done(error=OUT_OF_TIME))
            continue
        found.begin(variant, f"{each.dtype} on {each.device}")
        began = found.elapsed
        try:
            done = Done(_rows(variant, each.device, each.dtype, each.places))
        except torch.OutOfMemoryError as error:
            done = Done(error=told(error))
        found.add(variant, None, replace(done, seconds=found.elapsed - began))


def _processes() -> int:
    """The number of worker processes: one per core, if the GPU has memory for them."""
    import torch

    return max(1, min(len(os.sched_getaffinity(0)), torch.cuda.mem_get_info()[0] // _BYTES_PER_PROCESS))


def _show(found: Findings, each: bool) -> None:
    """Print a line per result (`each`), or a line per variant and the wrong results."""
    wrong = {name: [row for row in rows if not row.ok] for name, rows in found.rows.items()}
    if each:
        out.print(every_result(found.rows))
    else:
        out.print(every_variant(found.rows, found.seconds))
        if any(wrong.values()):
            out.print(every_result(wrong))
    faults, checks = (sum(len(rows) for rows in x.values()) for x in (wrong, found.rows))
    total = "" if each else f", of {len(found.variants)} variants in {found.elapsed:.0f} s"
    out.print(f"{checks - faults} of {checks} results are right{total}", style="bold green" if found.ok else "bold red")


def _without_gradients(variant: Variant | Hybrid, rows: list[Row]) -> str | None:
    """The reason why the results of a variant have no gradients, or None if they have some."""
    from attncc.codegen.plan import Plan

    if not rows or any(row.check.name.split()[0] == "dq" for row in rows):
        return None
    variants = variant.parts.values() if isinstance(variant, Hybrid) else (variant,)
    refusals = [Plan(one.graph).has_backward for one in variants if not one.graph.recurrent]
    return next((refusal.reason for refusal in refusals if refusal is not None), None)


def _without_state(hybrid: Hybrid) -> str | None:
    """The reason why calls of a hybrid cannot go on from each other, or None if they can."""
    from attncc.runtime.compile import compile
    from attncc.runtime.hybrid import HybridOp

    op = compile(hybrid)
    assert isinstance(op, HybridOp)
    return op.cannot_go_on()


def _rows(variant: Variant | Hybrid, device: str, dtype: str, places: tuple[int, ...]) -> list[Row]:
    """The results of a variant at some of the shapes of `shapes_for`."""
    import torch

    from attncc.runtime.verify import shapes_for, verify_variant

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    shapes = shapes_for(device)
    return verify_variant(variant, device, kind, [shapes[at] for at in places], seed=places[0])
