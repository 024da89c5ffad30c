"""Tensors captured by a user's function: they become inputs, bound to the tensor itself at every call.

What the function computes from captured tensors alone (`torch.cumsum(w, 0)[q_idx]`) is recomputed at every call, so
that it follows a parameter through training and passes its gradient on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from attncc.errors import InputError
from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc
from attncc.ir.graph import InputDecl
from attncc.language.flex.cells import Cell
from attncc.language.places import outside_language
from attncc.language.stages import cannot_name
from attncc.language.values import Value, fail

#: what a dimension is called that is indexed by nothing but one index of the loop; it may be longer than the loop
_NAMED = {"b": "sequences", "h": "heads", "q_idx": "queries", "kv_idx": "keys"}
#: the function that calls the user's: whatever called that may use the same names for something else
TRACE = "trace_function"
#: a captured bias this small hides a pair, as minus infinity does
_HIDES = -3.0e38


@dataclass(frozen=True)
class Own:
    """A captured tensor itself. Data, no closure: a module is copied with the tensors that its op is bound to."""

    tensor: Tensor

    def __call__(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class Derived:
    """A tensor that the function computed from captured ones: how, so that a call can compute it again.

    Among the arguments are tensors while the function is traced, and sources in their place afterwards.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    item: int | None = None

    def __call__(self) -> Tensor:
        args, kwargs = tree_map(lambda x: x() if isinstance(x, Own | Derived) else x, (self.args, dict(self.kwargs)))
        result = self.function(*args, **kwargs)
        made: Tensor = result if self.item is None else result[self.item]
        return made


#: gives a captured tensor as it is at the time of the call
Source: TypeAlias = Own | Derived


@dataclass
class Capture:
    """One captured tensor: its name as an input, how the formula reads it, and what it held when it was traced."""

    name: str
    tensor: Tensor
    reads: dict[voc.Read, None] = field(default_factory=dict)
    nonnegative: bool = False
    hides: bool = False
    limits: Mapping[str, int] = field(default_factory=dict)


