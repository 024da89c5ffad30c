"""Whether forward and backward repeat bit for bit where a fixed order is asked for, over the dense cases and a
grouped-head one: no times."""

from __future__ import annotations

import torch

import attncc as ac
from bench.case import Case, Shape, Tensors
from bench.check import against_reference, gradients
from bench.dense_cases import CAUSAL, DENSE
from bench.run import Run
from bench.suites.dense import LENGTHS, shape

REPEATS = 4
GROUPED = Shape(b=2, h=32, hkv=8, m=4096, d=128)


def outcome(op: object, case: Case, shape: Shape, inputs: Tensors) -> Tensors:
    """out, lse and every gradient of one call."""
    q, k, v = shape.tensors()
    wanted = {"dq": q, "dk": k, "dv": v}
    for name in case.differentiable:
        wanted[f"d{name}"] = inputs[name].requires_grad_()
    out, lse = op(q, k, v, outputs=("out", "lse"), **inputs)  # type: ignore[operator]
    grad = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(2), device="cuda", dtype=out.dtype)
    return {"out": out.detach(), "lse": lse.detach(), **gradients(out, grad, wanted)}


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in every bit: two NaN with the same bits are equal, 0 and -0 are not."""
    width = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return bool((a.contiguous().view(width) == b.contiguous().view(width)).all())


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("determinism")
    cells = [(case, shape(length)) for length in LENGTHS for case in DENSE] + [(CAUSAL, GROUPED)]
    lines = []
    for case, size in run.take(cells, quick=2):
        if run.out_of_time(results, case.name):
            break
        try:
            op = ac.compile(case.variant, deterministic=True)
            against_reference(op, case, size)
            inputs = case.inputs(size, "cuda")
            first = outcome(op, case, size, inputs)
            same = dict.fromkeys(first, True)
            for _ in range(REPEATS - 1):
                again = outcome(op, case, size, inputs)
                same = {name: same[name] and identical(first[name], again[name]) for name in first}
            if not all(same.values()):
                raise AssertionError(f"differs between runs: {', '.join(n for n, ok in same.items() if not ok)}")
        except Exception as error:
            run.fail(results, case.name, error, case=case.name, **size.row())
            continue
        results.add(case=case.name, **size.row(), repeats=REPEATS, identical=same)
        lines.append([case.name, str(size.m), f"{size.h}/{size.hkv}", str(REPEATS), ", ".join(same)])
    run.show(f"determinism, {results.meta['gpu']}", ["case", "S", "heads", "runs", "identical in every bit"], lines)
