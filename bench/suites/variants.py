"""Every shipped variant at S=4096 beside our own causal: what a formula costs over plain causal attention.

All are compiled and checked ahead, side by side; then each is timed alone. A row says how many passes over the keys its
plan takes, and which unit of the GPU limits each kernel by the cost model.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import attncc as ac
from attncc.passes.running import running_sums
from bench import area
from bench.case import Case, Shape, Tensors
from bench.check import against_reference
from bench.compare import compare, table
from bench.dense_cases import CAUSAL, DOCUMENT
from bench.run import NotReadyError, Run

SHAPE = Shape(b=4, h=16, m=4096, d=128)
PREFIX = 1024
#: entries of a table whose size no sequence fixes (T5's buckets)
FREE = 32
#: what all others stand beside
OURS = replace(CAUSAL, name="our causal")
#: the length at which a loop over components is checked: its reference has an element for each pair and component
LOOPED = 384
#: those that the suite `linear` times
IN_LINEAR_TIME = ("linear_attention", "retention", "lightning", "simple_gla", "ssd", "gla", "rwkv6")

#: the mask area of the variants that have it in closed form; that of others is counted
AREAS: dict[str, Callable[[int, int], int]] = {
    **dict.fromkeys(("full", "t5_bias", "dense_bias", "relu", "relu2", "taylor"), area.full),
    **dict.fromkeys(("cosine", "trilinear", "location", "gaussian_position", "gmm", "slots", "reversed"), area.full),
    **dict.fromkeys(("causal", "alibi", "softcap", "gemma2_global"), area.causal),
    "sliding_window": lambda m, n: area.window(m, n, 1024),
    "flash_window": lambda m, n: area.window(m, n, 1025),
    "gemma2_local": lambda m, n: area.window(m, n, 4096),
    "prefix_lm": lambda m, n: area.prefix(m, n, PREFIX),
    "document": lambda m, n: area.documents([DOCUMENT] * (n // DOCUMENT) + [n % DOCUMENT]),
}


def fitted(variant: ac.Variant, shape: Shape) -> Shape:
    """`shape` for a variant whose v is the first elements of k: with heads that much wider, and one head of k."""
    value = variant.graph.value
    return shape if value is None else replace(shape, hkv=1, d=value + shape.d // 2, dv=value, tied=True)


def inputs(variant: ac.Variant, shape: Shape, device: str) -> Tensors:
    """Values for every tensor that a shipped variant declares: its default, else the same random ones every time."""
    sizes = {"b": shape.b, "h": shape.h, "h_kv": shape.hkv, "q_idx": shape.m, "kv_idx": shape.n}
    dims = {**sizes, "distance": shape.n, **({"d": shape.d} if variant.graph.vectors else {})}
    gates = {s.of for s in running_sums(variant.graph)}
    made: Tensors = {}
    for decl in variant.graph.inputs:
        random = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        size = [dims.get(dim, FREE) for dim in decl.pattern]
        if decl.default is not None:
            made[decl.name] = torch.as_tensor(decl.default(sizes), dtype=torch.float32, device=device)
        elif decl.dtype == "int" and decl.pattern == ("b", "kv_idx"):
            made[decl.name] = (torch.arange(shape.n, device=device, dtype=torch.int32) // DOCUMENT).expand(size).clone()
        elif decl.dtype == "int":
            made[decl.name] = torch.full(size, PREFIX, device=device, dtype=torch.int32)
        elif decl.name in gates:  # logs of what a token leaves of a state
            made[decl.name] = -8 / shape.n * torch.rand(size, **random)
        elif "kv_idx" in decl.pattern:  # one bias for all sequences, as models have it
            shared = [1 if dim == "b" else extent for dim, extent in zip(decl.pattern, size, strict=True)]
            made[decl.name] = torch.randn(shared, **random, dtype=shape.dtype)
        else:
            made[decl.name] = torch.rand(size, **random) + 0.5  # positive: temperatures are among them
        if "d" in decl.pattern and "b" not in decl.pattern:  # a layer's weights, as small as models have them
            made[decl.name] /= math.sqrt(shape.d)
    return made


def counted(variant: ac.Variant, m: int, n: int) -> int:
    """The mask area of a variant, on average over the heads."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = replace(fitted(variant, SHAPE), b=1, m=m, n=n)
    return area.counted(variant.graph.parts[0], inputs(variant, shape, device), shape.h, m, n)


def case(name: str) -> Case:
    """A shipped variant as a case without peers."""
    variant = ac.variants.get(name)
    wanted = tuple(decl.name for decl in variant.graph.inputs if decl.grad)
    return Case(
        name,
        variant,
        AREAS.get(name, partial(counted, variant)),
        inputs=lambda shape, device: inputs(variant, shape, device),
        differentiable=wanted,
    )


def prepared(name: str) -> dict[str, Any]:
    """In another process: compile a variant into the caches, and hold it against the reference. What its rows say of
    that, and how many passes over the keys it takes."""
    gc.collect()
    torch.cuda.empty_cache()  # what the variant before this one left: processes share the GPU's memory
    own = OURS if name == OURS.name else case(name)
    op: Any = ac.compile(own.variant, plan="parallel")
    shape = fitted(own.variant, SHAPE)
    checked = shape if op.engine.plan.facts.similarity.looped == 0 else replace(shape, m=LOOPED, n=LOOPED)
    errors = against_reference(op, replace(own, differentiable=()), checked)
    if checked is not shape:
        out = op(*shape.tensors(), **own.inputs(shape, "cuda"))
        out.backward(torch.randn_like(out))
    passes = max(part.online.passes for part in op.engine.plan.parts)
    return {"errors": errors, "more": {"passes": passes, "checked_at": checked.m}}


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("variants")
    names = [OURS.name, *run.take([n for n in ac.variants.names() if n not in IN_LINEAR_TIME], quick=3)]
    ready = dict(zip(names, run.ahead(prepared, names), strict=True))
    results.note("seconds ahead", round(run.budget.elapsed()))
    causal: dict[str, dict[str, Any]] = {}
    shown = []
    for name in names:
        if run.out_of_time(results, name):
            break
        own = OURS if name == OURS.name else case(name)
        shape = fitted(own.variant, SHAPE)
        if ready[name].error is not None:
            run.fail(results, name, NotReadyError(ready[name].error), case=name, **shape.row())
            continue
        found = ready[name].value
        rows = compare(run, results, own, shape, peers={}, checked=found["errors"], rounds=2, rep_ms=40)
        for row in rows:
            row |= found["more"]
            if name == OURS.name:
                causal[row["mode"]] = row
            elif causal:
                theirs = {key: causal[row["mode"]]["attncc"][key] for key in ("ms", "tflops", "spread")}
                row["peers"] = {OURS.name: theirs}
                row["ratio"] = {OURS.name: round(row["attncc"]["tflops"] / theirs["tflops"], 3)}
        results.write()
        shown += rows
    table(run, f"variants, TFLOP/s, {results.meta['gpu']}", shown, sizes=("passes",))
