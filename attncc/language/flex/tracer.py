"""Run a user's score_mod or mask_mod on symbolic tensors, and intercept every PyTorch function that it calls.

A function of ordinary tensors is executed, and recorded so that each call of the op can repeat it. For a function of
symbolic tensors, shape, dtype and errors come from PyTorch (on meta tensors), and the elements from the tables in
`functions` and `structure`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map

from attncc.errors import AttnccError
from attncc.ir import symbols as sym
from attncc.language.flex.captures import Captures
from attncc.language.flex.cells import Cell, cell
from attncc.language.flex.functions import converted, elementwise
from attncc.language.flex.names import (
    ATTRIBUTES,
    CASTS,
    FACTS,
    MOVES,
    NAMESPACES,
    NEW,
    RANDOM,
    SAME,
    VALUES,
    in_place,
)
from attncc.language.flex.structure import REDUCTIONS, each, getitem, move, reduce
from attncc.language.flex.symbolic import MOST_ELEMENTS, Partial, Symbolic, cells_of, symbolic
from attncc.language.values import Value, fail


class Tracer(TorchFunctionMode):
    """While this is open, PyTorch's functions work on symbolic tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.captures = Captures()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """One call of PyTorch inside the user's function."""
        kwargs = dict(kwargs or {})
        name = _name(func)
        if name in RANDOM:
            fail(f"{name} is random", "draw the numbers before, and index the tensor by what each depends on")
        if in_place(name) or kwargs.get("inplace") or kwargs.get("out") is not None:
            fail(f"{name} works in place", "make a new value in every step: x = x + y, not x += y or x.add_(y)")
        try:
            if tree_any(lambda x: isinstance(x, Symbolic), (args, kwargs)):
                return self._symbolic(name, func, args, kwargs)
            return self._native(name, func, args, kwargs)
        except (AttnccError, AttributeError):
            raise
        except Exception as error:  # PyTorch's own complaint, at the user's line
            fail(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")

    def lifted(self, x: Tensor) -> Symbolic:
        """A captured or constant tensor as a symbolic one."""
        return symbolic(self._cells(x), x.dtype)

    def _native(self, name: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A function of captured tensors."""
        if name in VALUES and not all(self.captures.constant(a) for a in args if isinstance(a, Tensor)):
            fail(
                f"{name.strip('_')} of a captured tensor would be fixed when the function is read",
                "read the number before, outside of the function",
            )
        result = func(*args, **kwargs)
        if name not in FACTS and name not in VALUES:
            self.captures.computed(result, func, args, kwargs)
        return result

    def _symbolic(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in FACTS or (name in ATTRIBUTES and func.__name__ == "__get__"):
            with torch._C.DisableTorchFunction():
                return func(*args, **kwargs)
        if name in ("__repr__", "__format__", "__str__"):
            return str(cells_of(args[0]).tolist())
        if name in ("__bool__", "__contains__"):
            fail(
                "a branch in Python depends on an index or the score, which have no value while the function is read",
                "write torch.where(condition, a, b), torch.maximum and torch.minimum, and & | ~ for and, or, not",
            )
        if name in VALUES:
            fail(
                f"{name.strip('_')} of an index or the score, which have no value while the function is read",
                "keep it a tensor; what is indexed by it must be a tensor, too",
            )
        if name == "__getitem__":
            return getitem(self._lazy(args[0]), args[1])
        if name == "embedding":
            return getitem(self._lazy(args[1]), args[0])
        if name in NEW:
            return self._new(name, func, args, kwargs)
        if name == "__iter__":
            return iter(move(torch.Tensor.unbind, (args[0],), {}))
        if name in SAME:
            return args[0]
        if name == "detach" and not args[0].dtype.is_floating_point:
            return args[0]
        if name in ("eq", "__eq__", "ne", "__ne__") and args[1] is None:
            return name.strip("_") == "ne"
        return self._computed(name, func, args, kwargs)

    def _computed(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function of elements: what it moves, sums up, or computes from each."""
        if name in MOVES:
            args, kwargs = tree_map(lambda x: self._lazy(x) if isinstance(x, Tensor) else x, (args, kwargs))
            return move(func, args, kwargs)
        found = elementwise(name)
        if found is None and name not in CASTS and name not in REDUCTIONS:
            fail(
                f"{name} of an index or the score is not part of the language",
                "apply it to captured tensors before they are indexed, or write it with arithmetic, torch.where, "
                "torch.exp and the like",
            )
        like = _without_data(func, args, kwargs)
        if name in CASTS:
            return self._cast(args[0], like.dtype)
        if found is None:
            args, kwargs = tree_map(lambda x: self._lazy(x) if isinstance(x, Tensor) else x, (args, kwargs))
            return _made(reduce(name, args, kwargs, tuple(like.shape)), like.dtype)
        function, count = found
        if func is torch.Tensor.where:
            args = (args[1], args[0], *args[2:])
        # what PyTorch calls the first operands may be named
        named = {k: x for k, x in kwargs.items() if x is not None and k not in ("inplace", "dtype")}
        args = (*args, *(named.pop(k) for k in ("input", "self", "other", "exponent") if k in named))
        operands: list[Any] = [self._cells(x) if x is not None else None for x in args[:count]]
        if count is None:
            named = {k: self._cells(x) for k, x in named.items()}
        else:
            operands += args[count:]
        return _made(each(function, *operands, **named), like.dtype)

    def _cast(self, x: Symbolic, dtype: torch.dtype) -> Symbolic:
        return x if x.dtype == dtype else _made(cells_of(x), dtype)

    def _new(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A constant tensor, shaped like a symbolic one or as asked for."""
        like = _without_data(func, args, kwargs)
        value: Any = NEW[name]
        if value is None:
            value = kwargs.get("fill_value", kwargs.get("data", args[-1]))
        if isinstance(value, Tensor):
            value = self._cells(value)[()]
        return _made(np.full(tuple(like.shape), cell(value), dtype=object), like.dtype)

    def _lazy(self, x: Tensor) -> Symbolic:
        """A tensor as a symbolic one, of which nothing is read yet."""
        if isinstance(x, Symbolic):
            return x
        if x.dim() == 0:
            return symbolic(self._cells(x), x.dtype)
        return Symbolic(None, x.dtype, shape=x.shape, read=self._whole(x))

    def _whole(self, x: Tensor) -> Partial:
        def narrow(index: tuple[slice, ...]) -> Partial:
            return self._whole(self._native("__getitem__", torch.Tensor.__getitem__, (x, index), {}))

        return Partial(x, [None] * x.dim(), lambda index: self.captures.read(x, index), narrow)

    def _cells(self, x: Any) -> np.ndarray:
        """An operand's elements."""
        if isinstance(x, Symbolic):
            return cells_of(x)
        if not isinstance(x, Tensor):
            one = np.empty((), dtype=object)
            one[()] = cell(x.item() if isinstance(x, np.generic) else x)
            return one
        if self.captures.constant(x) and x.numel() <= MOST_ELEMENTS:
            numbers = np.empty(tuple(x.shape), dtype=object)
            for place in np.ndindex(*numbers.shape):
                numbers[place] = cell(x[place].item())
            return numbers
        if x.dim() == 0:
            one = np.empty((), dtype=object)
            one[()] = self.captures.read(x, ())
            return one
        return cells_of(self._lazy(x))


def arguments(score: bool) -> list[Symbolic]:
    """(score,) b, h, q_idx, kv_idx as a user's function gets them."""
    found = [symbolic(Cell(Value(s)), torch.int32) for s in (sym.B, sym.H, sym.Q_IDX, sym.KV_IDX)]
    return [symbolic(Cell(Value(sym.RAW_SCORE)), torch.float32), *found] if score else found


def _name(func: Any) -> str:
    """A function's name, as the tables have it: that of an attribute, or of an operator without its overload."""
    name = getattr(func, "__name__", type(func).__name__)
    if name in ("__get__", "__set__"):
        attribute = getattr(func.__self__, "__name__", name)
        return attribute if name == "__get__" else f"{attribute}_"
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        qualified = func._qualified_op_name if isinstance(func, torch._ops.OpOverloadPacket) else func.name()
        space, _, own = qualified.partition("::")
        if space not in NAMESPACES:
            fail(f"the operator {qualified} is not PyTorch's own", "write it with PyTorch's functions")
        return own.partition(".")[0]
    return str(name)


def _without_data(func: Any, args: Any, kwargs: Any) -> Tensor:
    """The result's shape and dtype: the function itself, on tensors that have no data."""

    def bare(x: Any) -> Any:
        return torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x

    options = {k: x for k, x in kwargs.items() if k != "device"}
    with torch._C.DisableTorchFunction():
        result = func(*tree_map(bare, args), **tree_map(bare, options))
    if not isinstance(result, Tensor):
        fail(f"{_name(func)} gives {type(result).__name__}, not a tensor")
    return result


def _made(cells: np.ndarray, dtype: torch.dtype) -> Symbolic:
    kind = "bool" if dtype == torch.bool else "float" if dtype.is_floating_point else "int"
    found = np.empty(cells.shape, dtype=object)
    for place in np.ndindex(*found.shape):
        one: Any = cells[place]
        found[place] = converted(one, kind)
    return Symbolic(found, dtype)
