"""From one spec file to a kernel: print it, compile it, check it against the float64 reference, and write it to a
file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

import attncc as ac
from attncc.cli import compile as compile_command
from attncc.cli.draw import picture
from attncc.cli.spec import named
from attncc.runtime.verify import Shape, verify_variant

#: one head group of a real layer, in bfloat16: its float64 reference fits beside it on a 24 GB card
REAL = Shape(1, 2, 1, 8192, 8192, 128, 128)
#: what the interpreter runs in seconds, in float32: odd lengths, grouped heads, fewer queries than keys
SMALL = Shape(1, 2, 1, 83, 96, 32, 32)
#: rows and columns of the mask's picture
PICTURE = 48


def run(console: Console, spec: Path, device: str, output: Path | None) -> bool:
    """Every step for one spec; whether all results are right."""
    variant = named(str(spec))
    name = os.path.relpath(spec) if spec.is_relative_to(Path.cwd()) else str(spec)
    op = ac.compile(variant)
    console.print(Syntax(spec.read_text(), "toml", background_color="default"))
    step(console, f"attncc explain {name}")
    console.print(op.explain(), markup=False, soft_wrap=True)
    step(console, f"attncc show {name}: the mask of {PICTURE} queries (down) and keys (across)")
    for line in picture(variant.graph, PICTURE, PICTURE, head=0, heads=1, scalars={}).lines():
        console.print(f"  {line}", markup=False)
    output = output if output is not None else Path("build") / f"{variant.name.replace('-', '_')}.py"
    output.parent.mkdir(parents=True, exist_ok=True)
    step(console, f"attncc compile {name} -o {output}")
    compile_command.command(str(spec), output=output)
    step(console, f"attncc verify {name}")
    return verified(console, op, variant, device)


def step(console: Console, command: str) -> None:
    """The command that a user would type for what follows."""
    console.print(f"\n[bold]$ {command}[/]")


def verified(console: Console, op: Callable[..., Any], variant: ac.Variant, device: str) -> bool:
    """Run forward and backward, print the errors against the float64 reference; whether all are within bounds."""
    shape, dtype = (REAL, torch.bfloat16) if device == "cuda" else (SMALL, torch.float32)
    where = torch.cuda.get_device_name() if device == "cuda" else "this CPU, through Triton's interpreter"
    start = time.perf_counter()
    rows = verify_variant(variant, device, dtype, [shape], op)
    seconds = time.perf_counter() - start
    table = Table(title=f"{shape}, {str(dtype).removeprefix('torch.')}, on {where}; {seconds:.1f} s")
    for column in ("result", "largest error", "at most", "RMS error", "at most", "same bits twice", ""):
        table.add_column(column, justify="left" if column == "result" else "right")
    for row in rows:
        found = row.check
        errors = (f"{x:.1e}" for x in (found.max_err, found.max_allowed, found.rms, found.rms_allowed))
        verdict = "[green]right[/]" if row.ok else "[red]WRONG[/]"
        table.add_row(found.name, *errors, "yes" if row.repeatable else "no", verdict)
    console.print(table)
    return all(row.ok for row in rows)
