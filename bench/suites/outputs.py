"""Auxiliary outputs at S=4096 and 8192: what each costs beside the forward alone, causal."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

import attncc as ac
from attncc.runtime.verify import check, eager
from bench.case import Shape
from bench.check import CheckFailedError
from bench.run import NotReadyError, Run
from bench.timing import race

SHAPES = (Shape(b=4, h=16, m=4096, d=128), Shape(b=2, h=16, m=8192, d=128))
#: the length at which results are held against the reference
SHORT = 1024
OUTPUTS: dict[str, Any] = {
    "received": ac.outputs.received,
    "recent": ac.outputs.column_mean(-32),
    "entropy": ac.outputs.entropy,
    "row_mass": ac.outputs.row_mass(0, 128),
    "last_rows": ac.outputs.last_rows(32),
    "block_sums": ac.outputs.block_sums(64, 64),
    "offset_sums": ac.outputs.offset_sums(),
}


def checked(op: Any, name: str, shape: Shape) -> float:
    """Hold an output against the reference at a short length; returns its RMS error over the RMS of what is right."""
    q, k, v = (x.detach() for x in replace(shape, b=1, h=2, hkv=2, m=SHORT, n=SHORT).tensors())
    got = op(q, k, v, outputs=name)
    exact = ac.reference(op.graph, q, k, v, outputs=name)
    found = check(name, got, exact, eager(op.graph, q, k, v, outputs=name), dtype=q.dtype)
    if not found.ok:
        raise CheckFailedError(f"{name}: {found}")
    return found.rms / max(float(exact.square().mean().sqrt()), 1e-30)


def watched() -> Any:
    """The op with every output."""
    return ac.compile(ac.variants.get("causal").with_outputs(**OUTPUTS))


def prepared(name: str) -> float:
    """In another process: compile what an output needs into the caches; the error of `checked`."""
    op = watched()
    error = checked(op, name, SHAPES[0])
    for shape in SHAPES:
        op(*(x.detach() for x in shape.tensors()), outputs=("out", name))
    return error


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("outputs")
    op = watched()
    names = run.take(list(OUTPUTS), quick=2)
    ready = dict(zip(names, run.ahead(prepared, names), strict=True))
    lines = []
    for shape in run.take(list(SHAPES), quick=1):
        q, k, v = (x.detach() for x in shape.tensors())
        for name in names:
            if run.out_of_time(results, f"{name} at S={shape.m}"):
                break
            if ready[name].error is not None:
                run.fail(results, name, NotReadyError(ready[name].error), case=name, **shape.row())
                continue
            try:
                calls = {"forward": partial(op, q, k, v), "both": partial(op, q, k, v, outputs=("out", name))}
                for call in calls.values():
                    call()
                times = race(calls)
            except Exception as failure:
                run.fail(results, name, failure, case=name, **shape.row())
                continue
            alone, both = times["forward"].ms, times["both"].ms
            row = {"forward_ms": round(alone, 4), "ms": round(both, 4), "more": round(both / alone - 1, 3)}
            results.add(case=name, **shape.row(), **row, check={"reference": ready[name].value})
            lines.append([name, str(shape.m), f"{alone:.3f}", f"{both:.3f}", f"{both / alone - 1:+.0%}"])
    title = f"auxiliary outputs, ms, causal, bf16, D={SHAPES[0].d}, {results.meta['gpu']}"
    run.show(title, ["output", "S", "forward alone", "with the output", "more"], lines)
    torch.cuda.empty_cache()
