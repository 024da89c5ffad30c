"""Run the chunk plan of a weight of degree 2: create and load its module for a call's head dimensions, cut, launch.

Tensors of the size of q, k and v are computed in PyTorch: the features of degree 1 with the factors of tokens before
the kernels, and the output from the two sums after them. This is cheap compared with Dqk^2 features per token.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attncc.codegen.square import render_square, state_shape
from attncc.ir.graph import VariantGraph
from attncc.passes.linearize import Linear
from attncc.resources import fingerprint
from attncc.runtime.engine import dot_options, on_device
from attncc.runtime.linear_cut import cut, cut_evenly, cut_sides, sequence_lengths
from attncc.runtime.linear_engine import DTYPES
from attncc.runtime.modules import load_module
from attncc.schedule.cache import Cache, cache_key
from attncc.schedule.device import device_of
from attncc.schedule.linear import STEPS, LinearSchedule, LinearSizes
from attncc.schedule.problem import Precision
from attncc.schedule.square import square_schedule


class SquareEngine:
    """The generated kernels of one plan of degree 2, for every device, dtype and size that calls bring."""

    def __init__(self, graph: VariantGraph, plan: Linear, precision: Precision | None = None):
        self.graph, self.plan = graph, plan
        self._precision = precision
        self._cache = Cache()
        self._modules: dict[tuple[int, int, bool], ModuleType] = {}
        self._lock = threading.RLock()

    def source(self, d_qk: int, d_v: int) -> str:
        """The generated module's text for these head dimensions, from the disk cache where it lies there."""
        facts = {"digest": self.graph.digest, "name": self.graph.name}
        name = cache_key(kind="square", d_qk=d_qk, d_v=d_v, code=fingerprint(), **facts)
        found = self._cache.get(name)
        if found is not None and isinstance(found.get("text"), str):
            return str(found["text"])
        text = render_square(self.graph, self.plan, d_qk, d_v)
        self._cache.put(name, {"kind": "source", "what": self.graph.name, "text": text})
        return text

    def module(self, d_qk: int, d_v: int, interpreted: bool) -> ModuleType:
        """The generated module, loaded for the compiler or for the interpreter."""
        with self._lock:
            key = (d_qk, d_v, interpreted)
            if key not in self._modules:
                self._modules[key] = load_module(self.source(d_qk, d_v), self.graph.name, interpreted, self._cache)
            return self._modules[key]

    def state_shape(self, d_qk: int, d_v: int) -> tuple[int, int]:
        """The state's features and values."""
        return state_shape(d_qk, d_v)

    def precision(self) -> Precision:
        """How float32 operands meet in a matmul: as asked for, else as PyTorch's own matmuls do."""
        if self._precision is not None:
            return self._precision
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"

    def _prepare(
        self, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk: int | None
    ) -> tuple[ModuleType, LinearSchedule, Any, dict[str, Any], list[int]]:
        """The module, the schedule, the cut, the constants of all kernels, and where sequences end."""
        device = device_of(q.device)
        batch, heads, length, d_qk = q.shape
        ends = [0, length] if cu_seqlens is None else sequence_lengths(cu_seqlens, batch, length)
        longest = max((b - a for a, b in pairwise(ends)), default=0)
        sequences = batch if cu_seqlens is None else len(ends) - 1
        longest = longest if self.plan.causal else max(length, v.shape[2])
        sizes = LinearSizes(DTYPES[q.dtype], sequences, heads, longest, d_qk, v.shape[3])
        schedule = square_schedule(sizes, device, self.plan.causal, chunk)
        packed = None if cu_seqlens is None else ends
        segments = cut(q, packed, schedule.span) if self.plan.causal else cut_sides(q, v, schedule.span)
        module = self.module(d_qk, v.shape[3], device.is_interpreter)
        return module, schedule, segments, dot_options(q.dtype, self.precision(), device), ends

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        powers: Sequence[float],
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        stepwise: bool,
        chunk: int | None,
        want_last: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The sums of weighted values, float32, and of weights, and the last state or None."""
        module, schedule, cut, options, ends = self._prepare(q, v, cu_seqlens, chunk)
        with on_device(q.device):
            if stepwise:
                return self._steps(module, schedule, cut, ends, q, k, v, powers, initial, want_last)
            found: tuple[Tensor, Tensor, Tensor | None] = module.forward(
                q, k, v, powers, initial, want_last, cut, schedule.kernels, options
            )
        return found

    def _steps(
        self,
        module: ModuleType,
        schedule: LinearSchedule,
        cut: Any,
        ends: list[int],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        powers: Sequence[float],
        initial: Tensor | None,
        want_last: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Token after token, as many at a time as a kernel takes."""
        if max(b - a for a, b in pairwise(ends)) <= STEPS:
            found: tuple[Tensor, Tensor, Tensor | None] = module.step(
                q, k, v, powers, initial, want_last, STEPS, cut, schedule.kernels
            )
            return found
        outs: list[Tensor] = []
        totals: list[Tensor] = []
        lasts: list[Tensor] = []
        for number, (lo, hi) in enumerate(pairwise(ends)):
            packed = len(ends) > 2
            state = initial[number : number + 1] if initial is not None and packed else initial
            for at in range(lo, max(hi, lo + 1), STEPS):
                part = [x[:, :, at : min(at + STEPS, hi)] for x in (q, k, v)]
                own = cut_evenly(q.shape[0], part[0].shape[2], STEPS)
                out, total, state = module.step(*part, powers, state, True, STEPS, own, schedule.kernels)
                outs.append(out)
                totals.append(total)
            assert state is not None
            lasts.append(state)
        return torch.cat(outs, 2), torch.cat(totals, 2), torch.cat(lasts) if want_last else None

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        powers: list[float],
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        chunk: int | None,
        dsums: Tensor,
        dtotal: Tensor,
        dlast: Tensor | None,
        want_initial: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk, dv and that of the initial state."""
        # a token's own factor is kept apart, so that the rest fits 16 bits
        weight = torch.maximum(dsums.abs().amax(-1), dtotal.abs()).clamp_min(1e-30)
        dout, share = (dsums / weight.unsqueeze(-1)).to(q.dtype), dtotal / weight
        return self.gradients(
            *(q, k, v, powers, initial, cu_seqlens, chunk),
            *(dout, weight.contiguous(), share.contiguous(), dlast, want_initial),
        )

    def gradients(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        powers: Sequence[float],
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        chunk: int | None,
        dout: Tensor,
        weight: Tensor,
        share: Tensor,
        dlast: Tensor | None,
        want_initial: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The same where the gradients of both sums are weight * dout, in q's dtype, and weight * share, (B, H, L)."""
        module, schedule, cut, options, _ = self._prepare(q, v, cu_seqlens, chunk)
        last = None if dlast is None else dlast.contiguous()
        with on_device(q.device):
            found: tuple[Tensor, Tensor, Tensor, Tensor | None] = module.backward(
                *(q, k, v, powers, initial, dout, weight, share, last, want_initial, cut, schedule.kernels, options)
            )
        return found

    def delta(self, q: Tensor, sums: Tensor, dout: Tensor) -> Tensor:
        """sum_d dout * sums, float32 (B, H, L), for a plan with row totals or gains."""
        module = self.module(q.shape[3], sums.shape[3], device_of(q.device).is_interpreter)
        with on_device(q.device):
            found: Tensor = module.delta(sums, dout)
        return found
