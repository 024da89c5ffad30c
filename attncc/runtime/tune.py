"""Tuning on a GPU: what runs the candidates that race on the caller's own sizes.

A candidate is held against the reference twice. On a slice of the problem, where every output and gradient can be: one
that is as long as the reference can be quick. And at full size, where the launch is the one that calls make (a grid
that has more tiles than the GPU has processors is dealt differently, by another binary): there its results have to be
those of the first right candidate, everywhere, and that one's those of the reference, for one head of keys.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attncc.errors import AttnccError, UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir.graph import VariantGraph
from attncc.language.variant import Variant
from attncc.runtime import yardstick
from attncc.runtime.op import AttentionOp
from attncc.runtime.race import LostDeviceError, TrialError
from attncc.runtime.reference import largest_score, reference
from attncc.runtime.samples import Sample, Shape, sample_inputs
from attncc.runtime.shapes import bind, value_of
from attncc.runtime.verify import Exam, Kind, check, eager
from attncc.schedule.cache import Cache
from attncc.schedule.problem import Dtype, Kernel, Schedule

#: the longest sequence of the slice
SLICE_LENGTH = 512
#: what the compiler looks at sizes for being multiples of: a slice keeps it, and needs few kernels of its own
ALIGNED = 16
#: bytes that the reference takes for a pair of a query and a key, with its gradients (softmax: 200; other formulas keep
#: more), and how many there are without a GPU
PAIR_BYTES, ROOM = 400, 2**30
#: how far two results may be apart, RMS over RMS, each of which may be half of it off the reference
APART = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 2e-5}
TORCH_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: milliseconds of a first look, and of a measurement; a candidate that the first finds this much slower has no second
LOOK_MS, MEASURED_MS = 10, 60
HOPELESS = 1.3
#: calls of a measurement, at least and at most
FEWEST, MOST = 5, 100
#: cycles that the GPU idles before a call that is timed, so that the host, which takes up to 0.2 ms for a backward, has
#: asked for all of it when it begins
HEAD_START = 600_000


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
        self._right: dict[bool, dict[str, Tensor]] = {}
        #: whether the reference had no room at full size, so that candidates were held against each other alone there
        self.cramped = False
        self._cache = Cache()

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
        """Hold a candidate against the reference on the slice, and at full size against others and a second run."""
        with self._alone(), refusals():
            op = self._op(schedule)
            rows = self._exam(kernel).rows(op)
            wrong = [row.check.name for row in rows if not row.check.ok]
            if wrong:
                raise TrialError(f"wrong: {', '.join(wrong)}")
            first, second = (self._run(op, kernel) for _ in range(2))
            free = set() if kernel == "forward" else op.free_sums()
            drifts = [name for name, x in first.items() if name not in free and not torch.equal(x, second[name])]
            if drifts or not all(row.repeatable or not row.ordered for row in rows):
                raise TrialError("other bits each time")
            self._hold(kernel, first)

    def time(self, kernel: Kernel, schedule: Schedule, best_us: float) -> float:
        """The time of the forward, or of the whole backward for a kernel of it, in microseconds."""
        with self._alone(), refusals():
            call = self._call(self._op(schedule), kernel)
            look = median_us(call, LOOK_MS)
            return look if look > HOPELESS * best_us else median_us(call, MEASURED_MS)

    def against(self, backward: bool) -> dict[str, tuple[float | None, float | None]]:
        """What PyTorch's own attention takes at these sizes: microseconds of forward and backward by name."""
        qkv = tuple(self.qkv)
        with self._alone():
            return yardstick.times(yardstick.contestants(self.graph, self.shape, qkv), qkv, median_us, backward)

    def _alone(self) -> AbstractContextManager[None]:
        """While no other tuner of this cache uses the GPU; compiling goes on beside."""
        if self.device.type != "cuda":
            return nullcontext()
        return self._cache.lock(f"gpu-{torch.cuda.get_device_properties(self.device).uuid}")

    def _op(self, schedule: Schedule) -> AttentionOp:
        if schedule not in self._ops:
            self._ops[schedule] = AttentionOp(self.graph, schedule)
        return self._ops[schedule]

    def _exam(self, kernel: Kernel) -> Exam:
        """What the kernel is held against: gradients come from other kernels than the forward."""
        gradients = kernel != "forward"
        if gradients not in self._exams:
            variant = Variant.from_graph(self.graph)
            with self._alone():
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

    def _hold(self, kernel: Kernel, results: Mapping[str, Tensor]) -> None:
        """TrialError where results at full size are not those of the first that were right, or, of the first, not the
        reference's. Gradients of the inputs beside q, k and v are sums that may cancel: the slice says if they are
        right."""
        gradients = kernel != "forward"
        held = {name: x for name, x in results.items() if name in ("out", "dq", "dk", "dv")}
        known = self._right.get(gradients)
        if known is None:
            wrong = self._wrong(held, gradients)
        else:
            wrong = [name for name, x in held.items() if _distance(x, known[name]) > APART[self.dtype]]
        if wrong:
            raise TrialError(f"wrong at full size: {', '.join(wrong)}")
        self._right.setdefault(gradients, held)

    def _wrong(self, results: Mapping[str, Tensor], gradients: bool) -> list[str]:
        """What of the results is not the reference's, for the first sequence and its first head of keys; nothing where
        the reference has no room for that."""
        shape = self.shape
        group, key_heads = shape.heads // shape.kv_heads, 1
        if any(sym.NUM_HEADS in stage.expr.free_symbols for stage in self.graph.stages):
            group, key_heads = shape.heads, shape.kv_heads  # to whom the number of heads is something
        if group * shape.q_len * shape.kv_len * PAIR_BYTES > _room(self.device):
            self.cramped = True
            return []
        places = {"b": 1, "h": group, "h_kv": key_heads}
        heads = (group, key_heads, key_heads * shape.values)
        part = {n: t.detach()[:1, :count] for n, t, count in zip("qkv", self.qkv, heads, strict=False)}
        inputs = dict(self.inputs)
        for decl in self.graph.inputs:
            cut = tuple(slice(places.get(d)) for d in decl.pattern)
            inputs[decl.name] = self.inputs[decl.name].detach()[cut]
        dout = self.dout[:1, : group * shape.values]
        exact = _results(reference, self.graph, {n: t.double() for n, t in part.items()}, inputs, dout, gradients)
        plain = _results(eager, self.graph, part, inputs, dout, gradients)
        score = largest_score(self.graph, *part.values(), **inputs) if gradients else 0.0
        kind: Kind = "gradient" if gradients else "forward"
        rows = [
            check(name, x[: len(exact[name]), : exact[name].shape[1]], exact[name], plain[name], kind, score=score)
            for name, x in results.items()
        ]
        return [row.name for row in rows if not row.ok]


