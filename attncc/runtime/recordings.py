"""Recordings by the kind of a call: made at the second call of a kind, played from the third on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from attncc.runtime.engine import capturing, keep
from attncc.runtime.launch import watched
from attncc.runtime.replay import Recording, record

#: of a kind that cannot be replayed
_OPAQUE = None


class Recordings:
    """How calls are replayed. `key` says all that a call depends on but the addresses and values of its tensors."""

    def __init__(self) -> None:
        self._known: dict[Any, Recording | None] = {}
        self._seen: dict[Any, None] = {}  # came once: a cache that grows by a key a call never brings one again

    def run(
        self, key: Any, call: Callable[[], tuple[Any, ...]], tensors: Sequence[Tensor], defaults: Sequence[Tensor] = ()
    ) -> tuple[Any, ...]:
        """The results of `call`, which depends on these CUDA tensors alone, and on what `key` says. `defaults`: tensors
        that are the same in all calls with this key."""
        if key not in self._seen:
            keep(self._seen, key, None)  # its kernels start to compile, which is nothing to note
            return call()
        found = self._known.get(key)
        if found is not None and not watched():
            return found.play(tensors)
        if key in self._known:
            return call()
        results, recording = record(call, tensors, defaults)
        if not capturing() and not watched():
            keep(self._known, key, _OPAQUE if recording is None else recording)
        return results


__all__ = ["Recordings"]
