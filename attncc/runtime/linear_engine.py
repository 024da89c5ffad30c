"""Run the chunk plan of a variant: create and load its module for a call's head dimensions, cut, launch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attncc.codegen.linear import LinearSlots, render_linear
from attncc.collector import held
from attncc.ir.graph import VariantGraph
from attncc.passes.linearize import Linear
from attncc.passes.similarity import similarity
from attncc.resources import fingerprint
from attncc.runtime.engine import dot_options, on_device
from attncc.runtime.launch import collect, ghost
from attncc.runtime.linear_cut import cut, cut_sides, sequence_lengths
from attncc.runtime.linear_rows import TokenRows
from attncc.runtime.modules import load_module
from attncc.schedule.cache import Cache, cache_key
from attncc.schedule.device import device_of
from attncc.schedule.linear import LinearSchedule, LinearSizes, linear_schedule
from attncc.schedule.problem import Dtype, Precision

#: factors that are none of the pairs, which kernels that go over them do not load
_OF_ITSELF = {"diagonal", "own_factor", "own_weight"}
DTYPES: dict[torch.dtype, Dtype] = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class LinearEngine:
    """The generated kernels of one chunk plan, for every device, dtype and size that calls bring."""

    def __init__(self, graph: VariantGraph, plan: Linear, precision: Precision | None = None):
        self.graph, self.plan = graph, plan
        self.rows = TokenRows(similarity(graph).core, plan, short=True)
        self.names = self.rows.names
        self._precision = precision
        self._cache = Cache()
        self._sources: dict[tuple[int, int], str] = {}
        self._modules: dict[tuple[int, int, bool], ModuleType] = {}
        self._warmed: set[Any] = set()
        self._lock = threading.RLock()

    def source(self, d_qk: int, d_v: int) -> str:
        """The generated module's text for these head dimensions, from the disk cache where it lies there."""
        with self._lock:
            if (d_qk, d_v) not in self._sources:
                self._sources[d_qk, d_v] = self._cached_source(d_qk, d_v)
            return self._sources[d_qk, d_v]

    def _cached_source(self, d_qk: int, d_v: int) -> str:
        facts = {"digest": self.graph.digest, "name": self.graph.name}
        name = cache_key(kind="linear", d_qk=d_qk, d_v=d_v, code=fingerprint(), **facts)
        found = self._cache.get(name)
        if found is not None and isinstance(found.get("text"), str):
            return str(found["text"])
        text = self.render(d_qk, d_v)
        self._cache.put(name, {"kind": "source", "what": self.graph.name, "text": text})
        return text

    def render(self, d_qk: int, d_v: int) -> str:
        """The generated module's text, made anew."""
        return render_linear(self.graph, self.plan, d_qk, d_v)

    def module(self, d_qk: int, d_v: int, interpreted: bool) -> ModuleType:
        """The generated module, loaded for the compiler or for the interpreter."""
        with self._lock:
            key = (d_qk, d_v, interpreted)
            if key not in self._modules:
                with held():
                    text = self.source(d_qk, d_v)
                    self._modules[key] = load_module(text, self.graph.name, interpreted, self._cache)
            return self._modules[key]

    def state_shape(self, d_qk: int, d_v: int) -> tuple[int, int]:
        """The state's features and values: those of q and v, and one more each where the plan has them."""
        return LinearSlots(self.graph, self.plan, d_qk, d_v).state_shape

    def precision(self) -> Precision:
        """How float32 operands meet in a matmul: as asked for, else as PyTorch's own matmuls do."""
        if self._precision is not None:
            return self._precision
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"

    def sizes(self, q: Tensor, v: Tensor, ends: list[int] | None) -> LinearSizes:
        """A call as the scheduler sees it."""
        batch, heads, length, d_qk = q.shape
        if ends is not None:
            batch, length = len(ends) - 1, max((b - a for a, b in pairwise(ends)), default=0)
        by_channel, normalized = self.plan.decay == "channel", self.plan.total and self.plan.bias is None
        call = LinearSizes(DTYPES[q.dtype], batch, heads, length, d_qk, v.shape[3], by_channel, normalized)
        return replace(call, divided=self.plan.total, rows=len(set(self.names) - _OF_ITSELF) - self.plan.alike)

    def _prepare(
        self, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk: int | None
    ) -> tuple[Any, LinearSchedule, dict[str, Any], dict[str, Any]]:
        """The module, the schedule, the cut, and the constants of all kernels."""
        device = device_of(q.device)
        ends = None if cu_seqlens is None else sequence_lengths(cu_seqlens, q.shape[0], q.shape[2])
        schedule = linear_schedule(self.sizes(q, v, ends), device, chunk)
        segments = cut(q, ends, schedule.span) if self.plan.causal else cut_sides(q, v, schedule.span)
        module = self.module(q.shape[3], v.shape[3], device.is_interpreter)
        return module, schedule, segments, dot_options(q.dtype, self.precision(), device)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rows: list[Tensor],
        constant: float,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        stepwise: bool,
        chunk: int | None,
        want_last: bool,
        then_backward: bool = False,
        wanted: Sequence[bool] = (),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor]]:
        """out, the row totals or None, the last state or None, and what the backward is to be given of it (`kept`).

        then_backward: keep that, and compile the backward meanwhile, with the gradients of the factors of tokens that
        are `wanted`.
        """
        module, schedule, cut, options = self._prepare(q, v, cu_seqlens, chunk)
        named = dict(zip(self.names, rows, strict=True))
        if q.is_cuda:
            of_kind = (options, (q, k, v), named, initial, stepwise, want_last, chunk)
            self._warm(module, schedule, cut, *of_kind, wanted if then_backward else None)
        with on_device(q.device):
            keep = self.widths(q, v, chunk) if then_backward else ()
            call = (q, k, v, named, constant, initial, want_last, cut, schedule.kernels, options)
            return self._forward(module, stepwise, keep, *call)

    def widths(self, q: Tensor, v: Tensor, chunk: int | None) -> tuple[int, ...]:
        """What forward keeps for a backward: the last sizes of tensors (B, H, L, size) in q's dtype."""
        return ()

    def _forward(
        self, module: Any, stepwise: bool, keep: tuple[int, ...], *call: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor]]:
        """What the module finds, and with it what it keeps."""
        return (*(module.step if stepwise else module.forward)(*call), [])

    def _derive(self, module: Any, kept: list[Tensor], of_forward: Sequence[Any], *call: Any) -> Any:
        """The module's backward. `of_forward`: q, k, v, rows, constant and initial state."""
        return module.backward(*of_forward, *call)

    def _warm(
        self,
        module: ModuleType,
        schedule: LinearSchedule,
        cut: dict[str, Any],
        options: dict[str, Any],
        tensors: tuple[Tensor, Tensor, Tensor],
        rows: dict[str, Tensor],
        initial: Tensor | None,
        stepwise: bool,
        want_last: bool,
        chunk: int | None,
        wanted: Sequence[bool] | None,
    ) -> None:
        """Start to compile what this call launches, all kernels side by side; once for each kind."""
        q = tensors[0]
        states = (initial is not None, want_last, cut.get("per_sequence") == 1)
        kind = (id(module), q.dtype, q.device, str(schedule.kernels), stepwise, str(wanted), *states)
        with self._lock:
            if kind in self._warmed:
                return
            self._warmed.add(kind)
        qkv = tuple(map(ghost, tensors))
        named: dict[str, Any] = {name: ghost(row) for name, row in rows.items()}
        first = None if initial is None else ghost(initial)

        def run() -> None:
            keep = () if wanted is None else self.widths(q, tensors[2], chunk)
            call = (*qkv, named, 1.5, first, want_last, cut, schedule.kernels, options)
            out, total, last, kept = self._forward(module, stepwise, keep, *call)
            if wanted is not None:
                given = dict(named)
                if total is not None:
                    given["weight"], given["dtotal"], given["slope"] = module.delta(out, out), total, total
                wants = self._asked(dict(zip(self.names, wanted, strict=True)))
                of_backward = (out, last, first is not None, wants, cut, schedule.kernels, options)
                self._derive(module, kept, (*qkv, given, 1.5, first), *of_backward)

        with held():
            collect(run, q.get_device())

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rows: list[Tensor],
        constant: float,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        chunk: int | None,
        out: Tensor | None,
        total: Tensor | None,
        kept: list[Tensor],
        dout: Tensor,
        dlast: Tensor | None,
        wanted: list[bool],
        want_initial: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, list[Tensor | None]]:
        """dq, dk, dv, that of the initial state, and those of the factors of tokens that are wanted. out: where there
        are row totals."""
        module, schedule, cut, options = self._prepare(q, v, cu_seqlens, chunk)
        named = dict(zip(self.names, rows, strict=True))
        wants = dict(zip(self.names, wanted, strict=True))
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        given = dict(named)
        delta = None
        with on_device(q.device):
            if total is not None:
                delta = module.delta(out, dout)
                given["weight"], slope = self.rows.weight_and_slope(total, named.get("gain"))
                given["dtotal"], given["slope"] = delta * slope, slope
            dq, dk, dv, dinitial, found = self._derive(
                *(module, kept, (q, k, v, given, constant, initial)),
                *(dout, None if dlast is None else dlast.contiguous(), want_initial, self._asked(wants)),
                *(cut, schedule.kernels, options),
            )
        for name in ("row", "col", *(("step",) if self.plan.decay != "channel" else ())):
            if found.get(name) is not None:  # a share of each block of features
                found[name] = found[name].sum(0)
        if found.get("diagonal") is not None:
            found["diagonal"] = _of_tokens(found["diagonal"], named["diagonal"], cut["count"])
        drows = {name: _summed(x, named[name]) for name, x in found.items() if x is not None and wants[name]}
        if wants.get("gain") and delta is not None:
            drows["gain"] = delta / named["gain"]
        return dq, dk, dv, dinitial if want_initial else None, [drows.get(n) for n in self.names]

    def _asked(self, wants: dict[str, bool]) -> tuple[bool, ...]:
        """Which gradients of factors the kernels are to note: the query's, the key's, the decay's, the diagonal's."""
        return tuple(wants.get(name, False) for name in ("row", "col", "step", "diagonal"))


def _of_tokens(found: Tensor, factor: Tensor, segments: int) -> Tensor:
    """The gradient of a diagonal (B | 1, H, L | 1, D) from that of tokens or of segments, (segments, H, D)."""
    if found.dim() == 4:
        return found
    batch = factor.shape[0]
    return found.reshape(batch, segments // batch, *found.shape[1:]).sum(1).unsqueeze(2)


def _summed(found: Tensor, factor: Tensor) -> Tensor:
    """The gradient of a factor from that of each place that it is used at."""
    same = [i for i, size in enumerate(factor.shape) if size == 1 and found.shape[i] > 1]
    return (found.sum(same, keepdim=True) if same else found).to(factor.dtype)


__all__ = ["DTYPES", "LinearEngine"]
