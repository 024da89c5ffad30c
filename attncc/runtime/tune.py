"""Tuning on a GPU: what runs the candidates that race on the caller's own sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attncc.errors import AttnccError, UnsupportedError
from attncc.ir.graph import VariantGraph
from attncc.language.variant import Variant
from attncc.runtime import yardstick
from attncc.runtime.op import AttentionOp
from attncc.runtime.race import LostDeviceError, TrialError
from attncc.runtime.samples import Sample, Shape, sample_inputs
from attncc.runtime.shapes import bind, value_of
from attncc.runtime.verify import Exam
from attncc.schedule.problem import Dtype, Kernel, Schedule

#: the longest sequence at which a candidate is checked against the quadratic reference
CHECKED_LENGTH = 512
TORCH_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: milliseconds of a first look, and of a measurement; a candidate that the first finds this much slower has no second
LOOK_MS, MEASURED_MS = 10, 60
HOPELESS = 1.3


def gpu() -> torch.device:
    """The GPU to measure on; UnsupportedError if there is none."""
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "there is no GPU that torch can use, and times are measured on one",
            remedy="run it on the machine with the GPU; `attncc cache export` carries the result to others",
        )
    return torch.device("cuda", torch.cuda.current_device())


class Track:
    """Runs candidates of a variant at one size on a GPU: checked on a slice, run twice and timed at full size."""

    def __init__(
        self, graph: VariantGraph, shape: Shape, dtype: Dtype, device: torch.device, scalars: Mapping[str, Any]
    ):
        self.graph, self.shape, self.dtype, self.device = graph, shape, TORCH_DTYPES[dtype], device
        self.sample = sample_inputs(graph, shape, self.dtype, device)
        self.inputs = {**self.sample.inputs, **scalars}
        differentiable = [d.name for d in graph.inputs if d.grad]
        self.qkv = [t.requires_grad_() for t in (self.sample.q, self.sample.k, self.sample.v) if t is not None]
        self.leaves = [*self.qkv, *(self.inputs[name].requires_grad_() for name in differentiable)]
        heads = shape.heads * shape.values
        size = (shape.batch, heads, shape.q_len, graph.value or shape.d_v)
        self.dout = torch.randn(size, device=device, dtype=self.dtype)
        self._ops: dict[Schedule, AttentionOp] = {}
        self._exams: dict[bool, Exam] = {}

    def begin(self, trials: Sequence[tuple[Kernel, Schedule]]) -> None:
        """Start to compile what the candidates launch on the slice and at full size, side by side."""
        self._ops.clear()
        for kernel, schedule in trials:
            op = self._op(schedule)
            for sample in (self.sample, self._exam(kernel).sample):
                try:
                    self._warm(op, sample, kernel != "forward")
                except AttnccError:  # said again by the check, for that candidate alone
                    continue

    def check(self, kernel: Kernel, schedule: Schedule) -> None:
        """Hold a candidate against the reference on the slice, and two runs at full size against each other."""
        with refusals():
            op = self._op(schedule)
            rows = self._exam(kernel).rows(op)
            wrong = [row.check.name for row in rows if not row.check.ok]
            if wrong:
                raise TrialError(f"wrong: {', '.join(wrong)}")
            first, second = (self._run(op, kernel) for _ in range(2))
            free = set() if kernel == "forward" else op.free_sums()
            names = ("dq", "dk", "dv", *("",) * len(first))  # of a forward: out alone
            pairs = [pair for name, *pair in zip(names, first, second, strict=False) if name not in free]
            if not all(row.repeatable or not row.ordered for row in rows) or not all(torch.equal(*x) for x in pairs):
                raise TrialError("other bits each time")

    def time(self, kernel: Kernel, schedule: Schedule, best_us: float) -> float:
        """The time of the forward, or of the whole backward for a kernel of it, in microseconds."""
        with refusals():
            call = self._call(self._op(schedule), kernel)
            look = median_us(call, LOOK_MS)
            return look if look > HOPELESS * best_us else median_us(call, MEASURED_MS)

    def against(self, backward: bool) -> dict[str, tuple[float | None, float | None]]:
        """What PyTorch's own attention takes at these sizes: microseconds of forward and backward by name."""
        qkv = tuple(self.qkv)
        return yardstick.times(yardstick.contestants(self.graph, self.shape, qkv), qkv, median_us, backward)

    def _op(self, schedule: Schedule) -> AttentionOp:
        if schedule not in self._ops:
            self._ops[schedule] = AttentionOp(self.graph, schedule)
        return self._ops[schedule]

    def _exam(self, kernel: Kernel) -> Exam:
        """What the kernel is held against: gradients come from other kernels than the forward."""
        gradients = kernel != "forward"
        if gradients not in self._exams:
            variant = Variant.from_graph(self.graph)
            self._exams[gradients] = Exam(variant, sliced(self.shape), self.device, self.dtype, gradients=gradients)
        return self._exams[gradients]

    def _warm(self, op: AttentionOp, sample: Sample, backward: bool) -> None:
        v = value_of(self.graph, sample.k, sample.v)
        inputs = op.kernel_inputs(sample.q, sample.k, None, sample.inputs)
        bound = bind(op.engine.graph, sample.q, sample.k, v, None, inputs)
        op.engine.warm(op.engine.prepare(bound, sample.q, sample.k, v), bound, sample.q, sample.k, v, backward)

    def _call(self, op: AttentionOp, kernel: Kernel) -> Callable[[], Any]:
        if kernel == "forward":

            def forward() -> Any:
                with torch.no_grad():
                    return op(*self.qkv, **self.inputs)

            return forward
        out = op(*self.qkv, **self.inputs)
        return lambda: torch.autograd.grad(out, self.leaves, self.dout, retain_graph=True)

    def _run(self, op: AttentionOp, kernel: Kernel) -> list[Tensor]:
        """The results of a call at full size, in memory that was NaN before."""
        poison = [torch.full_like(t, float("nan")) for t in (self.dout, *self.qkv)]
        del poison
        found = self._call(op, kernel)()
        results = [found] if isinstance(found, Tensor) else list(found)
        if any(bool(t.isnan().any()) for t in results):
            raise TrialError("NaN at full size")
        return results


def median_us(call: Callable[[], Any], rep_ms: int = MEASURED_MS) -> float:
    """The median time of a call on the GPU, in microseconds, with a cold cache each time."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=LOOK_MS, rep=rep_ms, return_mode="median")) * 1e3


@contextmanager
def refusals() -> Iterator[None]:
    """Out of registers, out of shared memory, a compiler's refusal: the candidate does not win. What leaves the GPU
    unusable is a LostDeviceError."""
    try:
        yield
    except TrialError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise (TrialError(what) if _answers() else LostDeviceError(what)) from error


def _answers() -> bool:
    """Does the GPU still do what this process asks? After an illegal access it does not."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def sliced(shape: Shape) -> Shape:
    """One sequence and one key/value head of a shape, shortened with its ratio of queries to keys."""
    factor = max(-(-max(shape.q_len, shape.kv_len) // CHECKED_LENGTH), 1)
    return replace(
        shape,
        batch=1,
        heads=shape.heads // shape.kv_heads,
        kv_heads=1,
        q_len=max(shape.q_len // factor, 1),
        kv_len=max(shape.kv_len // factor, 1),
    )
