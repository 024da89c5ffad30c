"""Microseconds of host time of one call on tensors too small to keep the GPU busy: ours, FlexAttention, SDPA."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import attncc as ac
from bench import area
from bench.case import Case, FlexForm, Shape
from bench.check import against_reference
from bench.dense_cases import CAUSAL
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


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("host")
    q, k, v = SHAPE.tensors()
    lines = []
    for case in (LINEAR_BIAS, CAUSAL):
        try:
            op = ac.compile(case.variant)
            against_reference(op, case, SHAPE)
        except Exception as error:
            run.fail(results, case.name, error, case=case.name)
            continue
        calls: dict[str, Callable[[], object]] = {
            "attncc": partial(op, q, k, v),
            "flex": partial(flex(case, SHAPE, {}), q, k, v),
            "sdpa": partial(F.scaled_dot_product_attention, q, k, v, is_causal=case is CAUSAL),
        }
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                taken = {name: round(host_us(call), 1) for name, call in calls.items()}
            label = "autograd on" if grad else "no_grad"
            results.add(case=case.name, **SHAPE.row(), autograd=grad, us=taken)
            lines.append([case.name, label, *(f"{taken[name]:.1f}" for name in calls)])
    run.show(
        f"host, microseconds a call, {results.meta['gpu']}", ["case", "", "attncc", "FlexAttention", "SDPA"], lines
    )
