"""What a kernel on the model of `machine` computes with: registers, addresses, descriptors, shared memory, barriers."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class MachineError(Exception):
    """A kernel did what would go wrong on a GPU."""


class Type:
    """An element type."""

    def __init__(self, name: str, of: torch.dtype):
        self.name, self.torch = name, of
        self.primitive_bitwidth = of.itemsize * 8

    def __repr__(self) -> str:
        return self.name


_NAMES = ("float16", "bfloat16", "float32", "int8", "int16", "int32", "int64")
TYPES = {name: Type(name, getattr(torch, name)) for name in _NAMES}
OF = {t.torch: t for t in TYPES.values()} | {torch.bool: Type("int1", torch.bool)}


class Block:
    """A tensor in registers, or a scalar. Integers divide as C's do."""

    def __init__(self, value: Any):
        self.v = value if isinstance(value, Tensor) else torch.as_tensor(value)

    @property
    def dtype(self) -> Type:
        return OF[self.v.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.v.shape)

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=None)

    def to(self, kind: Type) -> Block:
        return Block(self.v.to(kind.torch))

    def reshape(self, shape: Sequence[int]) -> Block:
        return Block(self.v.reshape(*shape))

    def permute(self, order: Sequence[int]) -> Block:
        return Block(self.v.permute(*order))

    def split(self) -> tuple[Block, Block]:
        left, right = self.v.unbind(-1)
        return Block(left), Block(right)

    def __getitem__(self, index: Any) -> Block:
        return Block(self.v[index])

    def __index__(self) -> int:
        return int(self.v)

    __int__ = __index__

    def __bool__(self) -> bool:
        return bool(self.v)

    def __invert__(self) -> Block:
        return Block(~self.v)

    def __neg__(self) -> Block:
        return Block(-self.v)


class Loaded(Block):
    """What a thread loads from shared memory, which is there for sure when something uses it. `late`: a copy was issued
    to that place before."""

    def __init__(self, value: Tensor):
        self.used = self.late = False
        self._value = value

    @property
    def v(self) -> Tensor:  # type: ignore[override]
        if self.late:
            raise MachineError("a copy is issued to where a load may still read")
        self.used = True
        return self._value


def plain(x: Any) -> Any:
    """The tensor or number that an operand stands for."""
    if isinstance(x, Pending):
        raise MachineError("a matmul's result is used before it is waited for")
    return x.v if isinstance(x, Block) else x


def _binary(name: str, function: Callable[[Any, Any], Any]) -> None:
    def forward(self: Block, other: Any) -> Any:
        return NotImplemented if isinstance(other, Pointer) else Block(function(plain(self), plain(other)))

    setattr(Block, f"__{name}__", forward)
    setattr(Block, f"__r{name}__", lambda self, other: Block(function(torch.as_tensor(plain(other)), self.v)))


for _name, _function in {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "truediv": lambda a, b: a / b,
    "floordiv": lambda a, b: torch.div(torch.as_tensor(a), b, rounding_mode="trunc"),
    "mod": lambda a, b: torch.fmod(torch.as_tensor(a), b),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "rshift": lambda a, b: a >> b,
    "lshift": lambda a, b: a << b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}.items():
    _binary(_name, _function)


class Pointer:
    """An address in a tensor's memory, or a block of them."""

    def __init__(self, memory: Tensor, offset: Any):
        self.memory, self.offset = memory, offset

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=OF[self.memory.dtype])

    @classmethod
    def to(cls, x: Tensor) -> Pointer:
        count = x.untyped_storage().nbytes() // x.element_size()
        return cls(torch.as_strided(x, (count,), (1,), 0), x.storage_offset())

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, torch.as_tensor(self.offset) + plain(other))

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.memory, torch.as_tensor(self.offset)[index])

    @property
    def shape(self) -> torch.Size:
        return torch.as_tensor(self.offset).shape

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        at = torch.as_tensor(self.offset).to(torch.int64)
        shown = torch.as_tensor(True if mask is None else plain(mask))
        at, shown = torch.broadcast_tensors(at, shown)
        if bool(((at < 0) | (at >= len(self.memory)))[shown].any()):
            raise MachineError("an access outside of a tensor's memory")
        return at, shown


