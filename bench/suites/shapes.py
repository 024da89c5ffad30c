"""Causal attention over head dimensions (64 to 256, 192/128), grouped heads, odd lengths, M != N, beside the peers."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.case import Shape
from bench.compare import compare, standard_peers, table
from bench.dense_cases import CAUSAL, FULL
from bench.run import Run

S = 4096

SHAPES = (
    ("d64", Shape(b=4, h=32, m=S, d=64)),
    ("d96", Shape(b=4, h=16, m=S, d=96)),
    ("d128", Shape(b=4, h=16, m=S, d=128)),
    ("d192/128", Shape(b=4, h=16, m=S, d=192, dv=128)),
    ("d256", Shape(b=4, h=8, m=S, d=256)),
    ("gqa 32/8", Shape(b=2, h=32, hkv=8, m=S, d=128)),
    ("mqa 16/1", Shape(b=8, h=16, hkv=1, m=2048, d=128)),
    ("odd length", Shape(b=4, h=16, m=S - 1, d=128)),
    ("fp16", Shape(b=4, h=16, m=S, d=128, dtype=torch.float16)),
)
#: more queries than keys and the reverse, where causal peers differ in their alignment: full attention
CROSS = (
    ("cross 1000x5000", Shape(b=4, h=16, m=1000, n=5000, d=128)),
    ("cross 5000x1000", Shape(b=4, h=16, m=5000, n=1000, d=128)),
)


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("shapes")
    cells = [(CAUSAL, *named) for named in SHAPES] + [(FULL, *named) for named in CROSS]
    rows = []
    for base, name, shape in run.take(cells, quick=2):
        if run.out_of_time(results, name):
            break
        # FlexAttention compiles anew for each shape: a few seconds each, which only the rows that users compare get.
        peers = standard_peers(base)
        if name not in ("d64", "d128", "d256", "gqa 32/8"):
            peers.pop("flex")
        rows += compare(run, results, replace(base, name=name), shape, peers=peers)
    table(run, f"shapes, TFLOP/s, {results.meta['gpu']}", rows, sizes=("M", "N", "Dqk", "Dv"))
