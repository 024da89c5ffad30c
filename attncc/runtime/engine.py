"""Run a variant: choose a schedule for a call, create the module it needs, compile ahead, launch.

Everything is created on first use and kept; the second call of a kind finds it in a dictionary.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import triton.language as tl
from torch import Tensor

from attncc.codegen.facts import Facts
from attncc.codegen.hopper_backward import by_distance
from attncc.codegen.launch import in_fixed_order, kernel_of, schedule_meta
from attncc.codegen.plan import Plan
from attncc.codegen.problem import problem_of
from attncc.collector import held
from attncc.errors import InputError
from attncc.ir.graph import VariantGraph
from attncc.passes.differentiate import PairCotangents
from attncc.resources import fingerprint
from attncc.runtime.launch import collect
from attncc.runtime.modules import Features, Modules
from attncc.runtime.operands import Adjoint, Operands
from attncc.runtime.prepared import Prepared, spills_anew
from attncc.runtime.shapes import Bound
from attncc.schedule import decode
from attncc.schedule.cache import Cache, cache_key
from attncc.schedule.candidates import candidates
from attncc.schedule.choose import choose
from attncc.schedule.device import Device, device_of, loads_boxes
from attncc.schedule.hopper_backward import deals, queries
from attncc.schedule.problem import Backend, Dtype, Kernel, Precision, Problem, Schedule
from attncc.schedule.spills import with_known_spills

_DTYPES: dict[torch.dtype, tuple[Dtype, Any]] = {
    torch.float16: ("fp16", tl.float16),
    torch.bfloat16: ("bf16", tl.bfloat16),
    torch.float32: ("fp32", tl.float32),
}


class Engine:
    """The generated kernels of one variant, for every device, dtype and size that calls bring."""

    def __init__(
        self,
        graph: VariantGraph,
        schedule: Schedule | None = None,
        precision: Precision | None = None,
        backend: Backend | None = None,
        extra: PairCotangents | None = None,
        deterministic: bool = False,
    ):
        self.graph = graph
        self.cache = Cache()
        self.plan = self._known_plan(extra)
        self.modules = Modules(self.plan, self.cache)
        self._fixed = schedule
        self._precision = precision
        self._backend = backend
        self._deterministic = deterministic
        self._prepared: dict[Any, Prepared] = {}
        self._warmed: dict[Any, dict[Kernel, list[Future[Any]]]] = {}
        self._lock = threading.RLock()

    def sibling(self, graph: VariantGraph, extra: PairCotangents) -> Engine:
        """An engine with the same schedule and precision for this graph's backward with further cotangents."""
        fixed = self._fixed if self._fixed is None or self._fixed.dkdv.backend == "triton" else None
        return Engine(graph, fixed, self._precision, "triton", extra)

    def _known_plan(self, extra: PairCotangents | None) -> Plan:
        """The graph's plan with its facts, from the disk cache where they lie there."""
        if extra is not None:
            return Plan(self.graph, extra=extra)
        name = cache_key(kind="facts", digest=self.graph.digest, code=fingerprint())
        plan = Plan(self.graph, facts=Facts.from_json(self.cache.get(name)))
        if not plan.knows_facts:
            self.cache.put(name, {**plan.facts.to_json(), "what": self.graph.name})
        return plan

    def source_here(self, d_qk: int, d_v: int) -> str:
        """The text for 16-bit tensors on the current GPU; with none, the one that needs no feature of any."""
        dims = (d_qk, d_v, self.graph.branches, self.graph.value)
        tma = torch.cuda.is_available() and loads_boxes(device_of("cuda"), "bf16", *dims)
        backend, facts = self._backend or "triton", self.plan.facts
        served = facts.has_backward and not facts.warps.no_backward and queries(d_qk, d_v, facts.warps) is not None
        backward: Backend = backend if served else "triton"
        features = Features(d_qk, d_v, tma and facts.has_backward, backend, backward=backward)
        return self.modules.source(features)

    def problem(
        self, sizes: Mapping[str, int], dtype: torch.dtype, scalars: Mapping[str, Any], ordered: bool = False
    ) -> Problem:
        """The scheduler's view of a call."""
        return problem_of(self.plan, sizes, _DTYPES[dtype][0], self.precision(), scalars, ordered)

    def precision(self) -> Precision:
        """How float32 operands meet in a matmul: as asked for, else as PyTorch's own matmuls do."""
        if self._precision is not None:
            return self._precision
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"

    def ordered(self) -> bool:
        """Whether the order of every sum must be fixed: by request, or by PyTorch's deterministic mode."""
        return self._deterministic or torch.are_deterministic_algorithms_enabled()

    def free_sums(self) -> frozenset[str]:
        """The gradients whose sums have no fixed order in the backwards prepared so far: programs of Gluon's add to
        dQ, and to what has an entry a distance."""
        metas = [p.meta["dkdv"] for p in self._prepared.values()]
        if not any(meta.get("SUM_DQ") and not meta["ORDERED"] for meta in metas):
            return frozenset()
        return frozenset(("dq", *(f"d{g.read.input}" for g in by_distance(self.plan))))

    def prepare(self, call: Operands, instead_of: Prepared | None = None) -> Prepared:
        """The module, schedule and options for calls like this one, chosen anew where there is none but
        `instead_of`."""
        bound, *qkv = call
        sizes = scheduled_sizes(bound.sizes)
        precision = self.precision()
        boxed = all(map(_fits_boxes, qkv))
        ordered = self.ordered()
        dtype, device = call.q.dtype, call.device
        key = (tuple(sizes.values()), dtype, device, precision, tuple(bound.scalars.values()), boxed, ordered)
        found = self._prepared.get(key)
        if found is None or found is instead_of:
            with self._lock:
                target = device_of(device)
                with held():
                    found = self.prepare_for(target, bound, dtype, precision, boxed, ordered, instead_of)
                self._prepared[key] = found
        return found

    def prepare_for(
        self,
        target: Device,
        bound: Bound,
        dtype: torch.dtype,
        precision: Precision = "ieee",
        boxed: bool = True,
        ordered: bool = False,
        instead_of: Prepared | None = None,
    ) -> Prepared:
        """`prepare` for a device that need not be there. `boxed`: descriptors can address q, k and v."""
        problem = self.problem(scheduled_sizes(bound.sizes), dtype, bound.scalars, ordered)
        schedule = self._fixed or choose(problem, target, self.cache, self._backend if boxed else "triton")
        if instead_of is not None:
            schedule = instead_of.kept_in(schedule)
        if "gluon" in (schedule.forward.backend, schedule.dkdv.backend) and not boxed:
            raise InputError(
                "the given schedule has a Gluon kernel, which cannot copy these tensors",
                remedy="align q, k, v and their strides to 16 bytes, or give a schedule for Triton",
            )
        interpreted = target.is_interpreter
        d_qk, d_v = bound.sizes["d_qk"], bound.sizes["d_v"]
        boxes = loads_boxes(target, problem.dtype, d_qk, d_v, self.graph.branches, self.graph.value)
        tma = boxed and self.plan.facts.has_backward and boxes
        backward: Backend = schedule.dkdv.backend if self.plan.facts.has_backward else "triton"
        d_k = bound.sizes.get("d_k")
        form, strips = schedule.forward.form, schedule.dkdv.strips
        dealt = backward == "gluon" and not ordered and deals(schedule.dkdv, problem)
        features = Features(d_qk, d_v, tma, form, d_k, problem.values, backward, strips, dealt)
        module = self.modules.load(features, interpreted)
        meta = _meta(schedule, problem, target)
        if backward == "gluon" and ordered:
            meta["dkdv"] = in_fixed_order(meta["dkdv"])
        guessed = self._fixed is None and schedule.origin != "tuned" and not interpreted
        chosen_for = (with_known_spills(problem, target, self.cache), target) if guessed else None
        options = dot_options(dtype, precision, target)
        ran = set() if instead_of is None else set(instead_of.ran)
        return Prepared(module, schedule, meta, options, interpreted, chosen_for, ran=ran)

    def ready(
        self, kernels: tuple[Kernel, ...], call: Operands, backward: bool, wanted: tuple[str, ...] | None = None
    ) -> Prepared:
        """`prepare`, with all kernels on their way; where one of `kernels`, which are to be launched now, turns out to
        spill, another tiling may take its place before any call has seen it. Those that a call has seen stay."""
        prepared = self.prepare(call)
        if prepared.interpreted:
            return prepared
        while True:
            self.warm(prepared, call, backward, wanted)
            anew = spills_anew(prepared, kernels, self.cache)
            with self._lock:
                found = self.prepare(call, prepared if anew else None)
                if found is prepared:
                    prepared.ran.update(kernels)
                    return prepared
            prepared = found

    def warm(self, prepared: Prepared, call: Operands, backward: bool, wanted: tuple[str, ...] | None = None) -> None:
        """Start to compile what this call launches, all kernels side by side; once for each kind. `backward`: that,
        too, where there is one; `wanted`: inputs whose gradients are computed, those that require them if None."""
        backward = backward and self.plan.facts.has_backward
        if wanted is None:
            wanted = call.graded() if backward else ()
        ranks = tuple((x.dtype, x.shape[-1:] == (1,)) for x in call.bound.tensors.values())
        words = str(prepared.meta), str(prepared.options)
        kind = (id(prepared.module), call.q.dtype, call.device, words, ranks, backward, wanted)
        with self._lock:
            if kind not in self._warmed:
                run = partial(self.host_code, prepared, call, backward, wanted)
                started: dict[Kernel, list[Future[Any]]] = {}
                for name, future in collect(run, call.q.get_device()):
                    if (kernel := kernel_of(name, prepared.schedule)) is not None:
                        started.setdefault(kernel, []).append(future)
                self._warmed[kind] = started
            prepared.started.update(self._warmed[kind])

    def host_code(
        self, prepared: Prepared, call: Operands, backward: bool, wanted: tuple[str, ...] | None = None
    ) -> None:
        """Run the module's host code on ghosts of a call's tensors, for what notes its launches; see `collect`."""
        module, constants = prepared.module, (prepared.meta, prepared.options)
        arguments = call.ghosts().arguments
        out, *rows = module.forward(*arguments, *constants)
        if backward:
            results = dict(zip(self.plan.facts.results, rows, strict=True))
            saved = tuple(results[name] for name in self.plan.facts.saved)
            wanted = call.graded() if wanted is None else wanted
            module.backward(*arguments, *Adjoint(out, saved, out, None, wanted), *constants)

    def forward(self, call: Operands, then_backward: bool = False) -> tuple[Tensor, ...]:
        """out, then the plan's results in their order. `then_backward`: compile the backward meanwhile."""
        prepared = self.ready(("forward",), call, then_backward)
        with on_device(call.device):
            found = prepared.module.forward(*call.arguments, prepared.meta, prepared.options)
        return cast(tuple[Tensor, ...], found)

    def backward(self, call: Operands, adjoint: Adjoint) -> tuple[Tensor | None, ...]:
        """dq, dk, dv, then the gradient of each differentiable input in the graph's order; None where it is not
        wanted."""
        self.plan.refuse_gradients()
        prepared = self.ready(("dkdv", "dq", "pair"), call, True, adjoint.wanted)
        with on_device(call.device):
            found = prepared.module.backward(*call.arguments, *adjoint, prepared.meta, prepared.options)
        return cast(tuple[Tensor | None, ...], found)


