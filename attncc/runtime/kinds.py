"""The calls of an engine by kind: from the third call of a kind on, a GPU call is replayed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attncc.runtime.engine import Engine
from attncc.runtime.launch import ghost, watched
from attncc.runtime.operands import Adjoint, Operands
from attncc.runtime.recordings import Recordings, capturing, keep
from attncc.runtime.replay import Recording, key_of, record
from attncc.runtime.shapes import Bound, bind


class Kind(NamedTuple):
    """Calls that differ in the addresses and values of their tensors alone. `key` says all else; `names` are the inputs
    that they are given, in order. Where `recording` replays them, `bound` has ghosts of the caller's tensors."""

    kinds: Kinds
    key: Any
    bound: Bound
    names: tuple[str, ...]
    recording: Recording | None = None


class Kinds:
    """The calls of one engine."""

    def __init__(self, engine: Engine):
        self.engine, self.graph = engine, engine.graph
        facts = engine.plan.facts
        # places among the results of a forward
        self.saved_at = tuple(1 + facts.results.index(name) for name in facts.saved)
        self.lse_at = 1 + facts.results.index("lse") if "lse" in facts.results else None
        self.has_backward = facts.has_backward
        self.graded = tuple(d.name for d in engine.graph.inputs if d.grad)
        self._rows = tuple(f" {name}" for name in facts.saved)  # no input's name begins with a blank
        self._known: dict[Any, Kind] = {}  # that are replayed
        self._seen: dict[Any, None] = {}  # that came once
        self._opaque: set[Any] = set()  # that cannot be replayed
        self._backwards = Recordings(at_once=True)  # their kernels compile while the forward runs

    def __len__(self) -> int:
        """How many forwards are replayed."""
        return len(self._known)

    def known(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, Any]
    ) -> tuple[Any, Kind | None]:
        """The key of a call's kind, and the kind where such calls are replayed; none is while somebody watches."""
        key: Any = key_of(q, k, v, scale, inputs)
        if q.dtype == torch.float32:
            key = key, self.engine.precision()
        return key, None if watched() else self._known.get(key)

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        inputs: Mapping[str, Any],
        then_backward: bool = False,
    ) -> tuple[Tensor, ...]:
        """The results of a call from its own arguments."""
        scale = scale if self.graph.has_scale else None
        tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
        key, kind = self.known(q, k, v, scale, inputs) if q.is_cuda else (None, None)
        if kind is None:
            kind = Kind(self, key, bind(self.graph, q, k, v, scale, inputs), tuple(tensors))
        return self.forward(kind, (q, k, v, *tensors.values()), then_backward)

    def forward(self, kind: Kind, given: tuple[Tensor, ...], then_backward: bool = False) -> tuple[Tensor, ...]:
        """The engine's forward of a call with q, k, v and the inputs of `kind.names`. Of a kind's first call nothing is
        noted: a cache that grows by a key a call never brings a second."""
        if kind.recording is not None:
            return kind.recording.play(given)
        q, k, v, *inputs = given
        own = dict(zip(kind.names, inputs, strict=True))
        call, key = Operands(kind.bound.among(own), q, k, v), kind.key
        if not q.is_cuda:
            return self.engine.forward(call, then_backward)
        if key in self._opaque or key not in self._seen:
            keep(self._seen, key, None)
            return self.engine.forward(call, then_backward)
        self.engine.ready(("forward",), call, then_backward)  # before anything is noted
        defaults = [x for name, x in call.bound.tensors.items() if name not in own]
        results, recording = record(lambda: self.engine.forward(call, then_backward), given, defaults)
        if recording is None:
            self._opaque.add(key)
        elif not capturing() and not watched():
            # of the caller's tensors only the kind is kept
            ghosts = call.bound.among({name: ghost(x) for name, x in own.items()})
            keep(self._known, key, Kind(self, key, ghosts, kind.names, recording))
        return results

    def backward(self, call: Operands, adjoint: Adjoint) -> tuple[Tensor | None, ...]:
        """The engine's backward."""
        bound, q, k, v = call
        out, saved, dout, dlse, wanted = adjoint
        if not q.is_cuda:
            return self.engine.backward(call, adjoint)
        own = {" out": out, " dout": dout, **dict(zip(self._rows, saved, strict=True)), **bound.tensors}
        if dlse is not None:
            own[" dlse"] = dlse
        precision = self.engine.precision() if q.dtype == torch.float32 else None
        numbers = {**own, **bound.scalars} if bound.scalars else own
        key = (key_of(q, k, v, bound.scale, numbers), precision, wanted, self.engine.ordered())
        return self._backwards.run(key, lambda: self.engine.backward(call, adjoint), [q, k, v, *own.values()])