class Captures:
    """All captured tensors of one trace, by identity."""

    def __init__(self) -> None:
        self._derived: dict[int, Derived] = {}
        self._kept: list[Tensor] = []  # so that no identity is given twice
        self._captures: dict[int, Capture] = {}

    def computed(self, result: Any, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note how the tensors of `result` came about, inside the traced function."""
        if isinstance(result, Tensor):
            self._note(result, Derived(function, args, kwargs))
        elif isinstance(result, tuple | list):
            for number, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._note(part, Derived(function, args, kwargs, number))

    def _note(self, tensor: Tensor, derived: Derived) -> None:
        if not any(a is tensor for a in derived.args):  # a function may give its argument back
            self._derived[id(tensor)] = derived
            self._kept.append(tensor)

    def constant(self, tensor: Tensor) -> bool:
        """Whether it was created inside the function from Python numbers alone."""
        derived = self._derived.get(id(tensor))
        if derived is None:
            return False
        return all(self.constant(t) for t in _tensors((derived.args, dict(derived.kwargs))))

    def read(
        self, tensor: Tensor, index: Sequence[Any], name: str | None = None, limits: Mapping[str, int] | None = None
    ) -> Cell:
        """One element of a captured tensor, as the formula reads it.

        `limits`: the most entries that an index of the loop may have.
        """
        capture = self._capture(tensor, name)
        capture.limits = limits or capture.limits
        is_int = not tensor.dtype.is_floating_point
        symbol = sym.input_symbol(capture.name, is_int)
        exprs = [self._wrapped(i, size) for i, size in zip(index, tensor.shape, strict=True)]
        read = voc.Read(symbol, *exprs)
        capture.reads.setdefault(read)
        if tensor.dtype == torch.bool:
            return Cell(Value(sympy.Ne(read, 0)))
        return Cell(Value(read), sympy.Lt(read, _HIDES) if capture.hides else sympy.false)

    def _wrapped(self, index: Any, size: int) -> sympy.Expr:
        """An index as PyTorch has it: a negative one counts from the end."""
        if isinstance(index, int):
            if not -size <= index < size:
                fail(f"index {index} is out of bounds for a dimension of size {size}")
            return sympy.Integer(index % size)
        expr = index.expr
        counts = {r: sympy.Dummy(integer=True, nonnegative=True) for r in self._counts(expr)}
        if expr.xreplace(counts).is_nonnegative:
            return expr
        return voc.where(expr < 0, expr + size, expr)

    def _counts(self, expr: sympy.Expr) -> Iterator[voc.Read]:
        """The reads in an expression of tensors that held no negative number."""
        nonnegative = {c.name for c in self._captures.values() if c.nonnegative}
        return (read for read in expr.atoms(voc.Read) if read.input in nonnegative)

    def _capture(self, tensor: Tensor, name: str | None = None) -> Capture:
        found = self._captures.get(id(tensor))
        if found is None:
            if tensor.is_complex():
                fail("a captured tensor is complex", "capture its real and imaginary parts")
            found = self._captures[id(tensor)] = Capture(self._name(tensor, name), tensor)
            values = tensor.detach()
            if tensor.dtype.is_floating_point:
                found.hides = bool(torch.isneginf(values).any())
            else:
                found.nonnegative = tensor.dtype == torch.bool or not bool((values < 0).any())
            self._kept.append(tensor)
        return found

    def _name(self, tensor: Tensor, given: str | None) -> str:
        taken = {c.name for c in self._captures.values()}
        derived = self._derived.get(id(tensor))
        computed = derived.function.__name__.strip("_") if derived else None
        name = given or _name_in_frames(tensor) or computed or "captured"
        if cannot_name(name):
            name = f"{name}_" if name.isidentifier() else "captured"
        number, unique = 1, name
        while unique in taken or cannot_name(unique):
            number, unique = number + 1, f"{name}_{number}"
        return unique

    def declarations(self, used: set[str]) -> dict[str, InputDecl]:
        """The inputs of the variant: every captured tensor whose name is in `used`."""
        decls = {}
        for capture in self._captures.values():
            if capture.name in used:
                tensor = capture.tensor
                reads = [r for r in capture.reads if len(r.index) == tensor.dim()]
                dims = [_dimension(axis, [r.index[axis] for r in reads]) for axis in range(tensor.dim())]
                decls[capture.name] = InputDecl(
                    capture.name,
                    tuple(name for name, _ in dims),
                    "float" if tensor.dtype.is_floating_point else "int",
                    tensor.dtype.is_floating_point and tensor.requires_grad,
                    Bound(capture.name, self._source(tensor), tuple(loop for _, loop in dims), capture.limits),
                    captured=True,
                )
        return decls

    def _source(self, tensor: Tensor) -> Source:
        """A function that returns the current tensor."""
        derived = self._derived.get(id(tensor))
        if derived is None:
            return Own(tensor)
        args, kwargs = tree_map(
            lambda x: self._source(x) if isinstance(x, Tensor) else x, (derived.args, dict(derived.kwargs))
        )
        return Derived(derived.function, args, kwargs, derived.item)


@dataclass(frozen=True)
class Bound:
    """The default of a captured input: the user's own tensor, with its gradient.

    `loops` names, for each dimension, the indices of the loop that it is read at as they are: the tensor may be longer
    than the loop, as a table for the longest sequence is, but not shorter. `limits` has the most entries of a loop that
    the tensor was made for.
    """

    name: str
    make: Source
    loops: tuple[frozenset[str], ...]
    limits: Mapping[str, int]

    def __call__(self, sizes: Mapping[str, int]) -> Tensor:
        """The tensor, booleans as integers. Raises InputError where the call reads beyond it."""
        tensor = self.make()
        for axis, (loops, size) in enumerate(zip(self.loops, tensor.shape, strict=True)):
            for loop in sorted(loops):
                if size < sizes[loop]:
                    raise InputError(
                        f"dimension {axis} of the captured tensor '{self.name}' has size {size}, but is read at every "
                        f"{loop}, of which there are {sizes[loop]}",
                        remedy=f"capture a longer tensor, or pass {self.name}=...",
                    )
        for loop, most in self.limits.items():
            if sizes[loop] > most:
                raise InputError(
                    f"'{self.name}' was made for {most} entries of {loop}, and is called with {sizes[loop]}",
                    remedy=f"make it for the lengths of the call, or pass {self.name}=...",
                )
        return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def _dimension(axis: int, indices: list[sympy.Expr]) -> tuple[str, frozenset[str]]:
    """The name of a dimension, and the loop indices at which it is read directly."""
    names = [i.name if isinstance(i, sympy.Symbol) and i.name in _NAMED else None for i in indices]
    plain = frozenset(n for n in names if n is not None)
    if None in names or not plain:
        return f"dim_{axis}", plain
    if len(plain) == 1:
        return _NAMED[next(iter(plain))], plain
    return "positions" if plain == {"q_idx", "kv_idx"} else f"dim_{axis}", plain


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda x: found.append(x) if isinstance(x, Tensor) else None, tree)
    return found


def _name_in_frames(tensor: Tensor) -> str | None:
    """The name in the user's code: of a variable, an element of a list, or an attribute; inner functions first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if outside_language(frame.f_globals.get("__name__", "")):
            for name in _names_in(frame.f_locals, tensor):
                return name
            for name in _names_in({n: frame.f_globals.get(n) for n in frame.f_code.co_names}, tensor):
                return name
        elif frame.f_code.co_name == TRACE:
            return None
        frame = frame.f_back
    return None


def _names_in(variables: Mapping[str, Any], tensor: Tensor) -> Iterator[str]:
    for name, value in variables.items():
        if isinstance(value, list | tuple):
            # a list says more than the variable of the loop over it
            yield from (f"{name}_{n}" for n, part in enumerate(value) if part is tensor)
    for name, value in variables.items():
        if value is tensor:
            yield name
        elif isinstance(value, dict):
            yield from (f"{name}_{key}" for key, part in value.items() if part is tensor)
    for value in variables.values():
        if isinstance(value, torch.nn.Module):
            named = (*value.named_parameters(), *value.named_buffers())
            yield from (name.replace(".", "_") for name, part in named if part is tensor)
        elif hasattr(value, "__dict__") and not isinstance(value, Tensor | type):
            yield from (name for name, part in vars(value).items() if part is tensor)
