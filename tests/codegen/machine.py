"""Gluon kernels for Hopper on a CPU: the text of a generated kernel runs as plain Python, on a model of the machine.

Gluon has no interpreter, and what goes wrong in these kernels is seldom arithmetic: a buffer that is refilled while a
matmul still reads it, a barrier that is waited for in the wrong phase, a fence that is missing. So the model is of what
is asynchronous. Every partition of warps is a thread, one of which runs at a time; at every barrier chance says which
goes on. Copies and matmuls take place at a random moment between their issue and the wait for them, a warpgroup's
matmuls in their order. A tile that is stored is read first, and lies in memory for sure when that was waited for.
Shared memory begins as NaN. Reading a result that was not waited for, writing by threads what the asynchronous units
read with no fence in between, telling others of a store that is still on its way, and waiting for ever are errors.

Layouts are not modelled, nor registers, nor the threads within a warpgroup; `cross_compile` has a say in those.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attncc.codegen.module import load_source
from attncc.runtime import interpreter


class MachineError(Exception):
    """A kernel did what would go wrong on a GPU."""


class Type:
    """An element type."""

    def __init__(self, name: str, of: torch.dtype):
        self.name, self.torch = name, of
        self.primitive_bitwidth = of.itemsize * 8

    def __repr__(self) -> str:
        return self.name


_TYPES = ("float16", "bfloat16", "float32", "int8", "int32", "int64")
TYPES = {name: Type(name, getattr(torch, name)) for name in _TYPES}
_OF = {t.torch: t for t in TYPES.values()} | {torch.bool: Type("int1", torch.bool)}


class Block:
    """A tensor in registers, or a scalar. Integers divide as C's do."""

    def __init__(self, value: Any):
        self.v = value if isinstance(value, Tensor) else torch.as_tensor(value)

    @property
    def dtype(self) -> Type:
        return _OF[self.v.dtype]

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


def _value(x: Any) -> Any:
    if isinstance(x, Pending):
        raise MachineError("a matmul's result is used before it is waited for")
    return x.v if isinstance(x, Block) else x


def _binary(name: str, function: Callable[[Any, Any], Any]) -> None:
    def forward(self: Block, other: Any) -> Any:
        return NotImplemented if isinstance(other, Pointer) else Block(function(_value(self), _value(other)))

    setattr(Block, f"__{name}__", forward)
    setattr(Block, f"__r{name}__", lambda self, other: Block(function(torch.as_tensor(_value(other)), self.v)))


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
        return SimpleNamespace(element_ty=_OF[self.memory.dtype])

    @classmethod
    def to(cls, x: Tensor) -> Pointer:
        count = x.untyped_storage().nbytes() // x.element_size()
        return cls(torch.as_strided(x, (count,), (1,), 0), x.storage_offset())

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, torch.as_tensor(self.offset) + _value(other))

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.memory, torch.as_tensor(self.offset)[index])

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        at = torch.as_tensor(self.offset).to(torch.int64)
        shown = torch.as_tensor(True if mask is None else _value(mask))
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
        self.dtype = _OF[base.dtype]
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


class Shared:
    """A view of shared memory. `memory` knows who wrote it with no fence since."""

    def __init__(self, view: Tensor, memory: Any):
        self.view, self.memory = view, memory
        self.dtype = _OF[view.dtype]

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
        return Block(self.view.clone())

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

    def arrive(self, count: int = 1, expected: int = 0) -> None:
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


class Partition:
    """A thread, the matmuls and the stores that it has under way; of those, what was read is `landing`. `acquired`: was
    it told of what others had stored, with no fence since that the asynchronous units heed?"""

    def __init__(self, thread: threading.Thread):
        self.thread = thread
        self.matmuls: list[Callable[[], None]] = []
        self.stores: list[Callable[[], None]] = []
        self.landing: list[Callable[[], None]] = []  # stores that have read their tile
        self.acquired = False
        self.until: Callable[[], bool] | None = None
        self.done = False
        self.rank = 0.0
        self.go = threading.Semaphore(0)


