"""Check kernels against the float64 reference and plain PyTorch in the same dtype. Two rules must both hold.

1. No element is further from the reference than 2 times (gradients: 3 times) the error of plain PyTorch in the same
dtype
   (or tf32), plus the error of rounding the exact result. For gradients, also plus the error of rounding an exponent to
   float32: a backward kernel recomputes the weights from scores and a stored row statistic, which is as large as scores
   are, while plain PyTorch stores the weights.
2. RMS(error) / RMS(reference) is at most 5e-3 in 16 bits and tf32, 1e-5 in float32.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from attncc.codegen.plan import Plan
from attncc.errors import UnsupportedError
from attncc.ir.graph import VariantGraph
from attncc.language.hybrid import Hybrid
from attncc.language.variant import Variant
from attncc.passes.cotangents import differentiable_outputs
from attncc.runtime.hybrid import HybridOp
from attncc.runtime.linear import LinearOp
from attncc.runtime.op import AttentionOp
from attncc.runtime.recurrence import RecurrenceOp
from attncc.runtime.reference import evaluated, graph_of, largest_score, log_denominator, reference
from attncc.runtime.samples import Sample, Shape, sample_inputs
from attncc.runtime.shapes import value_of
from attncc.runtime.tf32 import Tf32Matmuls
from attncc.runtime.verify_outputs import compared
from attncc.schedule.linear import PlanName

__all__ = [
    "Check",
    "Exam",
    "Kind",
    "Row",
    "Sample",
    "Shape",
    "check",
    "eager",
    "sample_inputs",
    "shapes_for",
    "verify_variant",
]

Kind = Literal["forward", "gradient"]
_FACTOR: dict[str, float] = {"forward": 2.0, "gradient": 3.0}
_RMS_16_BIT, _RMS_32_BIT = 5e-3, 1e-5
#: the noise of float32 accumulation at unit scale: where the exact result is 0, nothing can be measured relative to it
_FLOOR = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Check:
    """The error of one result against the reference, and the error that is allowed."""

    name: str
    ok: bool
    max_err: float
    max_allowed: float
    rms: float
    rms_allowed: float


@dataclass(frozen=True)
class Row:
    """One result of one verified call. `repeatable`: a second call gave the same bits; `ordered`: it had to, because
    the order of its sums is fixed."""

    shape: Shape
    check: Check
    repeatable: bool
    ordered: bool = True

    @property
    def ok(self) -> bool:
        """Whether the result is right, and the same each time where that is promised."""
        return self.check.ok and (self.repeatable or not self.ordered)


def check(
    name: str,
    got: Tensor,
    reference: Tensor,
    eager: Tensor,
    kind: Kind = "forward",
    *,
    dtype: torch.dtype | None = None,
    tf32: bool = False,
    score: float = 0.0,
) -> Check:
    """Hold one result against both rules. `dtype` is that of the computation, if not that of `got` (lse is float32);
    `score` is the largest |score| of the call.

    Infinities (the lse of a row that sees no key) and integers must agree exactly; a NaN is always wrong. A gradient
    may have the RMS error of `eager`: a sum that nearly cancels, as a bias' gradient may, has no small relative error
    in 16 bits. Where it cancels whole, two equally good results are two draws of noise, whose RMS over n elements
    differ by chance: by three standard deviations, 3 / sqrt(2 n), at most.
    """
    if not got.is_floating_point():  # a count
        return _exactly(name, got, reference)
    dtype = got.dtype if dtype is None else dtype
    exact = reference.double()
    finite = exact.isfinite()
    agree = bool((got.double()[~finite] == exact[~finite]).all())
    exact = exact[finite]
    error = (got.double()[finite] - exact).abs()
    plain = (eager.double()[finite] - exact).abs().nan_to_num(nan=0.0, posinf=0.0)
    max_err, rms = _largest(error) if agree else torch.inf, _rms(error)
    exponents = torch.finfo(torch.float32).eps * score if kind == "gradient" else 0.0
    rounding = torch.finfo(dtype).eps + exponents
    max_allowed = _FACTOR[kind] * _largest(plain) + rounding * _largest(exact.abs()) + _FLOOR
    limit = _RMS_16_BIT if tf32 or torch.finfo(dtype).bits == 16 else _RMS_32_BIT
    chance = 1 + 3 / math.sqrt(2 * max(exact.numel(), 1))
    rms_allowed = max(limit * _rms(exact), chance * _rms(plain) if kind == "gradient" else 0.0) + _FLOOR
    return Check(name, max_err <= max_allowed and rms <= rms_allowed, max_err, max_allowed, rms, rms_allowed)


def _exactly(name: str, got: Tensor, reference: Tensor) -> Check:
    """Integers must be equal."""
    error = (got - reference).abs().double()
    return Check(name, not bool(error.any()), _largest(error), 0.0, _rms(error), 0.0)


def _largest(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def eager(
    variant: Variant | VariantGraph | str | Path,
    /,
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    scale: float | None = None,
    outputs: str | Sequence[str] = ("out",),
    **inputs: Any,
) -> Any:
    """The reference's own steps in the dtype of q, k, v, with index arithmetic in float32: what plain PyTorch gives."""
    number = torch.promote_types(q.dtype, torch.float32)
    graph = graph_of(variant)
    results = evaluated(graph, q, k, value_of(graph, k, v), scale, inputs, outputs, number)
    return results[0] if len(results) == 1 else results


