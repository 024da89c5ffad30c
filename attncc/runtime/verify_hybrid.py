"""Verification of a hybrid: output and all gradients by the rules of `verify`, in one call and in two with a state."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attncc.codegen.plan import Plan
from attncc.language.hybrid import Hybrid
from attncc.runtime.hybrid import HybridOp
from attncc.runtime.reference import evaluated, largest_score, reference
from attncc.runtime.samples import Sample, Shape, sample_inputs
from attncc.runtime.tf32 import Tf32Matmuls
from attncc.runtime.verify import Row, as_double, check, matmuls_in, results_of


def verify_hybrid(
    hybrid: Hybrid,
    op: HybridOp,
    shapes: Sequence[Shape],
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    tf32: bool = False,
    seed: int = 0,
) -> list[Row]:
    """Rows as `verify_variant` has them, at these shapes, with as many keys as queries where a part has a state.

    Where every part can go on from a state, `out` is also computed in two calls, of which the second begins with the
    state behind the first, and held against the reference of one.
    """
    rows = []
    for at, shape in enumerate(shapes):
        own = replace(shape, kv_len=shape.q_len) if op.same_tokens else shape
        rows += _verified(hybrid, op, own, device, dtype, tf32, seed + at)
    return rows


def _verified(
    hybrid: Hybrid, op: HybridOp, shape: Shape, device: torch.device | str, dtype: torch.dtype, tf32: bool, seed: int
) -> list[Row]:
    graph = hybrid.graph
    sample = _sample(hybrid, shape, dtype, device, seed)
    differentiable = tuple(d.name for d in graph.inputs if d.grad)
    derived = all(part.recurrent or Plan(part).has_backward is None for _, part in graph.parts)
    asked = (dtype, ("out",), differentiable, derived)
    number = torch.promote_types(dtype, torch.float32)

    def eager(q: Tensor, k: Tensor, v: Tensor, outputs: tuple[str, ...], **inputs: Any) -> Any:
        return evaluated(graph, q, k, v, None, inputs, outputs, number)

    exact = results_of(lambda *a, **kw: reference(hybrid, *a, **kw), as_double(sample), *asked)
    with matmuls_in(False), Tf32Matmuls() if tf32 else contextlib.nullcontext():
        plain = results_of(eager, sample, *asked)
    score = max((_largest(hybrid, name, sample) for name, part in graph.parts if not part.recurrent), default=0.0)
    limits: dict[str, Any] = {"dtype": dtype, "tf32": tf32, "score": score}
    with matmuls_in(tf32):
        got, again = (results_of(op, sample, *asked) for _ in range(2))
        pieces = _in_two(op, sample) if op.cannot_go_on() is None else None
    rows = []
    for name, value in got.items():
        found = check(name, value, exact[name], plain[name], "forward" if name == "out" else "gradient", **limits)
        rows.append(Row(shape, found, torch.equal(value, again[name]), ordered=name not in op.free_sums()))
    if pieces is not None:
        found = check("out (in two calls)", pieces, exact["out"], plain["out"], **limits)
        rows.append(Row(shape, found, repeatable=True))
    return rows


@torch.no_grad()
def _in_two(op: HybridOp, sample: Sample) -> Tensor:
    """The output of a call for the first two thirds of the tokens, and of one for the rest."""
    assert sample.v is not None
    length = sample.q.shape[2]
    cut = 2 * length // 3
    state, pieces = None, []
    for tokens in (slice(0, cut), slice(cut, length)):
        tensors = [x[:, :, tokens] for x in (sample.q, sample.k, sample.v)]
        inputs = {
            name: _of(x, op.along.get(name), tokens) if isinstance(x, Tensor) else x
            for name, x in sample.inputs.items()
        }
        out, state = op(*tensors, initial_state=state, output_final_state=True, position=tokens.start, **inputs)
        pieces.append(out)
    return torch.cat(pieces, 2)


def _of(x: Any, axis: int | None, tokens: slice) -> Any:
    """What an input has of these tokens; a scalar as it is."""
    if axis is None or x.shape[axis] == 1:
        return x
    return x.narrow(axis, tokens.start, tokens.stop - tokens.start)


def _sample(hybrid: Hybrid, shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> Sample:
    """One q, k and v for all parts, and each input as the first of them takes it that declares it."""
    graph = hybrid.graph
    drawn = [sample_inputs(part, shape, dtype, device, seed) for _, part in graph.parts]
    k = next((s.k for s, (_, part) in zip(drawn, graph.parts, strict=True) if part.recurrent), drawn[0].k)
    combine = sample_inputs(graph.combine, shape, dtype, device, seed)
    inputs: dict[str, Any] = {}
    for one in (*drawn, combine):
        inputs = {**one.inputs, **inputs}
    return Sample(drawn[0].q, k, drawn[0].v, inputs)


def _largest(hybrid: Hybrid, name: str, sample: Sample) -> float:
    part = hybrid.parts[name]
    known = {d.name for d in part.graph.inputs} | {s.name for s in part.graph.scalars}
    inputs = {key: x for key, x in sample.inputs.items() if key in known}
    return largest_score(part, sample.q, sample.k, sample.v, **inputs)
