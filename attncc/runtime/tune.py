"""Tuning on a GPU: run the candidates of a race at the caller's own sizes.

A candidate is checked against the reference on a slice of the problem, with every output and gradient, and at full size
as far as memory allows (`fullsize`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attncc.errors import AttnccError, UnsupportedError
from attncc.ir.graph import VariantGraph
from attncc.language.variant import Variant
from attncc.runtime import yardstick
from attncc.runtime.binaries import settle
from attncc.runtime.compiler import current_target
from attncc.runtime.fullsize import FullSize
from attncc.runtime.gputime import median_us
from attncc.runtime.launch import launches
from attncc.runtime.op import AttentionOp
from attncc.runtime.operands import Operands
from attncc.runtime.prepared import Prepared
from attncc.runtime.race import BATCH, LostDeviceError, TrialError
from attncc.runtime.samples import Sample, Shape, sample_inputs
from attncc.runtime.shapes import bind, value_of
from attncc.runtime.verify import Exam
from attncc.schedule.cache import Cache
from attncc.schedule.problem import Dtype, Kernel, Schedule

#: the longest sequence of the slice
SLICE_LENGTH = 512
#: what the compiler looks at sizes for being multiples of: a slice keeps it, and needs few kernels of its own
ALIGNED = 16
TORCH_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: milliseconds of a first look, and of a measurement; a candidate that the first finds this much slower has no second
LOOK_MS, MEASURED_MS = 10, 60
HOPELESS = 1.3
#: candidates whose kernels stay loaded: those that compile ahead, and some that were timed
KEPT = 2 * BATCH


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
        self._whole = FullSize(graph, shape, dict(zip("qkv", self.qkv, strict=False)), self.inputs, self.dout)
        self._cache = Cache()

    @property
    def cramped(self) -> bool:
        """Whether the reference had no room at full size: there candidates were held against each other alone."""
        return self._whole.cramped

    def begin(self, trials: Sequence[tuple[Kernel, Schedule]]) -> None:
        """Start to compile what the candidates launch on the slice and at full size, side by side."""
        for of in (self._full, self._sliced):  # while the first compile, the reference works out what is right
            for kernel, schedule in trials:
                op = self._op(schedule)
                try:
                    op.engine.warm(*self._call_of(op, of(kernel)), kernel != "forward")
                except AttnccError:  # said again by the check, for that candidate alone
                    continue

    def check(self, kernel: Kernel, schedule: Schedule) -> None:
        """Hold a candidate against the reference on the slice, and at full size against others and a second run."""
        op = self._op(schedule)
        with refusals():
            self._compiled(op, kernel)
        with self._alone(), refusals():
            rows = self._exam(kernel).rows(op)
            wrong = [row.check.name for row in rows if not row.check.ok]
            if wrong:
                raise TrialError(f"wrong: {', '.join(wrong)}")
            first, second = (self._run(op, kernel) for _ in range(2))
            free = set() if kernel == "forward" else op.free_sums()
            drifts = [name for name, x in first.items() if name not in free and not torch.equal(x, second[name])]
            if drifts or not all(row.repeatable or not row.ordered for row in rows):
                raise TrialError("other bits each time")
            if wrong := self._whole.wrong(first, kernel != "forward"):
                raise TrialError(f"wrong at full size: {', '.join(wrong)}")

    def time(self, kernel: Kernel, schedule: Schedule, best_us: float) -> float:
        """The time of the forward, or of the whole backward for a kernel of it, in microseconds."""
        settle()
        with self._alone(), refusals():
            call = self._call(self._op(schedule), kernel)
            look = median_us(call, LOOK_MS)
            return look if look > HOPELESS * best_us else median_us(call, MEASURED_MS)

    def against(self, backward: bool) -> dict[str, tuple[float | None, float | None]]:
        """Times of PyTorch's own attention at these sizes: microseconds of forward and backward, by backend."""
        qkv = tuple(self.qkv)
        with self._alone():
            calls = yardstick.contestants(self.graph, self.shape, qkv)
            return yardstick.times(calls, qkv, lambda call: median_us(call, MEASURED_MS), backward)

    def _alone(self) -> AbstractContextManager[None]:
        """While no other tuner of this cache uses the GPU; compiling goes on beside."""
        if self.device.type != "cuda":
            return nullcontext()
        return self._cache.lock(f"gpu-{torch.cuda.get_device_properties(self.device).uuid}")

    def _op(self, schedule: Schedule) -> AttentionOp:
        if schedule not in self._ops:
            self._ops[schedule] = AttentionOp(self.graph, schedule)
            if len(self._ops) > KEPT:
                del self._ops[next(iter(self._ops))]
        return self._ops[schedule]

    def _exam(self, kernel: Kernel) -> Exam:
        """The reference for the kernel: gradients come from other kernels than the forward."""
        gradients = kernel != "forward"
        if gradients not in self._exams:
            variant = Variant.from_graph(self.graph)
            with self._alone():
                self._exams[gradients] = Exam(variant, sliced(self.shape), self.device, self.dtype, gradients=gradients)
        return self._exams[gradients]

    def _full(self, kernel: Kernel) -> Sample:
        """The tensors of a call at full size."""
        return self.sample

    def _sliced(self, kernel: Kernel) -> Sample:
        """And on the slice."""
        return self._exam(kernel).sample

    def _call_of(self, op: AttentionOp, sample: Sample) -> tuple[Prepared, Operands]:
        """A call as the engine has it."""
        v = value_of(self.graph, sample.k, sample.v)
        inputs = op.kernel_inputs(sample.q, sample.k, None, sample.inputs)
        call = Operands(bind(op.engine.graph, sample.q, sample.k, v, None, inputs), sample.q, sample.k, v)
        return op.engine.prepare(call), call

    def _compiled(self, op: AttentionOp, kernel: Kernel) -> None:
        """Wait for what `begin` compiles, before the GPU is taken."""
        if self.device.type == "cuda":
            target = current_target(self.device.index or 0)
            for of in (self._full, self._sliced):
                call = self._call_of(op, of(kernel))
                for job in launches(lambda: op.engine.host_code(*call, kernel != "forward")):  # noqa: B023
                    job.finish(target)

    def _call(self, op: AttentionOp, kernel: Kernel) -> Callable[[], Any]:
        if kernel == "forward":

            def forward() -> Any:
                with torch.no_grad():
                    return op(*self.qkv, **self.inputs)

            return forward
        out = op(*self.qkv, **self.inputs)
        return lambda: torch.autograd.grad(out, self.leaves, self.dout, retain_graph=True)

    def _run(self, op: AttentionOp, kernel: Kernel) -> dict[str, Tensor]:
        """The results of a call at full size by name, in memory that was NaN before."""
        poison = [torch.full_like(t, float("nan")) for t in (self.dout, *self.qkv)]
        del poison
        found = self._call(op, kernel)()
        inputs = [d.name for d in self.graph.inputs if d.grad]
        names = ["out"] if isinstance(found, Tensor) else [f"d{n}" for n in (*"qkv"[: len(self.qkv)], *inputs)]
        results = dict(zip(names, [found] if isinstance(found, Tensor) else found, strict=True))
        if any(bool(t.isnan().any()) for t in results.values()):
            raise TrialError("NaN at full size")
        return results


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
    """Whether the GPU still executes work of this process; after an illegal access it does not."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def sliced(shape: Shape) -> Shape:
    """A part of a shape that the reference is quick at: shortened with its ratio of queries to keys, with two sequences
    and few heads, though not with one where there were more, and with sizes that are multiples of 16 where those were:
    so it needs few kernels that the whole does not need anyway."""
    factor = max(-(-max(shape.q_len, shape.kv_len) // SLICE_LENGTH), 1)
    group = shape.heads // shape.kv_heads
    kv_heads = next(
        n
        for n in range(min(shape.kv_heads, 2), shape.kv_heads + 1)
        if n == shape.kv_heads or (_alike(n, shape.kv_heads) and _alike(n * group, shape.heads))
    )
    return replace(
        shape,
        batch=min(shape.batch, 2),
        heads=group * kv_heads,
        kv_heads=kv_heads,
        q_len=_shortened(shape.q_len, factor),
        kv_len=_shortened(shape.kv_len, factor),
    )


def _alike(size: int, whole: int) -> bool:
    return (size % ALIGNED == 0) == (whole % ALIGNED == 0)


def _shortened(length: int, factor: int) -> int:
    cut = max(length // factor, 1)
    return cut // ALIGNED * ALIGNED if length % ALIGNED == 0 and cut >= ALIGNED else cut