def shapes_for(device: torch.device | str) -> tuple[Shape, ...]:
    """The shapes at which variants are verified: odd lengths, M != N both ways (fully masked rows), GQA, Dqk != Dv,
    views."""
    if torch.device(device).type == "cpu":  # the interpreter is slow
        return (
            Shape(1, 2, 2, 64, 64, 32, 32),
            Shape(2, 4, 2, 37, 53, 16, 24, strided=True),
            Shape(1, 2, 1, 50, 19, 24, 16, broadcast=("b", "h")),
        )
    return (
        Shape(2, 4, 4, 512, 512, 64, 64),
        Shape(1, 8, 2, 333, 517, 128, 64, strided=True),
        Shape(2, 4, 1, 300, 77, 96, 128, broadcast=("b", "q_idx")),
        Shape(2, 4, 2, 1, 700, 80, 80),
        Shape(1, 2, 2, 1024, 1024, 192, 128, strided=True, broadcast=("h",)),
    )


def verify_variant(
    variant: Variant | Hybrid,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[Shape] | None = None,
    op: Callable[..., Any] | None = None,
    *,
    tf32: bool = False,
    seed: int = 0,
) -> list[Row]:
    """Compile `variant` (unless `op` is given), hold outputs and all gradients against the reference at each shape.

    Every call is made twice and compared bit for bit, but for gradients whose sums have no fixed order. lse is checked
    where the normalizer has one, auxiliary outputs where the variant has them, and gradients where a backward can be
    derived. A variant that is linear in time is checked by each of its plans, those with a state at the shapes that
    have one: with as many queries as keys where it is causal, and heads it has room for. A recurrence is checked at
    these shapes with as many keys as there are queries, and so is a hybrid with a part that has a state. The tensors of
    the first shape are made from `seed`, those of the next from the next number.
    """
    import attncc

    chosen = list(shapes_for(device) if shapes is None else shapes)
    op = attncc.compile(variant) if op is None else op
    if isinstance(variant, Hybrid):
        from attncc.runtime.verify_hybrid import verify_hybrid

        assert isinstance(op, HybridOp)
        return verify_hybrid(variant, op, chosen, device, dtype, tf32=tf32, seed=seed)

    out_alone = variant.graph.recurrent or not (_has_lse(variant.graph) or variant.graph.outputs)

    @functools.cache  # all plans are held against what is right for a shape, which takes longer than they do
    def exam(shape: Shape, only_out: bool) -> Exam:
        return Exam(variant, shape, device, dtype, seed=seed + chosen.index(shape), tf32=tf32, only_out=only_out)

    def verified(run: Callable[..., Any], shapes: Sequence[Shape], only_out: bool = False) -> list[Row]:
        return [row for shape in shapes for row in exam(shape, only_out or out_alone).rows(run)]

    def planned(plan: PlanName, shapes: Sequence[Shape]) -> list[Row]:
        rows = verified(functools.partial(op, plan=plan), shapes, only_out=True)
        return [replace(row, check=replace(row.check, name=f"{row.check.name} ({plan})")) for row in rows]

    if isinstance(op, RecurrenceOp):
        chosen = [replace(shape, kv_len=shape.q_len) for shape in chosen]
        return [*planned("chunk", chosen), *planned("recurrent", chosen)]
    if not isinstance(op, LinearOp):
        return verified(op, chosen)
    rows = verified(op.parallel, chosen)
    samples = {shape: sample_inputs(variant.graph, shape, dtype, device) for shape in chosen}
    served = [
        shape for shape, s in samples.items() if op.without_state(s.q, s.k, value_of(variant.graph, s.k, s.v)) is None
    ]
    rows += planned("chunk", served)
    return rows + (planned("recurrent", served) if op.linear.causal else [])


