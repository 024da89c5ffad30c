"""What a fixed order of every sum costs, forward to backward: `deterministic=True` beside the default.

All are compiled, checked and run several times ahead, side by side: with a fixed order everything has to be the same
bit for bit. Then each is timed alone, the two in turns.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import torch

import attncc as ac
from bench.case import Case, Shape, Tensors
from bench.check import against_reference, gradients
from bench.dense_cases import CAUSAL, DENSE, FULL
from bench.run import NotReadyError, Run
from bench.suites.dense import LENGTHS, TOKENS, shape
from bench.timing import race

REPEATS = 4
#: other heads, at one length: (query heads, key heads, head dimension)
HEADS = ((32, 32, 64), (8, 8, 256), (32, 8, 128), (28, 4, 128))
LENGTH = 4096
#: the longest sequence that is held against the reference: many processes do at once
CHECKED = 2048


def cells() -> list[tuple[Case, Shape]]:
    """The dense cases, then causal and full over other heads."""
    others = [Shape(b=TOKENS // LENGTH // 2, h=h, hkv=hkv, m=LENGTH, d=d) for h, hkv, d in HEADS]
    found = [(case, shape(length)) for length in LENGTHS for case in DENSE]
    return found + [(case, size) for size in others for case in (CAUSAL, FULL)]


def outcome(op: Any, case: Case, shape: Shape, inputs: Tensors) -> Tensors:
    """out, lse and every gradient of one call."""
    q, k, v = shape.tensors()
    wanted = {"dq": q, "dk": k, "dv": v}
    for name in case.differentiable:
        wanted[f"d{name}"] = inputs[name].requires_grad_()
    out, lse = op(q, k, v, outputs=("out", "lse"), **inputs)
    grad = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(2), device="cuda", dtype=out.dtype)
    return {"out": out.detach(), "lse": lse.detach(), **gradients(out, grad, wanted)}


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in every bit: two NaN with the same bits are equal, 0 and -0 are not."""
    width = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return bool((a.contiguous().view(width) == b.contiguous().view(width)).all())


def prepared(number: int) -> dict[str, bool]:
    """In another process: compile both, hold both against the reference, and run the one of a fixed order again and
    again. Whether each result has the same bits every time."""
    case, size = cells()[number]
    short = min(size.m, CHECKED)
    for fixed in (False, True):
        op = ac.compile(case.variant, deterministic=fixed)
        against_reference(op, case, replace(size, m=short, n=short))
        outcome(op, case, size, case.inputs(size, "cuda"))
    inputs = case.inputs(size, "cuda")
    first = outcome(op, case, size, inputs)
    same = dict.fromkeys(first, True)
    for _ in range(REPEATS - 1):
        again = outcome(op, case, size, inputs)
        same = {name: same[name] and identical(first[name], again[name]) for name in first}
    if not all(same.values()):
        raise AssertionError(f"differs between runs: {', '.join(name for name, ok in same.items() if not ok)}")
    return same


def steps(case: Case, size: Shape) -> dict[str, Any]:
    """Forward and backward with the order of sums free and fixed, to be timed."""
    q, k, v = size.tensors()
    inputs = case.inputs(size, "cuda")
    grad = torch.randn((size.b, size.h, size.m, size.dv), device="cuda", dtype=size.dtype)

    def step(op: Any) -> Any:
        return lambda: torch.autograd.grad(op(q, k, v, **inputs), (q, k, v), grad)

    return {
        "free": step(ac.compile(case.variant)),
        "fixed": step(ac.compile(case.variant, deterministic=True)),
    }


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("determinism")
    numbers = run.take(list(range(len(cells()))), quick=2)
    ready = dict(zip(numbers, run.ahead(prepared, numbers), strict=True))
    lines, costs = [], []
    for number in numbers:
        case, size = cells()[number]
        if run.out_of_time(results, f"{case.name} {size.row()}"):
            break
        try:
            if ready[number].error is not None:
                raise NotReadyError(ready[number].error)
            times = race(steps(case, size), rounds=3, rep_ms=40)
        except Exception as error:
            run.fail(results, case.name, error, case=case.name, **size.row())
            continue
        ms = {name: round(timing.ms, 4) for name, timing in times.items()}
        costs.append(ms["fixed"] / ms["free"])
        cost = round(costs[-1], 3)
        results.add(case=case.name, **size.row(), repeats=REPEATS, identical=ready[number].value, ms=ms, cost=cost)
        heads = f"{size.h}/{size.hkv}"
        lines.append(
            [case.name, str(size.m), str(size.d), heads, f"{ms['free']:.3f}", f"{ms['fixed']:.3f}", f"{cost}x"]
        )
    columns = ["case", "S", "D", "heads", "free, ms", "fixed, ms", "cost"]
    run.show(f"determinism, forward and backward, {results.meta['gpu']}", columns, lines)
    if costs:
        print(f"cost of a fixed order: median {statistics.median(costs):.3f}x, worst {max(costs):.3f}x")
