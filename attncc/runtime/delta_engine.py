"""Run the chunk plan of a delta rule: create and load its module for a call's head dimensions, cut, launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attncc.codegen.delta import render_delta
from attncc.ir.graph import VariantGraph
from attncc.passes.recur import Delta
from attncc.runtime.engine import dot_options, on_device
from attncc.runtime.linear_cut import cut, sequence_lengths
from attncc.runtime.linear_engine import LinearEngine
from attncc.runtime.linear_rows import TokenRows
from attncc.schedule.delta import delta_schedule, solve_precision
from attncc.schedule.device import device_of
from attncc.schedule.linear import LinearSchedule
from attncc.schedule.problem import Precision

#: tokens of a sequence that is not short
_LONG = 1 << 20


class DeltaEngine(LinearEngine):
    """The generated kernels of one delta rule, for every device, dtype and size that calls bring."""

    def __init__(self, graph: VariantGraph, plan: Delta, precision: Precision | None = None):
        super().__init__(graph, plan.linear, precision)
        self.delta = plan
        self.rows = TokenRows(graph, plan.linear, plan.rows)
        self.names = self.rows.names

    def render(self, d_qk: int, d_v: int) -> str:
        return render_delta(self.graph, self.delta, d_qk, d_v)

    def state_shape(self, d_qk: int, d_v: int) -> tuple[int, int]:
        return d_qk, d_v

    def _prepare(
        self, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk: int | None
    ) -> tuple[Any, LinearSchedule, dict[str, Any], dict[str, Any]]:
        """The module, the schedule, the cut into chunks, and the constants of all kernels."""
        device = device_of(q.device)
        ends = None if cu_seqlens is None else sequence_lengths(cu_seqlens, q.shape[0], q.shape[2])
        schedule = delta_schedule(self.sizes(q, v, ends), device, chunk)
        options = dot_options(q.dtype, self.precision(), device)
        options["SOLVE"] = solve_precision(options["PRECISION"], q.dtype == torch.float32, device)
        module = self.module(q.shape[3], v.shape[3], device.is_interpreter)
        return module, schedule, cut(q, ends, schedule.span), options

    def widths(self, q: Tensor, v: Tensor, chunk: int | None) -> tuple[int, ...]:
        """Of what tokens add, and of the inverse of their chunk's equations: as many columns as a chunk of a long
        sequence has tokens, for how long packed ones are is not known where calls are traced."""
        # batch and heads, which may be symbols there, have no part in it
        sizes = replace(
            self.sizes(q, v, None), sequences=1, heads=1, length=_LONG, d_qk=int(q.shape[3]), d_v=int(v.shape[3])
        )
        return self._kept(q, v, delta_schedule(sizes, device_of(q.device), chunk).chunk)

    def _kept(self, q: Tensor, v: Tensor, chunk: int) -> tuple[int, ...]:
        """Those sizes, and with a decay and operands of 16 bits that of what their rounding takes from the state."""
        rest = q.dtype != torch.float32 and self.delta.linear.decay != "none"
        return (v.shape[3], chunk, v.shape[3]) if rest else (v.shape[3], chunk)

    def _forward(
        self, module: Any, stepwise: bool, keep: tuple[int, ...], *call: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor]]:
        """Token after token nothing is kept."""
        if stepwise:
            return (*module.step(*call), [])
        return module.forward(*call, keep)

    def _derive(self, module: Any, kept: list[Tensor], of_forward: Sequence[Any], *call: Any) -> Any:
        """The module's backward, which needs what the forward by chunks keeps: made here if it was another."""
        *_, cut, schedule, options = call
        if not kept:
            keep = self._kept(of_forward[0], of_forward[2], schedule["prepare"]["CHUNK"])
            *_, kept = module.forward(*of_forward, False, cut, schedule, options, keep)
        return module.backward(*of_forward, kept, *call)

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
        """dq, dk, dv, that of the initial state, and those of the factors of tokens that are wanted."""
        module, schedule, cut, options = self._prepare(q, v, cu_seqlens, chunk)
        named = dict(zip(self.names, rows, strict=True))
        wants = dict(zip(self.names, wanted, strict=True))
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        dlast = None if dlast is None else dlast.contiguous()
        with on_device(q.device):
            dq, dk, dv, dinitial, found = self._derive(
                *(module, kept, (q, k, v, named, constant, initial), dout, dlast, want_initial),
                *(self._asked(wants), cut, schedule.kernels, options),
            )
        return dq, dk, dv, dinitial, [found.get(n) if wants[n] else None for n in self.names]

    def _asked(self, wants: dict[str, bool]) -> tuple[bool, ...]:
        """Whether the kernels are to find the gradients of the query's factor and of the decay."""
        return wants.get("row", False), wants.get("step", False)
