"""The arguments and options that commands share, declared once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from attncc.errors import InputError
from attncc.ir.graph import VariantGraph
from attncc.ir.hybrid import HybridGraph

Spec = Annotated[
    str | None,
    typer.Argument(
        metavar="SPEC",
        help="A shipped name, spec.toml, or spec.py:name (the Python file is executed, as your own program).",
        show_default=False,
    ),
]
Similarity = Annotated[
    str | None, typer.Option(metavar="TEXT", help='Instead of SPEC: "-scale * sum_d((q_vec - k_vec)**2)".')
]
Score = Annotated[str | None, typer.Option(metavar="TEXT", help='Instead of SPEC: "30 * tanh(score / 30)".')]
Mask = Annotated[str | None, typer.Option(metavar="TEXT", help='Instead of SPEC: "kv_idx <= q_idx".')]
Normalizer = Annotated[
    str | None, typer.Option(metavar="TEXT", help='Instead of SPEC: a shipped name, or "relu(score) / kv_len".')
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Set a scalar of the spec: window=4096."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

QLen = Annotated[int, typer.Option(min=1, help="Number of queries.")]
KvLen = Annotated[
    int | None, typer.Option(min=1, help="Number of keys; default: as many as queries.", show_default=False)
]
Batch = Annotated[int, typer.Option(min=1, help="Number of sequences.")]
Heads = Annotated[int, typer.Option(min=1, help="Number of query heads.")]
KvHeads = Annotated[
    int | None, typer.Option(min=1, help="Number of key/value heads; default: --heads.", show_default=False)
]
HeadDim = Annotated[int, typer.Option(min=1, help="Head dimension of q and k.")]
HeadDimV = Annotated[
    int | None, typer.Option(min=1, help="Head dimension of v; default: --head-dim.", show_default=False)
]
Target = Annotated[
    str | None,
    typer.Option(
        help="GPU or architecture: h100, rtx4090, sm_90, gfx942, ...; default: this machine's GPU, else h100.",
        show_default=False,
    ),
]


class BackendName(StrEnum):
    """The language that kernels are generated in, where both have them."""

    triton = "triton"
    gluon = "gluon"


Backend = Annotated[
    BackendName | None,
    typer.Option(help="Language of the kernels on Hopper; default: chosen by the scheduler.", show_default=False),
]
Output = Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="File to write.")]


class DtypeName(StrEnum):
    """The dtype of q, k, v and out."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


Dtype = Annotated[DtypeName, typer.Option(help="Dtype of q, k, v and out.")]


def scalars(graph: VariantGraph | HybridGraph, settings: Sequence[str] | None) -> dict[str, int | float]:
    """The value of every scalar of the variant: from `--set NAME=VALUE`, else its default. InputError: a setting that
    is malformed, or names no scalar."""
    values: dict[str, int | float] = {s.name: s.default for s in graph.scalars}
    kinds = {s.name: s.is_int for s in graph.scalars}
    for setting in settings or ():
        name, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: expected NAME=VALUE")
        if name not in values:
            known = f"its scalars: {', '.join(values)}" if values else "it has no scalars"
            raise InputError(f"'{graph.name}' has no scalar '{name}'", remedy=known)
        try:
            values[name] = int(text) if kinds[name] else float(text)
        except ValueError:
            kind = "an integer" if kinds[name] else "a number"
            raise InputError(f"--set {setting}: '{name}' is {kind}") from None
    return values


def help_text(function: Callable[..., None]) -> str:
    """A command's docstring for its help: a paragraph that begins with "Examples" keeps its lines."""
    return inspect.cleandoc(function.__doc__ or "").replace("\n\nExamples\n", "\n\n\b\nExamples\n")
