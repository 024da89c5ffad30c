"""Recordings by the kind of a call: calls that differ only in addresses and values of tensors are replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attncc.runtime.launch import watched
from attncc.runtime.replay import Recording, record

#: kinds of calls that are remembered; beyond them the oldest is forgotten
REMEMBERED = 1024
#: of a kind that cannot be replayed
_OPAQUE = None


def keep(known: dict[Any, Any], key: Any, value: Any) -> None:
    """Remember what is known of a kind of call."""
    while len(known) >= REMEMBERED:
        known.pop(next(iter(known)), None)
    known[key] = value


def capturing() -> bool:
    """Whether a CUDA graph is being captured. Its tensors come from the graph's own pool and must not be kept."""
    return torch.cuda.is_current_stream_capturing()


class Recordings:
    """Recordings by a key that says all that a call depends on but the addresses and values of its tensors.

    at_once: a kind's first call is recorded, its second replayed. Else the second is recorded: a cache that grows by a
    key a call never brings a kind again, and while kernels start to compile there is nothing to note.
    """

    def __init__(self, at_once: bool = False) -> None:
        self._at_once = at_once
        self._known: dict[Any, Recording | None] = {}
        self._seen: dict[Any, None] = {}

    def __len__(self) -> int:
        """The kinds that are replayed."""
        return sum(recording is not _OPAQUE for recording in self._known.values())

    def run(
        self, key: Any, call: Callable[[], tuple[Any, ...]], tensors: Sequence[Tensor], defaults: Sequence[Tensor] = ()
    ) -> tuple[Any, ...]:
        """The results of `call`, which depends on these CUDA tensors alone, and on what `key` says. `defaults`: tensors
        that are the same in all calls with this key."""
        if not self._at_once and key not in self._seen:
            keep(self._seen, key, None)
            return call()
        found = self._known.get(key)
        if found is not None and not watched():
            return found.play(tensors)
        if key in self._known:
            return call()
        results, recording = record(call, tensors, defaults)
        if recording is None:
            keep(self._known, key, _OPAQUE)
        elif not capturing() and not watched():
            keep(self._known, key, recording)
        return results


__all__ = ["Recordings", "capturing", "keep"]