class Program:
    """One program of a launch: its partitions, and what is under way."""

    def __init__(self, number: int, count: int, seed: int):
        self.number, self.count = number, count
        self.random = random.Random(seed)
        # each program has a temper: what is early or late in it, and which partitions come first
        self.early = {kind: self.random.choice((0.0, 0.3, 0.9)) for kind in ("copies", "matmuls", "stores")}
        self.partial = self.random.random() < 0.6
        self.overtaking = self.random.random() < 0.6  # is the last copy there first, when all wait?
        self.copies: list[Callable[[], None]] = []
        self.memories: list[Any] = []
        self.partitions: list[Partition] = []
        self.error: BaseException | None = None
        self.asked = 0

    @property
    def own(self) -> Partition:
        return next(p for p in self.partitions if p.thread is threading.current_thread())

    def run(self, function: Callable[..., Any], args: Sequence[Any]) -> None:
        """Run a kernel's own body, and what it specializes warps for."""
        (first,) = self._add([(function, args)])
        first.go.release()
        for p in self.partitions:  # it grows meanwhile
            p.thread.join()
        if self.error is not None:
            raise self.error
        if any(p.matmuls or p.stores for p in self.partitions):
            raise MachineError("a matmul or a store of a tile is never waited for")
        for p in self.partitions:
            _land(p)

    def specialize(self, functions: Sequence[tuple[Callable[..., Any], Sequence[Any]]]) -> None:
        """Start partitions, and wait for their end."""
        started = self._add(functions)
        self.wait(lambda: all(p.done for p in started))

    def _add(self, functions: Sequence[tuple[Callable[..., Any], Sequence[Any]]]) -> list[Partition]:
        started = []
        for function, args in functions:
            started.append(Partition(threading.Thread(target=self._body, args=(function, args), daemon=True)))
            started[-1].rank = self.random.random()
        self.partitions += started
        for p in started:
            p.thread.start()
        return started

    def _body(self, function: Callable[..., Any], args: Sequence[Any]) -> None:
        me = self.own
        me.go.acquire()
        try:
            if self.error is None:
                function(*args)
        except BaseException as error:
            self.error = self.error or error
        me.done = True
        chosen = self._choose()
        if chosen is not None:
            chosen.go.release()

    def wait(self, until: Callable[[], bool]) -> None:
        """Let others run until the condition holds."""
        me = self.own
        me.until = until
        chosen = self._choose()
        if chosen is not me:
            if chosen is not None:
                chosen.go.release()
            me.go.acquire()
        me.until = None
        if self.error is not None:
            raise MachineError("another partition failed")

    def _choose(self) -> Partition | None:
        """Let what is under way happen, as chance has it, and say whose turn it is; nobody's, and everybody goes on,
        where something failed."""
        while self.error is None:
            self._happen()
            ready = [p for p in self.partitions if not p.done and (p.until is None or p.until())]
            if ready:
                return max(ready, key=lambda p: p.rank) if self.partial else self.random.choice(ready)
            if all(p.done for p in self.partitions):
                return None
            if self.copies:
                self.copies.pop(-1 if self.overtaking else self.random.randrange(len(self.copies)))()
            else:
                self.error = MachineError("every partition waits, and nothing is under way")
        for p in self.partitions:
            p.go.release()
        return None

    def _happen(self) -> None:
        """Some of what is under way happens, a partition's matmuls and its stores in their order."""
        queues = [("copies", self.copies)]
        queues += [
            (kind, queue)
            for p in self.partitions
            for kind, queue in (("matmuls", p.matmuls), ("stores", p.stores), ("stores", p.landing))
        ]
        for kind, queue in queues:
            while queue and self.random.random() < self.early[kind]:
                queue.pop(self.random.randrange(len(queue)) if queue is self.copies else 0)()


_program: Program | None = None


def _current() -> Program:
    assert _program is not None
    return _program


