"""Generated modules: get their source, from the disk cache if it is there, and load it, to compile or to interpret."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

from attncc.codegen.module import load_source
from attncc.codegen.plan import Plan
from attncc.resources import fingerprint
from attncc.runtime import interpreter
from attncc.runtime.launch import Launcher
from attncc.schedule.cache import Cache, cache_key
from attncc.schedule.problem import Backend, Form


@dataclass(frozen=True)
class Features:
    """What of a call a module's text depends on, besides the variant.

    d_qk, d_v: the head dimensions of q and v; d_k that of k, where branches of q share it (None: that of q). values:
    heads of v for each head of k. tma: tiles are loaded through descriptors. form: that of the forward kernel, and
    backward that of dkdv, in which a tile is weighed in so many strips, if in any, and which deals, if it does, a
    program block after block of keys.
    """

    d_qk: int
    d_v: int
    tma: bool = False
    form: Form = "triton"
    d_k: int | None = None
    values: int = 1
    backward: Backend = "triton"
    strips: int = 0
    deals: bool = False


class Modules:
    """The generated modules of one graph."""

    def __init__(self, plan: Plan, cache: Cache):
        self._plan, self._cache = plan, cache
        self._sources: dict[Features, str] = {}
        self._loaded: dict[tuple[Features, bool], ModuleType] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """How many are loaded."""
        return len(self._loaded)

    def source(self, features: Features) -> str:
        """The text of a module."""
        with self._lock:
            if features not in self._sources:
                self._sources[features] = self._cached(features)
            return self._sources[features]

    def load(self, features: Features, interpreted: bool = False) -> ModuleType:
        """The module, for the compiler or for the interpreter."""
        with self._lock:
            key = features, interpreted
            if key not in self._loaded:
                name = self._plan.graph.name
                self._loaded[key] = load_module(self.source(features), name, interpreted, self._cache)
            return self._loaded[key]

    def _cached(self, of: Features) -> str:
        graph = self._plan.graph
        facts = {"digest": graph.digest, "name": graph.name, "code": fingerprint()}
        name = cache_key(kind="source", **facts, **asdict(of))
        found = self._cache.get(name)
        if found is not None and isinstance(found.get("text"), str):
            return str(found["text"])
        from attncc.codegen.render import render  # what lies on disk needs no generator

        has_backward = self._plan.facts.has_backward
        kernels = (of.tma, of.form, of.d_k, of.values, of.backward, of.strips, of.deals)
        text = render(self._plan, of.d_qk, of.d_v, has_backward, *kernels)
        self._cache.put(name, {"kind": "source", "what": graph.name, "text": text})
        return text


#: what is loaded, while an engine has it: each layer of a model may have an op of its own, and all have one text
_shared: WeakValueDictionary[tuple[str, str, bool, Path], ModuleType] = WeakValueDictionary()
_loading = threading.Lock()


def load_module(source: str, name: str, interpreted: bool, cache: Cache) -> ModuleType:
    """A generated module, for the compiler, whose binaries lie in `cache`, or for the interpreter: the one that another
    engine has of this text, where one has."""
    digest = hashlib.sha256(source.encode()).hexdigest()
    key = (digest, name, interpreted, cache.directory)
    with _loading:
        found = _shared.get(key)
        if found is None:
            found = _shared[key] = _load(source, digest, name, interpreted, cache)
        return found


def _load(source: str, digest: str, name: str, interpreted: bool, cache: Cache) -> ModuleType:
    if interpreted:
        with interpreter.decorating():
            module = load_source(source, f"{name} (interpreted)")
        module._launch = _interpreted_launch(module._launch)  # type: ignore[attr-defined]
    else:
        module = load_source(source, name)
        module._launch = Launcher(digest, cache)  # type: ignore[attr-defined]
    return module


def _interpreted_launch(launch: Callable[..., None]) -> Callable[..., None]:
    def interpreted(*args: Any) -> None:
        with interpreter.interpreting():
            launch(*args)

    return interpreted
