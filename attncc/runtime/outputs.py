"""Run the light passes for auxiliary outputs, and the backward with their cotangents, around a variant's engine."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from attncc.codegen.launch import launch_meta
from attncc.codegen.plan import Plan
from attncc.codegen.render_outputs import render_outputs, saved_rows
from attncc.errors import InputError
from attncc.ir.graph import VariantGraph
from attncc.ir.outputs import Output
from attncc.passes.cotangents import Cotangents, cotangents, place_of, with_places
from attncc.passes.outputs import final_weight, named
from attncc.runtime.cells import finish
from attncc.runtime.engine import Engine, on_device
from attncc.runtime.kinds import Kinds
from attncc.runtime.modules import load_module
from attncc.runtime.operands import Adjoint, Operands
from attncc.runtime.recordings import Recordings
from attncc.runtime.replay import key_of
from attncc.runtime.shapes import Bound
from attncc.schedule.device import device_of
from attncc.schedule.light import in_warps, light_tilings


class LightPasses:
    """The generated passes of one graph's outputs. `core` is the engine whose schedule and stored rows they use."""

    def __init__(self, graph: VariantGraph, core: Engine):
        self.graph, self.core = graph, core
        self.plan = Plan(graph)
        self.weight = final_weight(graph)
        self.saved = saved_rows(self.plan, self.weight)
        self.names = tuple(entry.name for entry in named(graph.outputs))
        self._recordings = Recordings(at_once=True)
        self._modules: dict[tuple[int, bool, bool], ModuleType] = {}
        self._lock = threading.RLock()

    def source(self, d_qk: int, hopper: bool = False) -> str:
        """The generated module's text; `hopper`: in Gluon where that has kernels."""
        return render_outputs(self.plan, d_qk, hopper)

    def __call__(self, bound: Bound, q: Tensor, k: Tensor, v: Tensor, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every reduction by its name, given the stored rows; of v only the kind of call is read."""
        tensors = {f" {name}": rows[name] for name in self.saved}  # no input's name begins with a blank
        tensors |= {d.name: bound.tensors[d.name] for d in self.graph.inputs}
        scalars = {s.name: bound.scalars[s.name] for s in self.graph.scalars}
        given = [q, k, v, *tensors.values()]
        key = (key_of(q, k, v, bound.scale, {**tensors, **scalars}), self.core.precision())
        if q.is_cuda:
            results = self._recordings.run(key, lambda: self._run(bound, q, k, v, rows), given)
        else:
            results = self._run(bound, q, k, v, rows)
        return dict(zip(self.names, results, strict=True))

    def _run(self, bound: Bound, q: Tensor, k: Tensor, v: Tensor, rows: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        tensors = [bound.tensors[d.name] for d in self.graph.inputs]
        numbers = [bound.scalars[s.name] for s in self.graph.scalars]
        prepared = self.core.prepare(Operands(core_bound(self.core, bound), q, k, v))
        key = (bound.sizes["d_qk"], in_warps(prepared.schedule, bound.sizes["d_qk"]), prepared.interpreted)
        with self._lock:
            if key not in self._modules:
                name = f"outputs of {self.graph.name}"
                self._modules[key] = load_module(self.source(*key[:2]), name, prepared.interpreted, self.core.cache)
            module = self._modules[key]
        target = device_of(q.device)
        meta = {loop: launch_meta(tiling, target) for loop, tiling in light_tilings(prepared.schedule).items()}
        with on_device(q.device):
            results = module.outputs(
                *(q, k, *tensors, *numbers, bound.scale),
                *(tuple(rows[name] for name in self.saved), meta, prepared.options),
            )
        return cast(tuple[Tensor, ...], results)


def core_bound(core: Engine, bound: Bound) -> Bound:
    """The part of a call's bound tensors that the engine of `out` takes, without inputs of the outputs."""
    tensors = {d.name: bound.tensors[d.name] for d in core.graph.inputs}
    scalars = {s.name: bound.scalars[s.name] for s in core.graph.scalars}
    return Bound(bound.sizes, bound.scale, tensors, scalars)


def _place(reduction: str) -> str:
    """The reduction that holds the place of a maximum."""
    return f"y_{place_of(reduction)}_0"


def check_extent(graph: VariantGraph, sizes: Mapping[str, int]) -> None:
    """Raise InputError where an output that grows with queries times keys has more elements than it may."""
    for output in graph.outputs:
        shape = output.domain.shape(sizes["q_idx"], sizes["kv_idx"])
        elements = sizes["b"] * sizes["h"]
        for size in shape:
            elements *= size
        if output.domain.grows and elements > output.domain.limit:
            full = (sizes["b"], sizes["h"], *shape)
            raise InputError(
                f"the output '{output.name}' {full} has {elements:,} elements ({4 * elements / 2**30:,.1f} GiB); its "
                f"limit is {output.domain.limit:,}",
                remedy="ask for fewer rows, e.g. pair(-32), or reduce it, e.g. block(64, 64); else raise limit=...",
            )


class OutputsEngine:
    """A variant's engine together with the auxiliary outputs that one kind of call asks for."""

    def __init__(self, graph: VariantGraph, kinds: Kinds):
        core = kinds.engine
        self.graph, self.core, self._kinds = graph, core, kinds
        self.light = LightPasses(graph, core)
        self.placed = with_places(graph)
        #: for calls that want gradients: the same with the places of maxima
        self.light_placed = self.light if self.placed is graph else LightPasses(self.placed, core)
        self._backwards: dict[tuple[str, ...], tuple[Cotangents, Engine, LightPasses | None]] = {}
        self._lock = threading.RLock()

    def residual_names(self) -> tuple[str, ...]:
        """The values that the backward needs besides the saved rows: positions, and reductions of outputs that have
        further operations."""
        composed = {o.name for o in self.graph.outputs if not o.expr.is_Symbol}
        wanted = [entry.name for entry in named(self.graph.outputs) if entry.output in composed]
        return (*wanted, *(n for n in self.light_placed.names if n not in self.light.names))

    def forward(
        self, bound: Bound, q: Tensor, k: Tensor, v: Tensor, with_residuals: bool
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """(out and the stored rows, the outputs in the graph's order, the residuals)."""
        own = core_bound(self.core, bound)
        results = self._kinds.run(q, k, v, own.scale, {**own.tensors, **own.scalars}, with_residuals)
        rows = {name: x for (name, _), x in zip(self.core.plan.stored, results[1:], strict=True)}
        light = self.light_placed if with_residuals else self.light
        values = light(bound, q, k, v, rows)
        outputs = [self.finish(output, values, bound) for output in self.graph.outputs]
        residuals = [values[name] for name in self.residual_names()] if with_residuals else []
        return list(results), outputs, residuals

    def finish(self, output: Output, values: Mapping[str, Tensor], bound: Bound) -> Tensor:
        """An output from its reductions."""
        entries = [entry for entry in named((output,)) if entry.output == output.name]
        own = {entry.reduction.symbol.name: values[entry.name] for entry in entries}
        return finish(self.graph, output, own, bound, torch.float32)

    def unfinish(
        self, doutputs: Mapping[str, Tensor], residuals: Sequence[Tensor], bound: Bound, wanted: tuple[str, ...]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """From the cotangents of outputs to those of their reductions, and of the inputs that their own expressions
        read."""
        kept = dict(zip(self.residual_names(), residuals, strict=True))
        of_reductions: dict[str, Tensor] = {}
        direct: dict[str, Tensor] = {}
        for output in self.graph.outputs:
            if output.name not in doutputs:
                continue
            cotangent, entries = doutputs[output.name], named((output,))
            if output.expr.is_Symbol:
                of_reductions[entries[0].name] = cotangent
                continue
            read = sorted({s.name for s in output.expr.free_symbols} & set(wanted))
            with torch.enable_grad():
                values = {e.name: kept[e.name].detach() for e in entries}
                sources = {e.name: values[e.name].requires_grad_() for e in entries if not e.reduction.is_int}
                sources |= {n: bound.tensors[n].detach().requires_grad_() for n in read}
                tensors = {n: sources.get(n, x) for n, x in bound.tensors.items()}
                result = self.finish(output, values, Bound(bound.sizes, bound.scale, tensors, bound.scalars))
            gradients = torch.autograd.grad(result, tuple(sources.values()), cotangent, allow_unused=True)
            for name, gradient in zip(sources, gradients, strict=True):
                if gradient is not None and name in read:
                    direct[name] = direct[name] + gradient if name in direct else gradient
                elif gradient is not None:
                    of_reductions[name] = gradient
        return of_reductions, direct

    def backward(
        self,
        bound: Bound,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        rows: Mapping[str, Tensor],
        residuals: Sequence[Tensor],
        dout: Tensor,
        dlse: Tensor | None,
        of_reductions: Mapping[str, Tensor],
        wanted: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """dq, dk, dv, then the gradient of each differentiable input of the graph; None where it is not wanted."""
        kept = dict(zip(self.residual_names(), residuals, strict=True))
        found, engine, carry = self._backward(tuple(of_reductions))
        tensors = dict(bound.tensors)
        for h in found.hidden:
            tensors[h.decl.name] = kept[_place(h.reduction)] if h.is_place else of_reductions[h.reduction].float()
        full = Bound(bound.sizes, bound.scale, {d.name: tensors[d.name] for d in found.graph.inputs}, bound.scalars)
        if carry is not None and engine.plan.needs_delta:
            missing = carry(full, q, k, v, rows)[carry.names[0]]
            dlse = -missing if dlse is None else dlse - missing
        saved = tuple(rows[name] for name in engine.plan.saved_names)
        return engine.backward(Operands(full, q, k, v), Adjoint(out, saved, dout, dlse, wanted))

    def _backward(self, given: tuple[str, ...]) -> tuple[Cotangents, Engine, LightPasses | None]:
        with self._lock:
            if given not in self._backwards:
                found = cotangents(self.graph, self.light.weight, given)
                engine = self.core.sibling(found.graph, found.extra)
                carry = LightPasses(found.carry, self.core) if found.carry is not None else None
                self._backwards[given] = (found, engine, carry)
            return self._backwards[given]
