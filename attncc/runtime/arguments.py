"""The arguments of a launch (tensors, tensor descriptors, numbers), and their layout in memory for the driver."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from attncc.runtime.cuda import CELLS, Box


def is_box(value: Any) -> bool:
    """Whether this is a tensor descriptor, of which Triton and Gluon each have a class."""
    return hasattr(value, "block_shape")


def tensors_of(arguments: Sequence[Any]) -> dict[int, Tensor]:
    """The tensors among a launch's arguments, also those behind descriptors, by position."""
    found = {i: a.base if is_box(a) else a for i, a in enumerate(arguments)}
    return {i: a for i, a in found.items() if isinstance(a, Tensor)}


def addresses_of(arguments: Sequence[Any]) -> dict[int, int]:
    """Where those tensors lie."""
    return {i: tensor.data_ptr() for i, tensor in tensors_of(arguments).items()}


def without_tensors(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments, kept for a replay: no tensor among them stays alive."""
    return tuple(moved(a, None) if is_box(a) else None if isinstance(a, Tensor) else a for a in arguments)


def moved(box: Any, base: Tensor | None) -> Any:
    """The descriptor of another tensor of the same kind, which need not be checked again."""
    other = object.__new__(type(box))
    other.__dict__.update(box.__dict__, base=base)
    return other


class Cells:
    """The arguments of one launch in C's layout, and the array of their addresses.

    `kinds` are Triton's types of the arguments, `boxes` its compiler's facts of the descriptors among them. `tensors`
    has the address of each tensor, also of one behind a descriptor, by its position.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        arguments: Sequence[Any],
        boxes: Sequence[Mapping[str, Any]],
        tensors: Mapping[int, int],
    ):
        self._cells: dict[int, Any] = {}
        self._boxes: dict[int, Box] = {}
        self._values: list[Any] = []
        places: list[int] = []
        facts = iter(boxes)
        for position, (kind, value) in enumerate(zip(kinds, arguments, strict=True)):
            if is_box(value):
                box = self._boxes[position] = Box(value, next(facts), tensors[position])
                places.append(box.address)
                new = [*map(ctypes.c_int32, value.shape), *map(ctypes.c_int64, value.strides)]
            elif kind.startswith("*"):
                new = [ctypes.c_uint64(tensors[position])]
                self._cells[position] = new[0]
            else:
                new = [CELLS[kind](value)]
            places += map(ctypes.addressof, new)
            self._values += new
        scratch = [ctypes.c_uint64(0), ctypes.c_uint64(0)]  # Triton's own memory, of which these kernels have none
        self._values += scratch
        places += map(ctypes.addressof, scratch)
        self.addresses = (ctypes.c_void_p * len(places))(*places)
        self.addresses.of = self._values, self._boxes  # type: ignore[attr-defined]  # live as long as their addresses

    def movable(self) -> tuple[list[Any], list[Box]]:
        """The cells of addresses, and the descriptors: what is written where the call is made on other tensors."""
        return list(self._cells.values()), list(self._boxes.values())
