"""The README's table: full, causal, ALiBi, softcap, window, documents beside FlexAttention, SDPA, our Triton.

All compile ahead, side by side, and ours are checked there; then each row is timed alone.
"""

from __future__ import annotations

from typing import Any

from bench.case import Case, Shape
from bench.compare import COMPILED, Builder, compare, contestant, own_triton, standard_peers, table
from bench.dense_cases import DENSE
from bench.run import Run

TOKENS = 32768
LENGTHS = (8192, 2048)


def shape(length: int) -> Shape:
    """The suite's shape at a sequence length."""
    return Shape(b=TOKENS // length, h=16, m=length, d=128)


def cells() -> list[tuple[Case, int]]:
    """The rows: cases and lengths."""
    return [(case, length) for length in LENGTHS for case in DENSE]


def peers(case: Case) -> dict[str, Builder]:
    """Who runs a case beside us."""
    return {**standard_peers(case), **own_triton()}


def prepared(piece: tuple[int, str]) -> Any:
    """`contestant` of a row by its number."""
    at, name = piece
    case, length = cells()[at]
    return contestant(case, shape(length), name, peers(case))


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("dense")
    taken = run.take(cells(), quick=2)
    names = [(at, name) for at, (case, _) in enumerate(taken) for name in ("attncc", *peers(case))]
    work = [piece for piece in names if piece[1] not in COMPILED]
    ready = dict(zip(work, run.ahead(prepared, work), strict=True))
    results.note("seconds ahead", round(run.budget.elapsed()))
    rows = []
    for at, (case, length) in enumerate(taken):
        if run.out_of_time(results, f"{case.name} at {length}"):
            break
        rows += compare(run, results, case, shape(length), peers=peers(case), checked=ready[at, "attncc"].value)
    table(run, f"dense, TFLOP/s, {results.meta['gpu']}", rows, sizes=("M",))
