"""Microseconds of host time of one call on tensors too small to keep the GPU busy: ours, FlexAttention, SDPA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import attncc as ac
from bench import area
from bench.case import Case, FlexForm, Shape
from bench.check import against_reference
from bench.dense_cases import ALIBI, CAUSAL
from bench.peers import flex
from bench.run import Run
from bench.timing import host_us

SLOPE = 0.01
LINEAR_BIAS = Case(
    "linear bias",
    ac.Variant(name="linear_bias", score=lambda score, q_idx, kv_idx: score + SLOPE * (kv_idx - q_idx)),
    area.full,
    flex=FlexForm(score_mod=lambda shape, inputs: lambda s, b, h, q_idx, kv_idx: s + SLOPE * (kv_idx - q_idx)),
)
SHAPE = Shape(b=1, h=2, m=128, d=64)


def _calls(case: Case) -> tuple[dict[str, Callable[[], torch.Tensor]], list[torch.Tensor]]:
    """One call of each contestant, and the tensors that gradients are asked of: those of the inputs, too."""
    q, k, v = SHAPE.tensors()
    inputs = case.inputs(SHAPE, "cuda")
    leaves = [q, k, v, *(inputs[name].requires_grad_() for name in case.differentiable)]
    op, theirs = ac.compile(case.variant), flex(case, SHAPE, inputs)
    calls: dict[str, Callable[[], Any]] = {
        "attncc": lambda: op(q, k, v, **inputs),
        "flex": lambda: theirs(q, k, v),
    }
    if not case.differentiable:
        calls["sdpa"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=case is CAUSAL)
    return calls, leaves


def _trained(call: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], object]:
    """The call and its backward."""
    grad = torch.ones_like(call())
    # an answer without the inputs' gradients would not be the same answer
    return lambda: torch.autograd.grad(call(), leaves, grad)


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("host")
    lines = []
    for case in (LINEAR_BIAS, CAUSAL, ALIBI):
        if run.out_of_time(results, case.name):
            break
        try:
            against_reference(ac.compile(case.variant), case, SHAPE)
        except Exception as error:
            run.fail(results, case.name, error, case=case.name)
            continue
        calls, leaves = _calls(case)
        for call in calls.values():
            _trained(call, leaves)()  # backwards compile beside the calls that follow, and would take their time
        taken: dict[str, dict[str, float]] = {}
        with torch.no_grad():
            taken["no_grad"] = {name: host_us(call) for name, call in calls.items()}
        taken["autograd"] = {name: host_us(call) for name, call in calls.items()}
        taken["autograd, with the backward"] = {name: host_us(_trained(call, leaves)) for name, call in calls.items()}
        for mode, times in taken.items():
            rounded = {name: round(us, 1) for name, us in times.items()}
            results.add(case=case.name, **SHAPE.row(), mode=mode, us=rounded)
            lines.append(
                [case.name, mode, *(f"{rounded[n]:.1f}" if n in rounded else "" for n in ("attncc", "flex", "sdpa"))]
            )
    run.show(
        f"host, microseconds a call, {results.meta['gpu']}", ["case", "", "attncc", "FlexAttention", "SDPA"], lines
    )