class Exam:
    """A variant's sample at one shape and what is right for it, computed once for all that are held against it."""

    def __init__(
        self,
        variant: Variant,
        shape: Shape,
        device: torch.device | str,
        dtype: torch.dtype,
        seed: int = 0,
        *,
        gradients: bool = True,
        only_out: bool = False,
        tf32: bool = False,
    ):
        """`gradients`: those of all inputs are held against the reference, too, where a backward can be derived;
        `only_out`: of the outputs, `out` alone is."""
        graph = variant.graph
        if graph.recurrent:
            only_out = True
        auxiliary = tuple(o.name for o in graph.outputs)
        self.outputs: tuple[str, ...] = ("out",)
        if not only_out:
            self.outputs = (*(("out", "lse") if _has_lse(graph) else ("out",)), *auxiliary)
        derived = set() if graph.recurrent else _derived(graph)
        differentiable = tuple(d.name for d in graph.inputs if d.grad)
        with_gradients = gradients and (graph.recurrent or Plan(graph).has_backward is None)
        self._asked = (dtype, self.outputs, differentiable, with_gradients, frozenset(auxiliary) - derived)
        self.graph, self.shape, self.dtype, self.tf32 = graph, shape, dtype, tf32
        self.sample = sample_inputs(graph, shape, dtype, device, seed)
        self._exact = results_of(lambda *a, **k: reference(variant, *a, **k), as_double(self.sample), *self._asked)
        with matmuls_in(False), Tf32Matmuls() if tf32 else contextlib.nullcontext():
            self._plain = results_of(lambda *a, **k: eager(variant, *a, **k), self.sample, *self._asked)
        self._score = 0.0
        if not graph.recurrent:
            self._score = largest_score(variant, self.sample.q, self.sample.k, self.sample.v, **self.sample.inputs)

    def rows(self, op: Callable[..., Any]) -> list[Row]:
        """Call `op` twice: one row a result."""
        with matmuls_in(self.tf32):
            got, again = (results_of(op, self.sample, *self._asked) for _ in range(2))
        repeated = {name: torch.equal(value, again[name]) for name, value in got.items()}
        values, exact, plain = compared(self.graph, _reference_of(self.sample), got, self._exact, self._plain)
        free = op.free_sums() if isinstance(op, AttentionOp) else frozenset()
        rows = []
        for name, value in values.items():
            kind: Kind = "forward" if name in self.outputs else "gradient"
            limits: dict[str, Any] = {"dtype": self.dtype, "tf32": self.tf32, "score": self._score}
            found = check(name, value, exact[name], plain[name], kind, **limits)
            rows.append(Row(self.shape, found, repeated[name], name not in free))
        return rows


@contextlib.contextmanager
def matmuls_in(tf32: bool) -> Iterator[None]:
    """An op that was told nothing else multiplies float32 in tf32, or as IEEE says; so does plain PyTorch, in as far as
    cuBLAS does: not as the process happens to be set, for then one would be no measure of the other."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _derived(graph: VariantGraph) -> set[str]:
    """The auxiliary outputs that pass a gradient on."""
    return {name for name, refusal in differentiable_outputs(graph).items() if refusal is None}


def _reference_of(sample: Sample) -> Callable[[VariantGraph, str], Any]:
    """The reference's outputs for these tensors, of whatever graph they fit."""
    exact = as_double(sample)

    def run(graph: VariantGraph, name: str) -> Any:
        known = {d.name for d in graph.inputs} | {s.name for s in graph.scalars}
        inputs = {n: x for n, x in exact.inputs.items() if n in known}
        return reference(graph, exact.q, exact.k, exact.v, outputs=name, **inputs)

    return run


def _has_lse(graph: VariantGraph) -> bool:
    try:
        log_denominator(graph)
    except UnsupportedError:
        return False
    return True


def results_of(
    function: Callable[..., Any],
    sample: Sample,
    dtype: torch.dtype,
    outputs: tuple[str, ...],
    differentiable: tuple[str, ...],
    with_gradients: bool = True,
    constant: frozenset[str] = frozenset(),
) -> dict[str, Tensor]:
    """The outputs of a call by name, and if wanted the gradients dq, dk, dv, d<input> under random cotangents, which
    outputs in `constant` have not. Cotangents are values of `dtype`, in float64 as well: what a kernel is given."""
    leaves = {
        name: getattr(sample, name).detach().requires_grad_()
        for name in ("q", "k", "v")
        if getattr(sample, name) is not None
    }
    inputs = {
        name: value.detach().requires_grad_() if name in differentiable else value
        for name, value in sample.inputs.items()
    }
    results = function(*leaves.values(), outputs=outputs, **inputs)
    results = (results,) if isinstance(results, Tensor) else results
    named = dict(zip(outputs, (r.detach() for r in results), strict=True))
    if not with_gradients:
        return named
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(r.shape, generator=generator).to(dtype).to(r) for r in results]
    leaves |= {name: inputs[name] for name in differentiable}
    # an output may depend on no tensor that wants a gradient, such as the lse of uniform weights
    moving = [
        (r, c) for n, r, c in zip(outputs, results, cotangents, strict=True) if r.requires_grad and n not in constant
    ]
    gradients = torch.autograd.grad(
        [r for r, _ in moving], tuple(leaves.values()), [c for _, c in moving], materialize_grads=True
    )
    return named | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def as_double(sample: Sample) -> Sample:
    """The same values in float64."""
    inputs = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in sample.inputs.items()
    }
    v = None if sample.v is None else sample.v.double()
    return Sample(sample.q.double(), sample.k.double(), v, inputs)
