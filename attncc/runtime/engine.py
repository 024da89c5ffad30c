"""Runs one variant: generates and loads its module for the head dimensions of a call, chooses a schedule, launches.

Everything is made on first use and kept; the second call of the same kind finds it in a dictionary.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
import triton.language as tl
from torch import Tensor

from attncc.codegen.facts import Facts
from attncc.codegen.launch import in_fixed_order, kernel_of, schedule_meta
from attncc.codegen.module import load_source
from attncc.codegen.plan import Plan
from attncc.codegen.problem import problem_of
from attncc.collector import held
from attncc.errors import InputError
from attncc.ir.graph import VariantGraph
from attncc.passes.differentiate import PairCotangents
from attncc.resources import fingerprint
from attncc.runtime import interpreter
from attncc.runtime.launch import Launcher, collect, ghost, watched
from attncc.runtime.prepared import Prepared, spills_anew
from attncc.runtime.recordings import Recordings, capturing, keep
from attncc.runtime.replay import Recording, key_of, record
from attncc.runtime.shapes import Bound, bind
from attncc.schedule import decode
from attncc.schedule.cache import Cache, cache_key
from attncc.schedule.candidates import candidates
from attncc.schedule.choose import choose
from attncc.schedule.device import Device, device_of, loads_boxes
from attncc.schedule.hopper_backward import queries
from attncc.schedule.problem import Backend, Dtype, Form, Kernel, Precision, Problem, Schedule
from attncc.schedule.spills import with_known_spills

_DTYPES: dict[torch.dtype, tuple[Dtype, Any]] = {
    torch.float16: ("fp16", tl.float16),
    torch.bfloat16: ("bf16", tl.bfloat16),
    torch.float32: ("fp32", tl.float32),
}


class Kind(NamedTuple):
    """Calls that differ in the addresses and values of their tensors alone. `key` says all else; `names` are the inputs
    that they are given, in order. Where `recording` replays them, `bound` has ghosts of the caller's tensors."""

    engine: Engine
    key: Any
    bound: Bound
    names: tuple[str, ...]
    recording: Recording | None = None


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
        facts = self.plan.facts
        # places among the results of a forward
        self.saved_at = tuple(1 + facts.results.index(name) for name in facts.saved)
        self._rows = tuple(f" {name}" for name in facts.saved)  # no input's name begins with a blank
        self.lse_at = 1 + facts.results.index("lse") if "lse" in facts.results else None
        self.graded = tuple(d.name for d in graph.inputs if d.grad)
        self._fixed = schedule
        self._precision = precision
        self._backend = backend
        self._deterministic = deterministic
        self._sources: dict[tuple[int, int, bool, Form, int, int, Backend], str] = {}
        self._modules: dict[tuple[int, int, bool, Form, int, int, Backend, bool], ModuleType] = {}
        self._prepared: dict[Any, Prepared] = {}
        self._kinds: dict[Any, Kind] = {}  # that are replayed
        self._recordings = Recordings(at_once=True)  # of backwards, whose kernels compile while the forward runs
        self._seen: dict[Any, None] = {}  # kinds of calls that came once
        self._opaque: set[Any] = set()  # forwards that cannot be replayed
        self._warmed: dict[Any, dict[Kernel, Future[Any]]] = {}
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

    def source(
        self,
        d_qk: int,
        d_v: int,
        tma: bool = False,
        form: Form = "triton",
        d_k: int | None = None,
        values: int = 1,
        backward: Backend = "triton",
    ) -> str:
        """The generated module's text for these head dimensions, from the disk cache where it lies there.

        form: that of the forward kernel, backward: that of dkdv; d_k is that of k, where branches of q share it;
        values: heads of v for each head of k.
        """
        with self._lock:
            key = (d_qk, d_v, tma, form, d_k or d_qk, values, backward)
            if key not in self._sources:
                self._sources[key] = self._cached_source(*key)
            return self._sources[key]

    def source_here(self, d_qk: int, d_v: int) -> str:
        """The text for 16-bit tensors on the current GPU; with none, the one that needs no feature of any."""
        dims = (d_qk, d_v, self.graph.branches, self.graph.value)
        tma = torch.cuda.is_available() and loads_boxes(device_of("cuda"), "bf16", *dims)
        backend, facts = self._backend or "triton", self.plan.facts
        served = facts.has_backward and not facts.warps.no_backward and queries(d_qk, d_v, facts.warps) is not None
        backward: Backend = backend if served else "triton"
        return self.source(d_qk, d_v, tma and facts.has_backward, backend, backward=backward)

    def _cached_source(
        self, d_qk: int, d_v: int, tma: bool, form: Form, d_k: int, values: int, backward: Backend
    ) -> str:
        facts = {"digest": self.graph.digest, "name": self.graph.name, "backend": form, "backward": backward}
        dims = {"d_qk": d_qk, "d_v": d_v, "d_k": d_k, "values": values}
        name = cache_key(kind="source", tma=tma, code=fingerprint(), **facts, **dims)
        found = self.cache.get(name)
        if found is not None and isinstance(found.get("text"), str):
            return str(found["text"])
        from attncc.codegen.render import render  # what lies on disk needs no generator

        text = render(self.plan, d_qk, d_v, self.plan.facts.has_backward, tma, form, d_k, values, backward)
        self.cache.put(name, {"kind": "source", "what": self.graph.name, "text": text})
        return text

    def module(
        self,
        d_qk: int,
        d_v: int,
        interpreted: bool = False,
        tma: bool = False,
        form: Form = "triton",
        d_k: int | None = None,
        values: int = 1,
        backward: Backend = "triton",
    ) -> ModuleType:
        """The generated module, loaded for the compiler or for the interpreter."""
        with self._lock:
            key = (d_qk, d_v, tma, form, d_k or d_qk, values, backward, interpreted)
            if key not in self._modules:
                source = self.source(d_qk, d_v, tma, form, d_k, values, backward)
                self._modules[key] = load_module(source, self.graph.name, interpreted, self.cache)
            return self._modules[key]

    def problem(self, sizes: Mapping[str, int], dtype: torch.dtype, scalars: Mapping[str, Any]) -> Problem:
        """The scheduler's view of a call."""
        return problem_of(self.plan, sizes, _DTYPES[dtype][0], self.precision(), scalars)

    def precision(self) -> Precision:
        """How float32 operands meet in a matmul: as asked for, else as PyTorch's own matmuls do."""
        if self._precision is not None:
            return self._precision
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"

    def ordered(self) -> bool:
        """Must the order of every sum be fixed? As asked for, or as PyTorch's deterministic mode says."""
        return self._deterministic or torch.are_deterministic_algorithms_enabled()

    def free_sums(self) -> frozenset[str]:
        """The gradients whose sums have no fixed order in the backwards prepared so far: programs of Gluon's add to dQ,
        and to dK and dV where several share the heads of a group."""
        metas = [p.meta["dkdv"] for p in self._prepared.values()]
        summed = ("dq",) if any(meta.get("SUM_DQ") and not meta["ORDERED"] for meta in metas) else ()
        shared = ("dk", "dv") if any(meta.get("SPLITS", 1) > 1 for meta in metas) else ()
        return frozenset((*summed, *shared))

    def prepare(self, bound: Bound, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
        """The module, schedule and options for calls like this one."""
        sizes = scheduled_sizes(bound.sizes)
        precision = self.precision()
        boxed = all(map(_fits_boxes, (q, k, v)))
        ordered = self.ordered()
        key = (tuple(sizes.values()), q.dtype, q.device, precision, tuple(bound.scalars.values()), boxed, ordered)
        found = self._prepared.get(key)
        if found is None:
            with self._lock:
                target = device_of(q.device)
                with held():
                    found = self.prepare_for(target, bound, q.dtype, precision, boxed, ordered)
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
    ) -> Prepared:
        """`prepare` for a device that need not be there. `boxed`: descriptors can address q, k and v."""
        problem = self.problem(scheduled_sizes(bound.sizes), dtype, bound.scalars)
        schedule = self._fixed or choose(problem, target, self.cache, self._backend if boxed else "triton")
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
        more = (bound.sizes.get("d_k"), problem.values, backward)
        module = self.module(d_qk, d_v, interpreted, tma, schedule.forward.form, *more)
        meta = _meta(schedule, problem, target)
        if backward == "gluon" and ordered:
            meta["dkdv"] = in_fixed_order(meta["dkdv"])
        guessed = self._fixed is None and schedule.origin != "tuned" and not interpreted
        chosen_for = (with_known_spills(problem, target, self.cache), target) if guessed else None
        options = dot_options(dtype, precision, target)
        return Prepared(module, schedule, meta, options, interpreted, chosen_for)

    def _ready(
        self,
        kernels: tuple[Kernel, ...],
        bound: Bound,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        backward: bool,
        wanted: tuple[str, ...] | None = None,
    ) -> Prepared:
        """`prepare`, with all kernels on their way; where one of `kernels`, which are to be launched now, turns out to
        spill, another tiling may take its place before any call has seen it."""
        prepared = self.prepare(bound, q, k, v)
        if prepared.interpreted:
            return prepared
        self.warm(prepared, bound, q, k, v, backward, wanted)
        while spills_anew(prepared, kernels, self.cache):
            with self._lock:
                self._prepared = {key: found for key, found in self._prepared.items() if found is not prepared}
            prepared = self.prepare(bound, q, k, v)
            self.warm(prepared, bound, q, k, v, backward, wanted)
        return prepared

    def warm(
        self,
        prepared: Prepared,
        bound: Bound,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        backward: bool,
        wanted: tuple[str, ...] | None = None,
    ) -> None:
        """Start to compile what this call launches, all kernels side by side; once for each kind. `wanted`: inputs
        whose gradients are computed, those that require them if None."""
        if wanted is None:
            wanted = tuple(n for n, x in bound.tensors.items() if x.requires_grad) if backward else ()
        ranks = tuple((x.dtype, x.shape[-1:] == (1,)) for x in bound.tensors.values())
        words = str(prepared.meta), str(prepared.options)
        kind = (id(prepared.module), q.dtype, q.device, words, ranks, backward, wanted)
        with self._lock:
            if kind not in self._warmed:
                run = partial(self.host_code, prepared, bound, q, k, v, backward, wanted)
                started = collect(run, q.get_device())
                self._warmed[kind] = {of: future for name, future in started if (of := kernel_of(name)) is not None}
            prepared.started.update(self._warmed[kind])

    def host_code(
        self,
        prepared: Prepared,
        bound: Bound,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        backward: bool,
        wanted: tuple[str, ...] | None = None,
    ) -> None:
        """Run the module's host code on ghosts of a call's tensors, for what notes its launches; see `collect`."""
        ghosts = [ghost(x) for x in (q, k, v)]
        inputs = [*map(ghost, bound.tensors.values()), *bound.scalars.values(), bound.scale]
        module, meta, options = prepared.module, prepared.meta, prepared.options
        out, *rows = module.forward(*ghosts, *inputs, meta, options)
        if backward:
            results = dict(zip(self.plan.facts.results, rows, strict=True))
            saved = tuple(results[name] for name in self.plan.facts.saved)
            if wanted is None:
                wanted = tuple(n for n, x in bound.tensors.items() if x.requires_grad)
            module.backward(*ghosts, *inputs, out, saved, out, None, wanted, meta, options)

    def forward(self, bound: Bound, q: Tensor, k: Tensor, v: Tensor, then_backward: bool = False) -> tuple[Tensor, ...]:
        """out, then the plan's results in their order. `then_backward`: compile the backward meanwhile."""
        prepared = self._ready(("forward",), bound, q, k, v, then_backward and self.plan.facts.has_backward)
        with on_device(q.device):
            return cast(
                tuple[Tensor, ...],
                prepared.module.forward(
                    q,
                    k,
                    v,
                    *bound.tensors.values(),
                    *bound.scalars.values(),
                    bound.scale,
                    prepared.meta,
                    prepared.options,
                ),
            )

    def known(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, Any]
    ) -> tuple[Any, Kind | None]:
        """The key of a call's kind, and the kind where such calls are replayed; none is while somebody watches."""
        key: Any = key_of(q, k, v, scale, inputs)
        if q.dtype == torch.float32:
            key = key, self.precision()
        return key, None if watched() else self._kinds.get(key)

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        inputs: Mapping[str, Any],
        then_backward: bool = False,
    ) -> tuple[Tensor, ...]:
        """The results of a call from its own arguments: on a GPU replayed where its kind is known."""
        scale = scale if self.graph.has_scale else None
        if not q.is_cuda:
            return self.forward(bind(self.graph, q, k, v, scale, inputs), q, k, v, then_backward)
        key, kind = self.known(q, k, v, scale, inputs)
        tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
        if kind is None:
            kind = Kind(self, key, bind(self.graph, q, k, v, scale, inputs), tuple(tensors))
        return self.infer(kind, (q, k, v, *tensors.values()), then_backward)

    def infer(self, kind: Kind, given: tuple[Tensor, ...], then_backward: bool = False) -> tuple[Tensor, ...]:
        """The results of a call with q, k, v and the inputs of `kind.names`: on a GPU replayed from the third call of
        its kind on. A cache that grows by a key a call never brings a kind again."""
        if kind.recording is not None:
            return kind.recording.play(given)
        q, k, v, *inputs = given
        own = dict(zip(kind.names, inputs, strict=True))
        bound, key = kind.bound.among(own), kind.key
        if not q.is_cuda or key in self._opaque or key not in self._seen:
            if q.is_cuda:
                keep(self._seen, key, None)
            return self.forward(bound, q, k, v, then_backward)
        # before anything is noted
        self._ready(("forward",), bound, q, k, v, then_backward and self.plan.facts.has_backward)
        defaults = [x for name, x in bound.tensors.items() if name not in own]
        results, recording = record(lambda: self.forward(bound, q, k, v, then_backward), given, defaults)
        if recording is None:
            self._opaque.add(key)
        elif not capturing() and not watched():
            # of the caller's tensors only the kind is kept
            ghosts = bound.among({name: ghost(x) for name, x in own.items()})
            keep(self._kinds, key, Kind(self, key, ghosts, kind.names, recording))
        return results

    def gradients(
        self,
        bound: Bound,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        saved: tuple[Tensor, ...],
        dout: Tensor,
        dlse: Tensor | None,
        wanted: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """`backward`, which a call of a known kind replays."""
        own = {" out": out, " dout": dout, **dict(zip(self._rows, saved, strict=True)), **bound.tensors}
        if dlse is not None:
            own[" dlse"] = dlse
        precision = self.precision() if q.dtype == torch.float32 else None
        numbers = {**own, **bound.scalars} if bound.scalars else own
        key = (key_of(q, k, v, bound.scale, numbers), precision, wanted, self.ordered())
        call = (bound, q, k, v, out, saved, dout, dlse, wanted)
        if not q.is_cuda:
            return self.backward(*call)
        return self._recordings.run(key, lambda: self.backward(*call), [q, k, v, *own.values()])

    def backward(
        self,
        bound: Bound,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        saved: tuple[Tensor, ...],
        dout: Tensor,
        dlse: Tensor | None,
        wanted: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """dq, dk, dv, then the gradient of each differentiable input in the graph's order; None where it is not
        wanted."""
        self.plan.refuse_gradients()
        prepared = self._ready(("dkdv", "dq"), bound, q, k, v, True, wanted)
        with on_device(q.device):
            return cast(
                tuple[Tensor, ...],
                prepared.module.backward(
                    *(q, k, v, *bound.tensors.values(), *bound.scalars.values(), bound.scale),
                    *(out, saved, dout, dlse, wanted, prepared.meta, prepared.options),
                ),
            )


def scheduled_sizes(sizes: Mapping[str, int]) -> Mapping[str, int]:
    """The sizes for which a call's schedule is chosen: a cache that grows by a key a call is not scheduled anew each
    time."""
    return {**sizes, "kv_idx": decode.rounded_keys(sizes["q_idx"], sizes["kv_idx"])}


def load_module(source: str, name: str, interpreted: bool, cache: Cache) -> ModuleType:
    """A generated module, for the compiler, whose binaries lie in `cache`, or for the interpreter."""
    if interpreted:
        with interpreter.decorating():
            module = load_source(source, f"{name} (interpreted)")
        module._launch = _interpreted_launch(module._launch)  # type: ignore[attr-defined]
    else:
        module = load_source(source, name)
        module._launch = Launcher(hashlib.sha256(source.encode()).hexdigest(), cache)  # type: ignore[attr-defined]
    return module


def _fits_boxes(x: Tensor) -> bool:
    """Can descriptors address x? They step by 16 bytes, and neither repeat rows nor hold nothing."""
    steps = all(
        n == 1 or (s > 0 and s * x.element_size() % 16 == 0) for n, s in zip(x.shape[:-1], x.stride(), strict=False)
    )
    return steps and x.data_ptr() % 16 == 0 and x.numel() > 0


def on_device(device: torch.device) -> Any:
    """Triton launches on the current device; the tensors say which one that must be."""
    return torch.cuda.device(device) if device.type == "cuda" else _nothing


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


_nothing = _Nothing()


def _interpreted_launch(launch: Callable[..., None]) -> Callable[..., None]:
    def interpreted(*args: Any) -> None:
        with interpreter.interpreting():
            launch(*args)

    return interpreted


def _meta(schedule: Schedule, problem: Problem, device: Device) -> dict[str, dict[str, int]]:
    if schedule.pair is None and problem.pairs:
        schedule = replace(schedule, pair=candidates("pair", problem, device)[0])
    return schedule_meta(schedule, device)


def dot_options(dtype: torch.dtype, precision: Precision, device: Device) -> dict[str, Any]:
    """The constants that every kernel takes besides its tiling."""
    dot = _DTYPES[dtype][1]
    if device.is_interpreter and dtype == torch.bfloat16:
        dot = tl.float32  # Triton's interpreter computes bfloat16 dots wrong
    fast = dtype != torch.float32 and device.backend == "cuda" and not device.is_interpreter
    return {"DOT": dot, "PRECISION": precision if dtype == torch.float32 else "ieee", "FAST_MATH": fast}
