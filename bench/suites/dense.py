"""The README's table: full, causal, ALiBi, softcap, window, documents beside FlexAttention, SDPA, our Triton."""

from __future__ import annotations

from bench.case import Shape
from bench.compare import compare, own_triton, standard_peers, table
from bench.dense_cases import DENSE
from bench.run import Run

TOKENS = 32768
LENGTHS = (8192, 2048)


def shape(length: int) -> Shape:
    """The suite's shape at a sequence length."""
    return Shape(b=TOKENS // length, h=16, m=length, d=128)


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("dense")
    cells = [(case, length) for length in LENGTHS for case in DENSE]
    rows = []
    for case, length in run.take(cells, quick=2):
        if run.out_of_time(results, f"{case.name} at {length}"):
            break
        rows += compare(run, results, case, shape(length), peers={**standard_peers(case), **own_triton()})
    table(run, f"dense, TFLOP/s, {results.meta['gpu']}", rows, sizes=("M",))
