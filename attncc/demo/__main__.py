"""`python -m attncc.demo [SPEC.toml]`: formula, plan, mask, kernel, errors; then a pretrained model."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.rule import Rule

from attncc.errors import AttnccError

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "gemma2_local.toml"


def main(
    spec: Annotated[Path, typer.Argument(help="A variant as TOML; the default is one that ships.")] = EXAMPLE,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The kernel file; default build/<name>.py.")
    ] = None,
) -> None:
    """From one spec file to a checked kernel, then a pretrained sentence encoder on attncc's attention.

    Exits with 1 if a result is wrong.
    """
    import torch

    from attncc.demo import kernel, sentences

    console = Console(width=100, highlight=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        console.print(Rule(f"1. {spec.name}"))
        right = kernel.run(console, spec, device, output)
        console.print(Rule("2. a pretrained model"))
        same = sentences.run(console, device)
    except AttnccError as error:
        console.print(f"[red]{type(error).__name__}[/] {error}", markup=True)
        raise typer.Exit(1) from None
    if not (right and same):
        console.print("[red]the demo found a wrong result[/]")
        raise typer.Exit(1)
    beside = Path(sys.executable).with_name("attncc")
    program = os.path.relpath(beside) if beside.exists() else f"{Path(sys.executable).name} -m attncc"
    console.print(f"\nNext: {program} --help, or a formula of your own in a file such as {os.path.relpath(spec)}")


if __name__ == "__main__":
    typer.run(main)