class Kernel:
    """What `gluon.jit` makes."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.__name__ = function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def launch(self, grid: int, args: Sequence[Any], meta: dict[str, Any], seed: int) -> None:
        """Run all programs, one after the other in a random order; in that of their numbers where they take turns."""
        global _program
        names = self.function.__code__.co_varnames[: self.function.__code__.co_argcount]
        constants = {name: value for name, value in meta.items() if name in names}
        given = [
            Pointer.to(a) if isinstance(a, Tensor) else Block(a) if isinstance(a, int | float) else a for a in args
        ]
        bound = [*given, *(constants[name] for name in names[len(given) :])]
        order = list(range(grid))
        if not meta.get("ORDERED"):
            random.Random(seed).shuffle(order)
        for number in order:
            _program = Program(number, grid, seed * 1009 + number)
            _program.run(self.function, bound)


def _jit(function: Any = None, **_: Any) -> Any:
    return Kernel(function) if function is not None else Kernel


def _elementwise(function: Callable[..., Any]) -> Callable[..., Block]:
    return lambda *args, **_: Block(function(*(torch.as_tensor(_value(a)) for a in args)))


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Block:
    at, shown = pointer.places(mask)
    return Block(torch.where(shown, pointer.memory[torch.where(shown, at, 0)], other))


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    at, shown = pointer.places(mask)
    value = torch.as_tensor(_value(value)).to(pointer.memory.dtype).broadcast_to(at.shape)
    pointer.memory[at[shown]] = value[shown]


def _atomic(change: Callable[..., Any]) -> Callable[..., Block]:
    """An atomic operation: `change` makes what is stored from what was there and the operation's arguments."""

    def atomic(pointer: Pointer, *args: Any, mask: Any = None, sem: str = "relaxed") -> Block:
        program = _current()
        if sem == "release" and program.own.landing:
            raise MachineError("others are told of a store that is still on its way")
        if sem == "acquire":  # in a loop, and those before have ended
            program.own.acquired = True
            program.asked += 1
            if program.asked > _PATIENCE:
                raise MachineError("a turn that never comes")
        before = _load(pointer, mask)
        _store(pointer, change(before, *args), mask)
        return before

    return atomic


_PATIENCE = 1000  # tiles of a program, and more


def _assembly(text: str, constraints: str, args: Sequence[Any], **_: Any) -> Any:
    if text.startswith("tanh"):
        return Block(torch.tanh(args[0].v))
    if text.startswith("rcp"):
        return Block(1 / args[0].v)
    if text.startswith("cp.async.bulk.wait_group 0;"):
        _land(_current().own)
    if text.startswith("fence.proxy.async.global;"):
        _current().own.acquired = False
    if text.endswith("mov.u32 $0, 0;"):
        return Block(0)
    if "@never pmevent" in text:
        return args[0]
    if "vote.sync.any.pred over" in text:
        return _highest(args[0].v, args[1].v)
    if "vote.sync.any.pred moved" in text:
        return args[0] * args[1]
    raise MachineError(f"assembly that the model does not know: {text}")


