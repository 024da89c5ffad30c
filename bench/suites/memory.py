"""Peak GPU memory of a call at S=131072: out + lse forward, gradients + one row vector backward, nothing S x S."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import attncc as ac
from bench.case import Case, Shape
from bench.check import against_reference, gradients
from bench.dense_cases import ALIBI, CAUSAL, DOCUMENTS_1024
from bench.run import Run

SHAPE = Shape(b=1, h=4, hkv=1, m=131072, d=128)
#: the same op at a length whose float64 reference fits
CHECKED = replace(SHAPE, m=4096, n=4096)
MIB = 2**20


def peak(call: Any) -> tuple[Any, int]:
    """What `call` returns, and how many bytes more than before were allocated at its peak (its result included)."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def size(*tensors: torch.Tensor) -> int:
    """Bytes of these tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(case: Case, shape: Shape) -> list[dict[str, Any]]:
    """Rows for forward and backward: measured peak beside what the results themselves take."""
    op = ac.compile(case.variant)
    q, k, v = shape.tensors()
    inputs: dict[str, Any] = case.inputs(shape, "cuda")
    # A first call pays for compilation and for what the driver and PyTorch keep; only the second is looked at.
    warm = op(q, k, v, **inputs)
    torch.autograd.grad(warm, (q, k, v), torch.zeros_like(warm))
    del warm
    row_bytes = shape.b * shape.h * shape.m * 4
    out, forward = peak(lambda: op(q, k, v, **inputs))
    grad = torch.randn_like(out)
    grads, backward = peak(lambda: gradients(out, grad, {"dq": q, "dk": k, "dv": v}))
    assert all(bool(g.isfinite().all()) for g in grads.values())
    expected = {"forward": size(out) + row_bytes, "backward": size(*grads.values()) + row_bytes}
    named = {"forward": "out + lse", "backward": "dq + dk + dv + delta"}
    return [
        {"mode": mode, "peak_bytes": got, "expected_bytes": expected[mode], "expected": named[mode]}
        for mode, got in (("forward", forward), ("backward", backward))
    ]


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("memory")
    lines = []
    for case in run.take([CAUSAL, ALIBI, DOCUMENTS_1024], quick=1):
        if run.out_of_time(results, case.name):
            break
        try:
            against_reference(ac.compile(case.variant), case, CHECKED)
            torch.cuda.empty_cache()
            rows = measure(case, SHAPE)
        except Exception as error:
            run.fail(results, case.name, error, case=case.name, **SHAPE.row())
            continue
        for row in rows:
            results.add(case=case.name, **SHAPE.row(), **row)
            got, least = row["peak_bytes"] / MIB, row["expected_bytes"] / MIB
            lines.append([case.name, row["mode"], f"{got:.1f}", f"{least:.1f}", row["expected"], f"{got - least:+.2f}"])
    run.show(
        f"memory, MiB at S={SHAPE.m}, {SHAPE.h} query heads on {SHAPE.hkv}, {results.meta['gpu']}",
        ["case", "mode", "peak", "results alone", "which are", "difference"],
        lines,
    )