def scheduled_sizes(sizes: Mapping[str, int]) -> Mapping[str, int]:
    """The sizes for which a call's schedule is chosen: a cache that grows by a key a call is not scheduled anew each
    time."""
    return {**sizes, "kv_idx": decode.rounded_keys(sizes["q_idx"], sizes["kv_idx"])}


def _fits_boxes(x: Tensor) -> bool:
    """Whether TMA can address x: strides are multiples of 16 bytes, no dimension is broadcast, and x is not empty."""
    steps = all(
        n == 1 or (s > 0 and s * x.element_size() % 16 == 0) for n, s in zip(x.shape[:-1], x.stride(), strict=False)
    )
    return steps and x.data_ptr() % 16 == 0 and x.numel() > 0


def on_device(device: torch.device) -> Any:
    """Triton launches on the current device; the tensors say which one that must be."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _meta(schedule: Schedule, problem: Problem, device: Device) -> dict[str, dict[str, int]]:
    if schedule.pair is None and problem.pairs:
        schedule = replace(schedule, pair=candidates("pair", problem, device)[0])
    return schedule_meta(schedule, device, problem.d_qk, problem.d_v)


def dot_options(dtype: torch.dtype, precision: Precision, device: Device) -> dict[str, Any]:
    """The constants that every kernel takes besides its tiling."""
    dot = _DTYPES[dtype][1]
    if device.is_interpreter and dtype == torch.bfloat16:
        dot = tl.float32  # Triton's interpreter computes bfloat16 dots wrong
    fast = dtype != torch.float32 and device.backend == "cuda" and not device.is_interpreter
    return {"DOT": dot, "PRECISION": precision if dtype == torch.float32 else "ieee", "FAST_MATH": fast}