def _results(
    function: Callable[..., Tensor],
    graph: VariantGraph,
    qkv: Mapping[str, Tensor],
    inputs: Mapping[str, Any],
    dout: Tensor,
    gradients: bool,
) -> dict[str, Tensor]:
    """out, or dq, dk and dv, as the reference or plain PyTorch has them."""
    leaves = {name: t.requires_grad_(gradients) for name, t in qkv.items()}
    out = function(graph, *leaves.values(), **inputs)
    if not gradients:
        return {"out": out}
    found = torch.autograd.grad(out, tuple(leaves.values()), dout.to(out.dtype), materialize_grads=True)
    return {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}


def _distance(x: Tensor, other: Tensor) -> float:
    """RMS of the difference over that of `other`; 0 where both are 0. In float32, for the tensors are large."""
    size = other.float().square().mean().sqrt()
    apart = (x.float() - other.float()).square().mean().sqrt()
    return float(torch.where(apart == 0, apart, apart / size))


def _room(device: torch.device) -> int:
    """Bytes that the reference may take."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else ROOM


def median_us(call: Callable[[], Any], rep_ms: int = MEASURED_MS) -> float:
    """The median time of a call on the GPU, in microseconds, with a cold cache each time and no wait for the host."""
    import triton

    driver = triton.runtime.driver.active
    cache = driver.get_empty_cache_for_benchmark()
    call()
    pairs = _timed(call, FEWEST, lambda: driver.clear_cache(cache))
    us = statistics.median(pairs)
    count = min(max(int(rep_ms * 1e3 / us), FEWEST), MOST)
    return statistics.median(_timed(call, count, lambda: driver.clear_cache(cache)))


def _timed(call: Callable[[], Any], count: int, forget: Callable[[], None]) -> list[float]:
    """Microseconds of each of `count` calls."""
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
    for start, end in events:
        forget()
        torch.cuda._sleep(HEAD_START)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in events]


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
