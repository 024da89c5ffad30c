"""Gluon's kernels on a Hopper GPU beside cuDNN, FlashAttention-4 if installed, FlexAttention, and our Triton.

All compile ahead, side by side, and ours are checked there; then each cell is timed alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench.case import Case, Shape
from bench.compare import COMPILED, Builder, compare, contestant, standard_peers, table
from bench.dense_cases import ALIBI, CAUSAL, DOCUMENTS_1024, FULL, SOFTCAP, WINDOW_1024
from bench.peers import fa4, has_fa4, own_softmax, sdpa, triton
from bench.run import Run
from bench.suites import variants

TOKENS = 32768
#: heads times head dimension
WIDTH = 2048
LENGTHS = (8192, 2048)
DIMS = (128, 64, 256)
#: what FlexAttention cannot say at the same cost, or not at all: beside our own softmax with the same mask
OWN = ("sink", "sigmoid", "relu", "cog", "differential")
#: the least ratio to the best peer that each plain cell is for, forward and backward; at the shorter length, both
GOALS = {128: (1.0, 0.95), 64: (1.0, 0.95), 256: (0.97, 1.0)}
SHORT_GOAL = 0.95
FLEX_GOAL = 1.4


@dataclass(frozen=True)
class Cell:
    """A case at a shape, the ratio to the best peer that each mode is for, and whether FlexAttention runs, too."""

    case: Case
    shape: Shape
    goals: tuple[float, float]
    flex: bool = False


def shape(length: int, d: int, dv: int = 0) -> Shape:
    """The suite's shape at a sequence length and a head dimension."""
    return Shape(b=TOKENS // length, h=WIDTH // (dv or d), m=length, d=d, dv=dv)


def cells() -> Iterator[Cell]:
    """All rows of the table, those that most depend on first."""
    for d in DIMS:
        for length in LENGTHS:
            goals = GOALS[d] if length == LENGTHS[0] else (SHORT_GOAL, SHORT_GOAL)
            for case in (FULL, CAUSAL):
                yield Cell(case, shape(length, d), goals)
    long = shape(LENGTHS[0], 128)
    for case in (ALIBI, SOFTCAP, WINDOW_1024, DOCUMENTS_1024):
        yield Cell(case, long, (FLEX_GOAL, FLEX_GOAL), flex=True)
    for name in OWN:
        yield Cell(variants.case(name), long, (0.9, 0.9))
    yield Cell(replace(CAUSAL, name="MLA"), shape(LENGTHS[0], 192, 128), (0.95, 0.95))
    for name, odd in (
        ("S=6000", Shape(b=5, h=16, m=6000, d=128)),
        ("D=96", Shape(b=4, h=21, m=8192, d=96)),
        ("28/4 heads", Shape(b=4, h=28, hkv=4, m=4096, d=128)),
    ):
        yield Cell(replace(CAUSAL, name=name), odd, (0.9, 0.9))


def peers(cell: Cell) -> dict[str, Builder]:
    """Who runs a cell beside us."""
    found: dict[str, Builder] = {"triton": triton}
    if cell.case.sdpa is not None:
        found["cudnn"] = lambda case, shape, inputs: sdpa("cudnn", case, shape)
        if has_fa4():
            found["fa4"] = lambda case, shape, inputs: fa4(case)
    if cell.flex:
        found["flex"] = standard_peers(cell.case)["flex"]
    if set(found) == {"triton"}:
        found["own softmax"] = partial(own_softmax, backend="gluon")
    return found


def judge(row: dict[str, Any], goal: float) -> None:
    """Add to a row its goal, and its ratio to the best peer."""
    others = {name: ratio for name, ratio in row["ratio"].items() if name != "triton"}
    row["goal"], row["reached"] = goal, min(others.values(), default=None)


def prepared(piece: tuple[int, str]) -> Any:
    """`contestant` of a cell by its number."""
    at, name = piece
    cell = list(cells())[at]
    return contestant(cell.case, cell.shape, name, peers(cell), backend="gluon")


def pieces(taken: list[Cell]) -> list[tuple[int, str]]:
    """Work for `prepared`: whatever compiles. FlashAttention-4 has one kernel for all lengths."""
    known: set[tuple[str, int, int, int]] = set()
    found: list[tuple[int, str]] = []
    for at, cell in enumerate(taken):
        found.append((at, "attncc"))
        kind = (cell.case.name, cell.shape.d, cell.shape.dv, cell.shape.h // cell.shape.hkv)
        for name in peers(cell):
            if name not in COMPILED and not (name == "fa4" and kind in known):
                found.append((at, name))
        known.add(kind)
    return found


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("hopper")
    results.note("fa4", "importable" if has_fa4() else "not installed")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # what a process compiles, another loads
    taken = run.take(list(cells()), quick=2)
    work = pieces(taken)
    ready = dict(zip(work, run.ahead(prepared, work), strict=True))
    results.note("seconds ahead", round(run.budget.elapsed()))
    shown: list[dict[str, Any]] = []
    for at, cell in enumerate(taken):
        if run.out_of_time(results, f"{cell.case.name} {cell.shape}"):
            break
        # what found no memory beside the others, or no time, is checked here
        checked = ready[at, "attncc"].value
        options: dict[str, Any] = {"checked": checked, "rounds": 2, "rep_ms": 50}
        rows = compare(run, results, cell.case, cell.shape, peers=peers(cell), backend="gluon", **options)
        for row, goal in zip(rows, cell.goals, strict=False):
            judge(row, goal)
        results.write()
        shown += rows
    table(run, f"hopper, TFLOP/s, {results.meta['gpu']}", shown, sizes=("M", "Dqk", "goal", "reached"))
