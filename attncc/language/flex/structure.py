"""PyTorch's functions on shapes: indexing, moving elements, and small reductions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from attncc.language.flex import cells as ce
from attncc.language.flex.cells import Cell, cell
from attncc.language.flex.functions import elementwise
from attncc.language.flex.symbolic import Partial, Symbolic, cells_of, symbolic
from attncc.language.values import Value, fail


def move(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run a moving function on the numbers of the elements, and put the elements in their places."""
    cells: list[Cell] = []
    dtypes: list[torch.dtype] = []

    def numbered(x: Any) -> Any:
        if not isinstance(x, Symbolic):
            return x
        own = cells_of(x)
        start = len(cells)
        cells.extend(own.reshape(-1).tolist())
        dtypes.append(x.dtype)
        return torch.arange(start, start + own.size).reshape(own.shape)

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        found = np.empty(tuple(x.shape), dtype=object)
        for place in np.ndindex(*found.shape):
            found[place] = cells[int(x[place])]
        return Symbolic(found, functools.reduce(torch.promote_types, dtypes))

    with torch._C.DisableTorchFunction():
        result = func(*tree_map(numbered, args), **tree_map(numbered, kwargs))
        return tree_map(placed, result)


def getitem(x: Symbolic, index: Any) -> Symbolic:
    """x[index], where x or the index is symbolic."""
    items = index if isinstance(index, tuple) else (index,)
    items = tuple(i.item() if isinstance(i, np.generic) else i for i in items)
    if not any(isinstance(i, Symbolic) for i in items):
        if x.read is not None and all(type(i) is int for i in items):
            return _partial(x, [*items, *[None] * (x.dim() - len(items))])
        moved: Symbolic = move(lambda t: t[index], (_written(x),), {})
        return moved
    if x.read is None:
        fail(
            "what the function computed is indexed by something that varies from pair to pair",
            "index a captured tensor instead, or write the choice with torch.where",
        )
    if any(isinstance(i, Symbolic) and i.dtype.is_floating_point for i in items):
        fail("a tensor is indexed by a number with a fraction", "convert it: x.long(), torch.floor(x).long()")
    if any(isinstance(i, Symbolic) and i.dtype == torch.bool for i in items):
        fail(
            "a tensor is indexed by a condition: the size of the result depends on it",
            "write torch.where(condition, a, b)",
        )
    return _by_items(x, _full(items, x.dim()))


def _full(items: tuple[Any, ...], rank: int) -> list[Any]:
    """One item a dimension: an ellipsis and what is left out are whole dimensions."""
    for i in items:
        if not isinstance(i, Symbolic | int | slice | EllipsisType) or isinstance(i, bool):
            fail(f"indexing by {type(i).__name__} beside an index of the loop", "index in two steps: t[...][q_idx]")
    gap = rank - sum(i is not Ellipsis for i in items)
    if gap < 0:
        fail(f"{rank - gap} indices for a tensor of {rank} dimension{'s' * (rank != 1)}")
    full: list[Any] = []
    for i in items:
        full += [slice(None)] * gap if i is Ellipsis else [i]
    return full + [slice(None)] * (rank - len(full))


def _by_items(x: Symbolic, items: list[Any]) -> Symbolic:
    assert x.read is not None
    if any(isinstance(i, slice) and i != slice(None) for i in items):
        # the constant part first: a view of the tensor
        if any(i is not None for i in x.read.index):
            fail("a slice of a captured tensor that is indexed already", "slice first: t[:, 1:3][q_idx]")
        narrowed = x.read.narrow(tuple(i if isinstance(i, slice) else slice(None) for i in items))
        x = Symbolic(None, x.dtype, shape=narrowed.source.shape, read=narrowed)
        items = [slice(None) if isinstance(i, slice) else i for i in items]
    if all(i.dim() == 0 for i in items if isinstance(i, Symbolic)):
        return _partial(x, [None if isinstance(i, slice) else i for i in items])
    vectors = [cells_of(i) for i in items if isinstance(i, Symbolic)]
    places = np.broadcast_shapes(*(v.shape for v in vectors))
    leading = [isinstance(i, slice) for i in items]
    if leading != sorted(leading):
        fail("a vector of indices behind a whole dimension", "move that dimension to the end before")
    spread = [np.broadcast_to(cells_of(i), places) if isinstance(i, Symbolic) else i for i in items]
    found = np.empty(places, dtype=object)
    for place in np.ndindex(*places):
        at = [None if isinstance(i, slice) else i[place] if isinstance(i, np.ndarray) else i for i in spread]
        found[place] = cells_of(_partial(x, at))
    return symbolic(
        np.array(found.tolist(), dtype=object).reshape(*places, *x.shape[len(items) - sum(leading) :]), x.dtype
    )


def _partial(x: Symbolic, items: Sequence[Any]) -> Symbolic:
    """More dimensions of a captured tensor indexed; an element once all are."""
    read = x.read
    assert read is not None
    index = list(read.index)
    for axis, item in zip(read.free, items, strict=True):
        index[axis] = _index_value(item)
    known = Partial(read.source, index, read.element, read.narrow)
    shape = [read.source.shape[axis] for axis in known.free]
    if not shape:
        return symbolic(read.element(index), x.dtype)
    return Symbolic(None, x.dtype, shape=shape, read=known)