def _highest(scores: Tensor, limit: Tensor) -> Block:
    """Row maxima of those warps, 16 rows each, in which a score is above its row's limit or a limit is negative."""
    over = (scores.contiguous().view(torch.int32) > limit.contiguous().view(torch.int32)) | (limit < 0)
    looks = over.view(4, -1).any(1).repeat_interleave(scores.shape[0] // 4)[:, None]
    return Block(torch.where(looks, scores.amax(1, keepdim=True), float("-inf")).expand(scores.shape).clone())


def _allocate(kind: Type, shape: Sequence[int], layout: Any) -> Any:
    if layout == "barriers":
        return Barriers(shape[0])
    memory = SimpleNamespace(unfenced=set())
    _current().memories.append(memory)
    filled = torch.full(tuple(shape), float("nan") if kind.torch.is_floating_point else -1, dtype=kind.torch)
    return Shared(filled, memory)


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


def _wait(barrier: Barrier, phase: Any, pred: Any = True) -> None:
    if bool(pred):
        parity = int(phase)
        assert parity in (0, 1)
        _current().wait(lambda: barrier.phase & 1 != parity)


def _arrive(barrier: Barrier, *, count: int = 1, pred: Any = True) -> None:
    if bool(pred):
        barrier.arrive(count)
        _current().wait(lambda: True)


def _copy_in(box: Box, at: Sequence[Any], barrier: Barrier, to: Shared, pred: Any = True) -> None:
    place = [int(x) for x in at]
    target = to.asynchronous()

    def happen() -> None:
        inside, where = box.part(place)
        filled = torch.zeros(tuple(box.block_shape), dtype=target.dtype)
        filled[where] = inside
        target.copy_(filled.view(target.shape))
        barrier.copied(box.block_type.nbytes)

    _current().copies.append(happen)


def _copy_out(add: bool) -> Callable[..., None]:
    def issue(box: Box, at: Sequence[Any], source: Shared) -> None:
        place = [int(x) for x in at]
        view = source.asynchronous()
        own = _current().own
        if add and own.acquired:
            raise MachineError("the asynchronous units do not see what others had stored")

        def read() -> None:
            inside, where = box.part(place)
            moved = view.reshape(tuple(box.block_shape))[where].clone()
            own.landing.append(lambda: inside.copy_(inside + moved if add else moved))

        own.stores.append(read)

    return issue


def _land(partition: Partition) -> None:
    while partition.landing:
        partition.landing.pop(0)()


def _store_wait(pendings: int) -> None:
    stores = _current().own.stores
    while len(stores) > pendings:
        stores.pop(0)()


def _matmul(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Pending:
    left = a.asynchronous() if isinstance(a, Shared) else _value(a).clone()
    right = b.asynchronous()
    if left.shape[1] != right.shape[0] or left.shape[0] != 64:
        raise MachineError(f"a matmul of {tuple(left.shape)} and {tuple(right.shape)}")
    found = Pending(torch.Size((left.shape[0], right.shape[1])))

    def happen() -> None:
        product = left.float() @ right.float()
        if use_acc:
            start = acc.value if isinstance(acc, Pending) else acc.v
            assert start is not None
            product = product + start
        found.value = product

    _current().own.matmuls.append(happen)
    return found


def _matmul_wait(left: int = 0, deps: Sequence[Any] = ()) -> Any:
    matmuls = _current().own.matmuls
    while len(matmuls) > left:
        matmuls.pop(0)()
    found = []
    for dep in deps:
        if isinstance(dep, Pending) and dep.value is None:
            raise MachineError("a wait leaves the matmul under way that it is for")
        found.append(Block(dep.value) if isinstance(dep, Pending) else dep)
    return found[0] if len(found) == 1 else tuple(found)


def _fence() -> None:
    for memory in _current().memories:
        memory.unfenced.discard(threading.current_thread())


def _language() -> ModuleType:
    gl: Any = ModuleType("gl")
    vars(gl).update(TYPES)
    gl.constexpr = lambda x: x
    gl.static_range, gl.program_id = range, lambda axis: Block(_current().number)
    gl.num_programs = lambda axis: Block(_current().count)
    gl.zeros = lambda shape, kind, layout=None: Block(torch.zeros(tuple(shape), dtype=kind.torch))
    gl.full = lambda shape, x, kind, layout=None: Block(torch.full(tuple(shape), _value(x), dtype=kind.torch))
    gl.zeros_like = lambda block: Block(torch.zeros_like(block.v))
    gl.full_like = lambda block, x: Block(torch.full_like(block.v, x))
    gl.arange = lambda start, end, layout=None: Block(torch.arange(start, end, dtype=torch.int32))
    gl.cast = lambda x, kind: Block(x).to(kind) if not isinstance(x, Block) else x.to(kind)
    gl.cdiv = lambda a, b: (a + (b - 1)) // b
    gl.convert_layout = lambda x, layout, assert_trivial=False: x
    gl.sum = lambda x, axis: Block(_value(x).sum(axis, dtype=_value(x).dtype))
    gl.max = lambda x, axis: Block(_value(x).amax(axis))
    gl.min = lambda x, axis: Block(_value(x).amin(axis))
    gl.load, gl.store, gl.inline_asm_elementwise = _load, _store, _assembly
    gl.atomic_add = _atomic(lambda before, value: before + value)
    gl.atomic_xchg = _atomic(lambda before, value: value)
    gl.atomic_cas = _atomic(lambda before, expected, value: value if int(before) == expected else before)
    for name in ("maximum", "minimum", "where", "exp2", "log", "log2", "abs", "sqrt", "rsqrt", "floor", "sin", "cos"):
        setattr(gl, name, _elementwise(getattr(torch, name)))
    gl.erf = _elementwise(torch.erf)
    gl.broadcast = lambda a, b: tuple(map(Block, torch.broadcast_tensors(a.v, b.v)))
    gl.allocate_shared_memory = _allocate
    gl.warp_specialize = lambda functions, warps, registers: _current().specialize(functions)
    gl.thread_barrier = lambda: None
    gl.NVMMASharedLayout = SimpleNamespace(get_default_for=lambda shape, kind: "tiles")
    for name in ("NVMMADistributedLayout", "SliceLayout", "DotOperandLayout", "BlockedLayout", "SwizzledSharedLayout"):
        setattr(gl, name, lambda *args: None)
    return gl  # type: ignore[no-any-return]


def _modules() -> dict[str, Any]:
    """Gluon's modules, as far as generated kernels import them."""
    gluon, hopper, host, core = (ModuleType(name) for name in ("gluon", "hopper", "host", "core"))
    gl = _language()
    gluon.jit, gluon.language = _jit, gl  # type: ignore[attr-defined]
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: "barriers",
        init=_init,
        wait=_wait,
        arrive=_arrive,
        expect=lambda barrier, count: barrier.arrive(1, count),
    )
    tma = SimpleNamespace(
        async_load=_copy_in, async_store=_copy_out(False), async_atomic_add=_copy_out(True), store_wait=_store_wait
    )
    parts = {"fence_async_shared": _fence, "mbarrier": mbarrier, "tma": tma}
    vars(hopper).update(parts, warpgroup_mma=_matmul, warpgroup_mma_wait=_matmul_wait)
    host.TensorDescriptor = Box  # type: ignore[attr-defined]
    core.builtin = lambda function: function  # type: ignore[attr-defined]
    base = "triton.experimental.gluon"
    return {
        base: gluon,
        f"{base}.language": gl,
        f"{base}.language._core": core,
        f"{base}.language.nvidia.hopper": hopper,
        f"{base}.nvidia.hopper": host,
    }


def load(source: str, name: str) -> ModuleType:
    """A generated module whose Gluon kernels run on the model, and whose Triton kernels are interpreted."""
    with interpreter.decorating(), pretending():
        module: Any = load_source(source, name)

    def launch(kernel: Any, grid: int, args: Sequence[Any], meta: dict[str, Any]) -> None:
        if isinstance(kernel, Kernel):
            module.launches += 1
            kernel.launch(grid, args, meta, module.launches)
        elif grid:
            with interpreter.interpreting():
                kernel[(grid,)](*args, **{k: x for k, x in meta.items() if k != "maxnreg"})

    module.launches, module._launch = 0, launch
    return module  # type: ignore[no-any-return]


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """While this is open, modules that import Gluon get the model."""
    import triton.experimental.gluon

    fakes = _modules()
    before = {name: sys.modules.get(name) for name in fakes}
    real = triton.experimental.gluon
    sys.modules.update(fakes)
    triton.experimental.gluon = fakes["triton.experimental.gluon"]
    try:
        yield
    finally:
        triton.experimental.gluon = real
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
