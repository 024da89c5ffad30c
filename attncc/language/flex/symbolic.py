"""The tensor that stands for score, b, h, q_idx or kv_idx while a user's function is traced. Its elements are
expressions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from attncc.language.flex.cells import Cell
from attncc.language.values import fail

#: how many elements of a tensor are written out one by one; a kernel holds each in registers
MOST_ELEMENTS = 256


class Symbolic(torch.Tensor):
    """A tensor of cells. Shape and dtype are PyTorch's own; there is no storage.

    A tensor that captures a user's whole rows, `bias[b, h]`, writes its elements out when they are used and not before:
    `read` makes them then, and `index` keeps what is indexed so far.
    """

    _cells: np.ndarray | None
    read: Partial | None

    @staticmethod
    def __new__(
        cls: type[Symbolic],
        cells: np.ndarray | None,
        dtype: torch.dtype,
        *,
        shape: Sequence[int] | None = None,
        read: Partial | None = None,
    ) -> Symbolic:
        size = tuple(cells.shape if cells is not None else shape or ())
        self = torch.Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=torch.device("cpu"))
        self._cells, self.read = cells, read
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<{self.read.source.shape} read at {self.read.index}>" if self.read else str(self._cells)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        fail(
            f"{func} does not go through the functions that FlexAttention traces, or runs after the trace",
            "use PyTorch's own functions inside the score_mod or mask_mod alone",
        )


class Partial:
    """A captured tensor with some dimensions indexed: one entry a dimension, None where it is not indexed yet.

    `element` reads one element, given an index for every dimension; `narrow` is the same for a view by constant slices.
    """

    def __init__(
        self,
        source: torch.Tensor,
        index: Sequence[Any],
        element: Callable[[Sequence[Any]], Cell],
        narrow: Callable[[tuple[slice, ...]], Partial],
    ):
        self.source, self.index, self.element, self.narrow = source, tuple(index), element, narrow

    @property
    def free(self) -> list[int]:
        """The dimensions that are not indexed."""
        return [axis for axis, i in enumerate(self.index) if i is None]

    def cells(self) -> np.ndarray:
        """Every element that is left, written out."""
        shape = [self.source.shape[axis] for axis in self.free]
        if math.prod(shape) > MOST_ELEMENTS:
            fail(
                f"{math.prod(shape):,} elements of a captured tensor of shape {tuple(self.source.shape)} are used at "
                "once for every pair",
                "index all of its dimensions, or compute what is needed of them before",
            )
        found = np.empty(shape, dtype=object)
        for place in np.ndindex(*shape):
            index = list(self.index)
            for axis, i in zip(self.free, place, strict=True):
                index[axis] = i
            found[place] = self.element(index)
        return found


def symbolic(cells: Any, dtype: torch.dtype) -> Symbolic:
    """A tensor of these cells (an array, or one cell)."""
    if isinstance(cells, Cell):
        array = np.empty((), dtype=object)
        array[()] = cells
        cells = array
    return Symbolic(cells, dtype)


def cells_of(x: Symbolic) -> np.ndarray:
    """The elements as an array of cells."""
    if x._cells is None:
        assert x.read is not None
        x._cells = x.read.cells()
    return x._cells