def _index_value(item: Any) -> Any:
    if item is None or isinstance(item, int):
        return item
    one: Any = item if isinstance(item, Cell) else cells_of(item)[()]
    value: Value = ce.number(ce.plain(lambda v: v, one).value)
    return value


def _written(x: Symbolic) -> Symbolic:
    return symbolic(cells_of(x), x.dtype)


def _folded(name: str) -> Callable[[np.ndarray], Cell]:
    found = elementwise(name)
    assert found is not None
    function = found[0]
    return lambda cells: functools.reduce(function, cells.tolist())


def _mean(cells: np.ndarray) -> Cell:
    return ce.divide(functools.reduce(ce.add, cells.tolist()), cell(cells.size))


def _sum(cells: np.ndarray) -> Cell:
    return functools.reduce(ce.add, cells.tolist(), cell(0))


def _norm(cells: np.ndarray) -> Cell:
    squares = functools.reduce(ce.add, [ce.multiply(c, c) for c in cells.tolist()])
    root = elementwise("sqrt")
    assert root is not None
    return root[0](squares)


_ALONG: dict[str, Callable[[np.ndarray], Cell]] = {
    "sum": _sum,
    "mean": _mean,
    "prod": _folded("mul"),
    "amax": _folded("maximum"),
    "amin": _folded("minimum"),
    "max": _folded("maximum"),
    "min": _folded("minimum"),
    "any": _folded("logical_or"),
    "all": _folded("logical_and"),
    "norm": _norm,
    "vector_norm": _norm,
    "linalg_vector_norm": _norm,
    "linalg_norm": _norm,
}
_DOTS = ("dot", "vdot", "inner", "matmul", "__matmul__", "mv", "mm", "bmm")
REDUCTIONS = frozenset((*_ALONG, *_DOTS))


def reduce(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """A reduction over elements, written out. `shape` is the result's, as PyTorch has it."""
    if name in _DOTS:
        return _product(cells_of(args[0]), cells_of(args[1]), shape)
    x = cells_of(args[0])
    second = args[1] if len(args) > 1 else kwargs.get("other")
    if name in ("max", "min") and isinstance(second, Symbolic):
        return each(_pairwise(name), x, cells_of(second))
    if "norm" in name:
        order = kwargs.pop("p", kwargs.pop("ord", None))
        order = args[1] if order is None and len(args) > 1 else order
        if order not in (None, 2, 2.0, "fro"):
            fail(f"{name} of order {order} is not part of the language", "order 2 is")
        dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
    else:
        dim = kwargs.get("dim", kwargs.get("axis", second))
    if name in ("max", "min") and dim is not None:
        fail(f"{name} over a dimension also gives indices", f"write a{name}")
    axes = range(x.ndim) if dim is None or dim == () else [dim] if isinstance(dim, int) else dim
    along = sorted({a % max(x.ndim, 1) for a in axes})
    kept = [a for a in range(x.ndim) if a not in along]
    rows = x.transpose(*kept, *along).reshape(*(x.shape[a] for a in kept), -1) if x.ndim else x.reshape(1)
    found = np.empty(rows.shape[:-1], dtype=object)
    for place in np.ndindex(*found.shape):
        found[place] = _ALONG[name](rows[place])
    return found.reshape(shape)


def _pairwise(name: str) -> Callable[..., Cell]:
    return ce.maximum if name == "max" else ce.minimum


def _product(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A matrix product, of vectors or matrices."""
    left = a.reshape(-1, a.shape[-1])
    right = b.reshape(b.shape[0], -1) if b.ndim < 3 else None
    if right is None or a.ndim > 2:
        fail("a product of batches of matrices is not part of the language", "multiply vectors: torch.dot(a, b)")
    found = np.empty((left.shape[0], right.shape[1]), dtype=object)
    for i, j in np.ndindex(*found.shape):
        found[i, j] = functools.reduce(ce.add, [ce.multiply(x, y) for x, y in zip(left[i], right[:, j], strict=True)])
    return found.reshape(shape)


def each(function: Callable[..., Cell], *args: Any, **kwargs: Any) -> np.ndarray:
    """A function of cells at every element of the arguments that are arrays, broadcast; others are passed as they
    are."""
    arrays = [x for x in (*args, *kwargs.values()) if isinstance(x, np.ndarray)]
    shape = np.broadcast_shapes(*(x.shape for x in arrays))
    if math.prod(shape) > 4096:
        fail(f"{math.prod(shape):,} elements are computed for every pair", "compute what is needed of them before")
    spread = [np.broadcast_to(x, shape) if isinstance(x, np.ndarray) else x for x in args]
    named = {k: np.broadcast_to(x, shape) if isinstance(x, np.ndarray) else x for k, x in kwargs.items()}
    found = np.empty(shape, dtype=object)
    for place in np.ndindex(*shape):
        found[place] = function(
            *(x[place] if isinstance(x, np.ndarray) else x for x in spread),
            **{k: x[place] if isinstance(x, np.ndarray) else x for k, x in named.items()},
        )
    return found
