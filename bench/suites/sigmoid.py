"""Causal sigmoid attention beside our own causal softmax, in one race, and torch.compile of plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import attncc as ac
from bench import area
from bench.case import Case, Shape
from bench.compare import MODES, Builder, compare, contestant, figures, table
from bench.dense_cases import CAUSAL
from bench.peers import compiled_sigmoid, own_softmax
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


PLAIN: dict[str, Builder] = {"plain": lambda case, shape, inputs: compiled_sigmoid(shape)}
#: ours, by name, of which the one is timed beside the other
CASES = {"sigmoid": SIGMOID, "causal": CAUSAL}


def prepared(piece: tuple[int, str]) -> Any:
    """`contestant` of a length, by name."""
    length, name = piece
    if name == "plain":
        return contestant(SIGMOID, two(shape(length)), name, PLAIN)
    return contestant(CASES[name], shape(length), "attncc", {})


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Our TFLOP/s over each peer's."""
    timed = {name: peer["tflops"] for name, peer in row["peers"].items() if "tflops" in peer}
    return {name: round(row["attncc"]["tflops"] / tflops, 3) for name, tflops in timed.items()}


def together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of a training step, from those of its modes: milliseconds are added, work is, too."""

    def both(entries: list[dict[str, Any]]) -> dict[str, float]:
        ms = sum(entry["ms"] for entry in entries)
        return {"ms": round(ms, 4), "tflops": round(sum(e["ms"] * e["tflops"] for e in entries) / ms, 1)}

    first = rows[0]
    ours = {**both([row["attncc"] for row in rows]), "schedule": first["attncc"]["schedule"]}
    peers = {name: both([row["peers"][name] for row in rows]) for name in first["ratio"]}
    kept = {key: value for key, value in first.items() if key not in ("attncc", "peers", "ratio", "mode", "area")}
    row = {**kept, "mode": "both", "attncc": ours, "peers": peers}
    return {**row, "ratio": ratios(row)}


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
        checked, beside = ready[length, "sigmoid"].value, {"own softmax": own_softmax}
        rows = compare(run, results, SIGMOID, shape(length), peers=beside, checked=checked)
        if not rows:
            continue
        peer = plain(shape(length))
        for row in rows:
            row["peers"]["torch.compile"] = peer[row["mode"]]
            row["ratio"] = ratios(row)
        shown += [*rows, results.add(**together(rows))]
    table(run, f"sigmoid, TFLOP/s, {results.meta['gpu']}", shown, sizes=("M",))
