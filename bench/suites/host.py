"""Microseconds of host time of one call on tensors too small to keep the GPU busy: ours, FlexAttention, SDPA.

All that is to compile is compiled before anything is timed, and then all take turns: between two calls that do the same
for the host, what ran first was 1.4 times slower otherwise, SDPA too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F

import attncc as ac
from attncc.runtime.binaries import settle
from bench import area
from bench.case import Case, FlexForm, Shape
from bench.check import against_reference
from bench.dense_cases import ALIBI, CAUSAL
from bench.peers import flex
from bench.run import NotReadyError, Run
from bench.timing import host_us

SLOPE = 0.01
LINEAR_BIAS = Case(
    "linear bias",
    ac.Variant(name="linear_bias", score=lambda score, q_idx, kv_idx: score + SLOPE * (kv_idx - q_idx)),
    area.full,
    flex=FlexForm(score_mod=lambda shape, inputs: lambda s, b, h, q_idx, kv_idx: s + SLOPE * (kv_idx - q_idx)),
)
SHAPE = Shape(b=1, h=2, m=128, d=64)


def _calls(case: Case, names: Collection[str]) -> tuple[dict[str, Callable[[], torch.Tensor]], list[torch.Tensor]]:
    """One call of each of these contestants, and the tensors that gradients are asked of: those of the inputs, too."""
    q, k, v = SHAPE.tensors()
    inputs = case.inputs(SHAPE, "cuda")
    leaves = [q, k, v, *(inputs[name].requires_grad_() for name in case.differentiable)]
    calls: dict[str, Callable[[], Any]] = {}
    if "attncc" in names:
        op = ac.compile(case.variant)
        calls["attncc"] = lambda: op(q, k, v, **inputs)
    if "flex" in names:
        theirs = flex(case, SHAPE, inputs)
        calls["flex"] = lambda: theirs(q, k, v)
    if "sdpa" in names:
        calls["sdpa"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=case is CAUSAL)
    return calls, leaves


def _trained(call: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], object]:
    """The call and its backward."""
    grad = torch.ones_like(call())
    # an answer without the inputs' gradients would not be the same answer
    return lambda: torch.autograd.grad(call(), leaves, grad)


CASES = {case.name: case for case in (LINEAR_BIAS, CAUSAL, ALIBI)}
COLUMNS = ("attncc", "flex", "sdpa")
#: without SDPA, which has no other score and no gradient of an input
WORK = [(case, name) for case in CASES for name in COLUMNS if name != "sdpa" or not CASES[case].differentiable]


def prepared(piece: tuple[str, str]) -> None:
    """In another process: what a contestant compiles, into the caches; ours is checked."""
    case, name = CASES[piece[0]], piece[1]
    if name == "attncc":
        against_reference(ac.compile(case.variant), case, SHAPE)
    calls, leaves = _calls(case, {name})
    _trained(calls[name], leaves)()


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("host")
    work = [piece for piece in WORK if piece[1] != "sdpa"]
    failed = {}
    for piece, done in zip(work, run.ahead(prepared, work), strict=True):
        if done.error is not None:
            failed[piece] = done.error
            run.fail(results, f"{piece[0]} {piece[1]}", NotReadyError(done.error), case=piece[0], who=piece[1])
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    trained: dict[tuple[str, str], Callable[[], object]] = {}
    for case in CASES:
        if run.out_of_time(results, case):
            break
        names = {name for of, name in WORK if of == case and (of, name) not in failed}
        made, leaves = _calls(CASES[case], names)
        for name, call in made.items():
            calls[case, name], trained[case, name] = call, _trained(call, leaves)
            trained[case, name]()
    settle()
    with torch.no_grad():
        taken = {"no_grad": host_us(calls)}
    taken |= {"autograd": host_us(calls), "autograd, with the backward": host_us(trained)}
    lines = []
    for case in dict.fromkeys(case for case, _ in calls):
        for mode, times in taken.items():
            rounded = {name: round(times[case, name], 1) for name in COLUMNS if (case, name) in times}
            results.add(case=case, **SHAPE.row(), mode=mode, us=rounded)
            lines.append([case, mode, *(f"{rounded[name]:.1f}" if name in rounded else "" for name in COLUMNS)])
    run.show(
        f"host, microseconds a call, {results.meta['gpu']}", ["case", "", "attncc", "FlexAttention", "SDPA"], lines
    )
