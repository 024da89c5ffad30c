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
    typer.Option("--set", metavar="NAME=VALUE", help="The value of a scalar of the spec: window=4096."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

QLen = Annotated[int, typer.Option(min=1, help="Queries.")]
KvLen = Annotated[int | None, typer.Option(min=1, help="Keys; as many as queries if not given.", show_default=False)]
Batch = Annotated[int, typer.Option(min=1, help="Sequences.")]
Heads = Annotated[int, typer.Option(min=1, help="Query heads.")]
KvHeads = Annotated[int | None, typer.Option(min=1, help="Key/value heads; default --heads.", show_default=False)]
HeadDim = Annotated[int, typer.Option(min=1, help="The head dimension of q and k.")]
HeadDimV = Annotated[int | None, typer.Option(min=1, help="That of v; default --head-dim.", show_default=False)]
Target = Annotated[
    str | None,
    typer.Option(
        help="h100, rtx4090, ... or sm_90, gfx942, ...; default: this machine's GPU, else h100.", show_default=False
    ),
]


class BackendName(StrEnum):
    """The language of kernels that both backends have."""

    triton = "triton"
    gluon = "gluon"


Backend = Annotated[
    BackendName | None,
    typer.Option(help="The language of the kernels on Hopper; default: the scheduler's choice.", show_default=False),
]
Output = Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Where to write it.")]


class DtypeName(StrEnum):
    """What q, k, v and out are stored as."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


Dtype = Annotated[DtypeName, typer.Option(help="What q, k, v and out are stored as.")]


def scalars(graph: VariantGraph, settings: Sequence[str] | None) -> dict[str, int | float]:
    """Every scalar of the variant with its value: what `--set NAME=VALUE` says, else its default."""
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
