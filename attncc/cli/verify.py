"""`attncc verify`: kernels against the float64 reference, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from attncc.cli.options import DtypeName, Json, Mask, Normalizer, Score, Similarity
from attncc.cli.output import FAILED, err, out, print_json
from attncc.cli.spec import named, resolve
from attncc.errors import InputError, UnsupportedError
from attncc.language.variant import Variant

if TYPE_CHECKING:
    from attncc.runtime.verify import Row


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
    all_: Annotated[bool, typer.Option("--all", help="Every variant that ships.")] = False,
    dtype: Annotated[
        DtypeName | None, typer.Option(help="Of q, k, v; default bf16 on a GPU, fp32 on a CPU.", show_default=False)
    ] = None,
    device: Annotated[
        DeviceName | None,
        typer.Option(help="cpu is Triton's interpreter; default: the GPU, if there is one.", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The first of the shapes only.")] = False,
    workers: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="Processes, each with a SPEC at a time: compiling takes longest.")
    ] = 1,
    json: Json = False,
) -> None:
    """Run a spec's kernels and hold outputs and every gradient against the float64 reference; each case runs twice.

    A result is right if it is as close to the reference as plain PyTorch in the same dtype is, by a factor of 2
    (gradients: 3), and if its relative RMS error is small. The exit code is 1 if one is not.

    Examples
      attncc verify alibi
      attncc verify spec.toml spec.py:mine --device cpu --dtype fp16
      attncc verify --all --jobs 8
    """
    import torch

    from attncc import variants

    where = device.value if device else "cuda" if torch.cuda.is_available() else "cpu"
    kind = dtype.value if dtype else "fp32" if where == "cpu" else "bf16"
    if where == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no GPU that torch can use", remedy="--device cpu runs through Triton's interpreter")
    if where == "cpu" and kind == "bf16":
        raise UnsupportedError(
            "Triton's interpreter multiplies bf16 matrices wrongly", remedy="use --dtype fp32 or fp16, or a GPU"
        )
    if all_ and (specs or similarity or score or mask or normalizer):
        raise InputError("both --all and a spec are given", remedy="--all is every variant that ships, and no other")
    wanted = [*(specs or ()), *((*variants.names(), *variants.recurrences()) if all_ else ())]
    chosen: list[Variant] = [named(spec) for spec in wanted]
    inline = None
    if not chosen or score or mask or normalizer or similarity:
        inline = resolve(None, similarity, score, mask, normalizer)
    cases = [Case(spec, where, kind, quick) for spec in wanted]
    results: dict[str, list[Row]] = {}
    failures: dict[str, str] = {}

    def told(what: str) -> None:
        if not json:
            err.print(what, style="dim")

    if workers > 1 and len(cases) > 1:
        from attncc.runtime.processes import Done, side_by_side

        def finished(at: int, done: Done) -> None:
            wrong = [f"{row.check.name} at {row.shape}" for row in done.value or () if not row.ok]
            verdict = done.error or ", ".join(wrong) or "right"
            told(f"{chosen[at].name}: {verdict}")

        all_done = side_by_side(verified, cases, workers=workers, finished=finished)
        for variant, done in zip(chosen, all_done, strict=True):
            if done.error is None:
                results[variant.name] = done.value
            else:
                failures[variant.name] = done.error
    else:
        for variant in chosen:
            told(f"{variant.name}: {kind} on {where} ...")
            results[variant.name] = _rows(variant, where, kind, quick)
    if inline is not None:
        told(f"{inline.name}: {kind} on {where} ...")
        results[inline.name] = _rows(inline, where, kind, quick)
    if json:
        print_json([_plain(name, row) for name, rows in results.items() for row in rows])
    else:
        out.print(_table(results))
        wrong = sum(not row.ok for rows in results.values() for row in rows)
        checks = sum(len(rows) for rows in results.values())
        out.print(f"{checks - wrong} of {checks} results are right", style="bold red" if wrong else "bold green")
    for variant in (*chosen, *([inline] if inline else [])):
        reason = _without_gradients(variant, results.get(variant.name, []))
        if reason is not None:
            err.print(f"{variant.name}: outputs alone were checked: {reason}", style="yellow")
    for name, failure in failures.items():
        err.print(f"{name}: no results: {failure}", style="bold red")
    if failures or not all(row.ok for rows in results.values() for row in rows):
        raise typer.Exit(FAILED)


@dataclass(frozen=True)
class Case:
    """What one process verifies: a SPEC, by its name, on a device, in a dtype; `quick`: at the first shape only."""

    spec: str
    device: str
    dtype: str
    quick: bool


def verified(case: Case) -> list[Row]:
    """The results of a case."""
    return _rows(named(case.spec), case.device, case.dtype, case.quick)


def _without_gradients(variant: Variant, rows: list[Row]) -> str | None:
    """Why the results of a variant have no gradients, if they have none."""
    from attncc.codegen.plan import Plan

    if not rows or any(row.check.name.split()[0] == "dq" for row in rows):
        return None
    refusal = Plan(variant.graph).has_backward
    return None if refusal is None else refusal.reason


def _rows(variant: Variant, device: str, dtype: str, quick: bool) -> list[Row]:
    import torch

    from attncc.runtime.verify import shapes_for, verify_variant

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    return verify_variant(variant, device, kind, shapes_for(device)[: 1 if quick else None])


def _plain(name: str, row: Row) -> dict[str, Any]:
    c = row.check
    figures = {"max_error": c.max_err, "max_allowed": c.max_allowed, "rms_error": c.rms, "rms_allowed": c.rms_allowed}
    # NaN and infinity are no JSON
    finite = {key: value if abs(value) < float("inf") else None for key, value in figures.items()}
    return {
        "variant": name,
        "shape": str(row.shape),
        "result": c.name,
        "ok": row.ok,
        "repeatable": row.repeatable,
        "ordered": row.ordered,
        **finite,
    }


def _table(results: dict[str, list[Row]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "variant", "shape", "result", "largest error", "allowed", "RMS error", "allowed"):
        is_figure = column in ("largest error", "allowed", "RMS error")
        table.add_column(column, justify="right" if is_figure else "left", no_wrap=column in ("", "result", "allowed"))
    for name, rows in results.items():
        before = ("", "")
        for row in rows:
            c = row.check
            verdict = "[green]ok[/]" if row.ok else "[red]WRONG[/]" if not c.ok else "[red]NOT REPEATABLE[/]"
            figures = (f"{x:.1e}" for x in (c.max_err, c.max_allowed, c.rms, c.rms_allowed))
            case = (name, str(row.shape))
            shown = [now if case != before else "" for now in case]
            before = case
            table.add_row(verdict, *shown, c.name, *figures)
    return table
