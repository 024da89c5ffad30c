"""Causal sigmoid attention beside our own causal softmax and torch.compile of plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import attncc as ac
from bench import area
from bench.case import Case, Shape
from bench.compare import MODES, Builder, compare, contestant, figures, table
from bench.dense_cases import CAUSAL
from bench.peers import compiled_sigmoid
from bench.run import Run
from bench.suites.dense import LENGTHS, shape
from bench.timing import race

SIGMOID = Case("sigmoid", ac.Variant(name="sigmoid", mask=ac.causal, normalizer="sigmoid"), area.causal)


def two(wanted: Shape) -> Shape:
    """Two sequences: as much as the whole map of plain PyTorch has room for."""
    return replace(wanted, b=2)


def plain(wanted: Shape) -> dict[str, dict[str, Any]]:
    """Figures by mode of plain PyTorch under torch.compile, on two sequences: it holds several M x N tensors a head."""
    small = two(wanted)
    q, k, v = small.tensors()
    run = compiled_sigmoid(small)
    out = run(q, k, v)
    grad = torch.randn_like(out)
    calls = (lambda: run(q, k, v), lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
    pairs = area.causal(small.m, small.n)
    return {
        mode: figures(small, pairs, mode, race({"plain": call})["plain"])
        for mode, call in zip(MODES, calls, strict=True)
    }


#: ours by name, and what they are beside
CASES = {"sigmoid": SIGMOID, "causal": CAUSAL}
PLAIN: dict[str, Builder] = {"plain": lambda case, shape, inputs: compiled_sigmoid(shape)}


def prepared(piece: tuple[int, str]) -> Any:
    """`contestant` of a length, by name."""
    length, name = piece
    if name == "plain":
        return contestant(SIGMOID, two(shape(length)), name, PLAIN)
    return contestant(CASES[name], shape(length), "attncc", {})


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("sigmoid")
    lengths = run.take(list(LENGTHS), quick=1)
    work = [(length, name) for length in lengths for name in (*CASES, *PLAIN)]
    ready = dict(zip(work, run.ahead(prepared, work), strict=True))
    shown = []
    for length in lengths:
        if run.out_of_time(results, f"length {length}"):
            break
        checked = {name: ready[length, name].value for name in CASES}
        causal = compare(run, results, CAUSAL, shape(length), peers={}, checked=checked["causal"])
        softmax = {row["mode"]: row for row in causal}
        rows = compare(run, results, SIGMOID, shape(length), peers={}, checked=checked["sigmoid"])
        if not (softmax and rows):
            continue
        peer = plain(shape(length))
        for row in rows:
            own = {key: softmax[row["mode"]]["attncc"][key] for key in ("ms", "tflops", "spread")}
            row["peers"] = {"own softmax": own, "torch.compile": peer[row["mode"]]}
            row["ratio"] = {n: round(row["attncc"]["tflops"] / e["tflops"], 3) for n, e in row["peers"].items()}
        results.write()
        shown += rows
    table(run, f"sigmoid, TFLOP/s, {results.meta['gpu']}", shown, sizes=("M",))