class Box:
    """A tensor descriptor: copies of `block` of a tensor (...,), zeros where that lies outside."""

    def __init__(self, base: Tensor, shape: list[int], strides: list[int], block: list[int], layout: Any):
        size = base.element_size()
        if any(s * size % 16 or s <= 0 for s in strides[:-1]) or strides[-1] != 1 or max(block) > 256:
            raise MachineError(f"no descriptor can have strides {strides} and boxes of {block}")
        self.view = torch.as_strided(base, shape, strides)
        self.base, self.shape, self.strides, self.block_shape, self.layout = base, shape, strides, block, layout
        self.dtype = OF[base.dtype]
        self.block_type = SimpleNamespace(nbytes=math.prod(block) * size)

    def part(self, at: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
        """What lies inside the tensor of the box that starts at `at`, and where it lies in the box."""
        inner, place = [], []
        for start, length, size in zip(at, self.block_shape, self.shape, strict=True):
            if start < 0:
                raise MachineError(f"a box that starts at {list(at)}")
            inside = max(min(length, size - start), 0)
            inner.append(slice(start, start + inside))
            place.append(slice(0, inside))
        return self.view[tuple(inner)], tuple(place)


class Memory:
    """An allocation of shared memory: who wrote it with no fence since, and loads from it that may be on their way."""

    def __init__(self) -> None:
        self.unfenced: set[threading.Thread] = set()
        self.loads: list[tuple[tuple[int, int], Loaded]] = []

    def load(self, view: Tensor) -> Loaded:
        found = Loaded(view.clone())
        self.loads = [*((places, x) for places, x in self.loads if not x.used), (_places(view), found)]
        return found

    def copied_to(self, view: Tensor) -> None:
        """A copy to this is issued: loads of a part of it that may still be on their way are late."""
        low, high = _places(view)
        for (first, last), found in self.loads:
            found.late |= not found.used and first < high and low < last


def _places(view: Tensor) -> tuple[int, int]:
    """The addresses between which a view lies."""
    last = sum((n - 1) * step for n, step in zip(view.shape, view.stride(), strict=True))
    return view.data_ptr(), view.data_ptr() + (last + 1) * view.element_size()


class Shared:
    """A view of shared memory."""

    def __init__(self, view: Tensor, memory: Memory):
        self.view, self.memory = view, memory
        self.dtype = OF[view.dtype]

    def index(self, i: Any) -> Shared:
        return Shared(self.view[int(i)], self.memory)

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.view.view(*shape), self.memory)

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.view.permute(*order), self.memory)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        if not 0 <= start <= start + length <= self.view.shape[dim]:
            raise MachineError(f"a slice {start}, {length} of {tuple(self.view.shape)}")
        return Shared(self.view.narrow(dim, start, length), self.memory)

    def load(self, layout: Any = None) -> Block:
        return self.memory.load(self.view)

    def store(self, block: Block) -> None:
        if block.v.shape != self.view.shape:
            raise MachineError(f"a store of {tuple(block.v.shape)} to {tuple(self.view.shape)}")
        self.view.copy_(block.v)
        self.memory.unfenced.add(threading.current_thread())

    def asynchronous(self) -> Tensor:
        """The view, for a unit that does not see what threads wrote before a fence."""
        if self.memory.unfenced:
            raise MachineError("the asynchronous units read what was written with no fence since")
        return self.view


class Barrier:
    """An mbarrier."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0
        self.retired = False

    def arrive(self, count: int = 1, expected: int = 0) -> None:
        if self.retired:
            raise MachineError("an arrival at a barrier that is retired")
        self.pending -= count
        self.bytes += expected
        if self.pending < 0:
            raise MachineError("more arrivals at a barrier than it counts")
        self._turn()

    def copied(self, count: int) -> None:
        self.bytes -= count
        self._turn()

    def _turn(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.count, self.phase + 1


class Barriers:
    """An array of them."""

    def __init__(self, count: int):
        self.all = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]


class Pending:
    """An accumulator of matmuls that are under way."""

    def __init__(self, shape: torch.Size):
        self.shape = shape
        self.value: Tensor | None = None
