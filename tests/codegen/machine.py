"""Gluon kernels for Hopper on a CPU: the text of a generated kernel runs as plain Python, on a model of the machine.

Gluon has no interpreter, and what goes wrong in these kernels is seldom arithmetic: a buffer that is refilled while a
matmul still reads it, a barrier that is waited for in the wrong phase, a fence that is missing. So the model is of what
is asynchronous. Every partition of warps is a thread, one of which runs at a time; at every barrier chance says which
goes on. Copies and matmuls take place at a random moment between their issue and the wait for them, a warpgroup's
matmuls in their order. A tile that is stored is read first, and lies in memory for sure when that was waited for.
Shared memory begins as NaN, and a load from it may take until its result is used. Reading a result that was not waited
for, writing by threads what the asynchronous units read with no fence in between, copying to where a load may still
read, telling others of a store that is still on its way, and waiting for ever are errors.

Layouts are not modelled, nor registers, nor the threads within a warpgroup; `cross_compile` has a say in those.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attncc.codegen.module import load_source
from attncc.runtime import interpreter
from tests.codegen.machine_program import Kernel, current, land
from tests.codegen.machine_tensors import (
    TYPES,
    Barrier,
    Barriers,
    Block,
    Box,
    MachineError,
    Memory,
    Pending,
    Pointer,
    Shared,
    Type,
    plain,
)

__all__ = ["MachineError", "load", "pretending"]


def _jit(function: Any = None, **_: Any) -> Any:
    return Kernel(function) if function is not None else Kernel


def _elementwise(function: Callable[..., Any]) -> Callable[..., Block]:
    return lambda *args, **_: Block(function(*(torch.as_tensor(plain(a)) for a in args)))


def _load(pointer: Pointer, mask: Any = None, other: Any = 0, volatile: bool = False) -> Block:
    if volatile:  # what others change: in a loop, most likely
        current().let_others()
    at, shown = pointer.places(mask)
    return Block(torch.where(shown, pointer.memory[torch.where(shown, at, 0)], other))


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    at, shown = pointer.places(mask)
    value = torch.as_tensor(plain(value)).to(pointer.memory.dtype).broadcast_to(at.shape)
    pointer.memory[at[shown]] = value[shown]


def _add(pointer: Pointer, value: Any, mask: Any = None) -> None:
    """What several elements add to one place adds up."""
    at, shown = pointer.places(mask)
    value = torch.as_tensor(plain(value)).to(pointer.memory.dtype).broadcast_to(at.shape)
    pointer.memory.index_put_((at[shown],), value[shown], accumulate=True)


def _atomic(change: Callable[..., Any], put: Callable[..., None] | None = None) -> Callable[..., Block]:
    """An atomic operation: `change` makes what is stored from what was there and the operation's arguments; or `put`
    does with them what has no need of that."""

    def atomic(pointer: Pointer, *args: Any, mask: Any = None, sem: str = "relaxed") -> Block:
        program = current()
        if sem == "release" and (program.own.stores or program.own.landing):
            raise MachineError("others are told of a store that is still on its way")
        if sem == "acquire":  # in a loop, and those before have ended
            program.own.acquired = True
            program.asked += 1
            if program.asked > _PATIENCE:
                raise MachineError("a turn that never comes")
        if sem == "relaxed":  # as who deals blocks asks
            program.change()
        before = _load(pointer, mask)
        if put is None:
            _store(pointer, change(before, *args), mask)
        else:
            put(pointer, *args, mask=mask)
        return before

    return atomic


_PATIENCE = 1000  # tiles of a program, and more


def _assembly(text: str, constraints: str, args: Sequence[Any], **_: Any) -> Any:
    if text.startswith("tanh"):
        return Block(torch.tanh(args[0].v))
    if text.startswith("rcp"):
        return Block(1 / args[0].v)
    if text.startswith("abs.f32"):
        return Block(args[0].v.abs())
    if "fma.rn.sat.f32 side" in text:
        return Block(args[0].v * torch.sign(args[1].v))
    if "set.neu.u32.bf16x2 all" in text:
        bits = args[0].v.contiguous().view(torch.int32)
        some = torch.where((bits & 0x7FFF0000) != 0, 0x7FFF, 0)
        return Block(some.short() | torch.where(bits < 0, -0x8000, 0).short())
    if text.endswith("0x80008000, 0xC8;"):
        value, side = args[0].v.contiguous().view(torch.int16), args[1].v
        return Block((value & side | side & -0x8000).view(args[0].v.dtype))
    if text.startswith("cp.async.bulk.wait_group 0;"):
        _store_wait(0)
        land(current().own)
    if text.startswith("fence.proxy.async.global;"):
        current().own.acquired = False
    if text.startswith("cvt.rn.") and "x2.f32" in text:
        return Block(args[0].v.to(torch.bfloat16 if "bf16x2" in text else torch.float16))
    if text.startswith(("shl.b32", "{ .reg .b16 low, high;")):
        return Block(args[0].v.float())
    if text.endswith("mov.u32 $0, 0;") or text == "shr.s32 $0, $1, 31;":
        return Block(0)
    if "@never pmevent" in text:
        return args[0]
    if "vote.sync.any.pred over" in text:
        return _highest(args[0].v, args[1].v)
    if "vote.sync.any.pred moved" in text:
        return args[0] * args[1]
    if "ld.global.nc.b32" in text:
        return _fragments(text, args[0])
    raise MachineError(f"assembly that the model does not know: {text}")


def _fragments(text: str, places: Pointer) -> Block:
    """Loads of a tile [64, N], of which a thread knows its first element's place and has N / 8 times two rows, eight
    apart, of two neighbours; `text` says which of those it loads how far from there, and which are others again."""
    bytes_on = {int(i): int(far) for i, far in re.findall(r"ld\.global\.nc\.b32 \$(\d+), \[at \+ (-?\d+)\]", text)}
    for i, other in re.findall(r"mov\.b32 \$(\d+), \$(\d+);", text):
        bytes_on[int(i)] = bytes_on[int(other)]
    rows, keys = places.shape
    own = torch.tensor([bytes_on[i] // 4 for i in range(keys // 2)]).view(keys // 8, 2, 2).transpose(0, 1)
    first = torch.as_tensor(places.offset).view(rows // 16, 2, 8, keys // 8, 4, 2)[:, :1, :, :1, :, :1]
    at = first + own[None, :, None, :, None, :]
    return _load(Pointer(places.memory, at.reshape(rows, keys)))


def _highest(scores: Tensor, limit: Tensor) -> Block:
    """Row maxima of those warps, 16 rows each, in which a score is above its row's limit or a limit is negative."""
    over = (scores.contiguous().view(torch.int32) > limit.contiguous().view(torch.int32)) | (limit < 0)
    looks = over.view(4, -1).any(1).repeat_interleave(scores.shape[0] // 4)[:, None]
    return Block(torch.where(looks, scores.amax(1, keepdim=True), float("-inf")).expand(scores.shape).clone())


def _allocate(kind: Type, shape: Sequence[int], layout: Any) -> Any:
    if layout == "barriers":
        found = Barriers(shape[0])
        current().barriers += found.all
        return found
    memory = Memory()
    current().memories.append(memory)
    filled = torch.full(tuple(shape), float("nan") if kind.torch.is_floating_point else -1, dtype=kind.torch)
    return Shared(filled, memory)


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


def _retire(barrier: Barrier) -> None:
    barrier.retired = True


def _wait(barrier: Barrier, phase: Any, pred: Any = True) -> None:
    if bool(pred):
        parity = int(phase)
        assert parity in (0, 1)
        current().wait(lambda: barrier.phase & 1 != parity)


def _arrive(barrier: Barrier, *, count: int = 1, pred: Any = True) -> None:
    if bool(pred):
        barrier.arrive(count)
        current().wait(lambda: True)


def _copy_in(box: Box, at: Sequence[Any], barrier: Barrier, to: Shared, pred: Any = True) -> None:
    place = [int(x) for x in at]
    target = to.asynchronous()
    to.memory.copied_to(target)

    def happen() -> None:
        inside, where = box.part(place)
        filled = torch.zeros(tuple(box.block_shape), dtype=target.dtype)
        filled[where] = inside
        target.copy_(filled.view(target.shape))
        barrier.copied(box.block_type.nbytes)

    current().copies.append(happen)


def _copy_out(add: bool) -> Callable[..., None]:
    def issue(box: Box, at: Sequence[Any], source: Shared) -> None:
        place = [int(x) for x in at]
        view = source.asynchronous()
        own = current().own
        if add and own.acquired:
            raise MachineError("the asynchronous units do not see what others had stored")

        def read() -> None:
            inside, where = box.part(place)
            moved = view.reshape(tuple(box.block_shape))[where].clone()
            own.landing.append(lambda: inside.copy_(inside + moved if add else moved))

        own.stores.append(read)

    return issue


def _store_wait(pendings: int) -> None:
    stores = current().own.stores
    while len(stores) > pendings:
        stores.pop(0)()


def _matmul(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Pending:
    left = a.asynchronous() if isinstance(a, Shared) else plain(a).clone()
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

    current().own.matmuls.append(happen)
    return found


def _matmul_wait(left: int = 0, deps: Sequence[Any] = ()) -> Any:
    matmuls = current().own.matmuls
    while len(matmuls) > left:
        matmuls.pop(0)()
    found = []
    for dep in deps:
        if isinstance(dep, Pending) and dep.value is None:
            raise MachineError("a wait leaves the matmul under way that it is for")
        found.append(Block(dep.value) if isinstance(dep, Pending) else dep)
    return found[0] if len(found) == 1 else tuple(found)


def _fence() -> None:
    for memory in current().memories:
        memory.unfenced.discard(threading.current_thread())


def _language() -> ModuleType:
    gl: Any = ModuleType("gl")
    vars(gl).update(TYPES)
    gl.constexpr = lambda x: x
    gl.static_range, gl.program_id = range, lambda axis: Block(current().number)
    gl.num_programs = lambda axis: Block(current().count)
    gl.zeros = lambda shape, kind, layout=None: Block(torch.zeros(tuple(shape), dtype=kind.torch))
    gl.full = lambda shape, x, kind, layout=None: Block(torch.full(tuple(shape), plain(x), dtype=kind.torch))
    gl.zeros_like = lambda block: Block(torch.zeros_like(block.v))
    gl.full_like = lambda block, x: Block(torch.full_like(block.v, x))
    gl.arange = lambda start, end, layout=None: Block(torch.arange(start, end, dtype=torch.int32))
    gl.cast = lambda x, kind: Block(x).to(kind) if not isinstance(x, Block) else x.to(kind)
    gl.cdiv = lambda a, b: (a + (b - 1)) // b
    gl.multiple_of = lambda x, values: x
    gl.convert_layout = lambda x, layout, assert_trivial=False: x
    gl.sum = lambda x, axis: Block(plain(x).sum(axis, dtype=plain(x).dtype))
    gl.max = lambda x, axis: Block(plain(x).amax(axis))
    gl.min = lambda x, axis: Block(plain(x).amin(axis))
    gl.gather = lambda x, index, axis: Block(torch.gather(x.v, axis, index.v.to(torch.int64)))
    gl.load, gl.store, gl.inline_asm_elementwise = _load, _store, _assembly
    gl.atomic_add = _atomic(lambda before, value: before + value, _add)
    gl.atomic_xchg = _atomic(lambda before, value: value)
    gl.atomic_cas = _atomic(lambda before, expected, value: value if int(before) == expected else before)
    for name in ("maximum", "minimum", "where", "exp2", "log", "log2", "abs", "sqrt", "rsqrt", "floor", "sin", "cos"):
        setattr(gl, name, _elementwise(getattr(torch, name)))
    gl.erf = _elementwise(torch.erf)
    gl.join = lambda a, b: Block(torch.stack((a.v, b.v), -1))
    gl.broadcast = lambda a, b: tuple(map(Block, torch.broadcast_tensors(a.v, b.v)))
    gl.allocate_shared_memory = _allocate
    gl.warp_specialize = lambda functions, warps, registers: current().specialize(functions)
    gl.thread_barrier = lambda: None
    gl.NVMMASharedLayout = SimpleNamespace(get_default_for=lambda shape, kind: "tiles")
    layouts = "NVMMADistributed", "DistributedLinear", "Slice", "DotOperand", "Blocked", "SwizzledShared"
    for name in layouts:
        setattr(gl, f"{name}Layout", lambda *args: None)
    return gl  # type: ignore[no-any-return]


def _modules() -> dict[str, Any]:
    """Gluon's modules, as far as generated kernels import them."""
    gluon, hopper, host, core = (ModuleType(name) for name in ("gluon", "hopper", "host", "core"))
    gl = _language()
    gluon.jit, gluon.language = _jit, gl  # type: ignore[attr-defined]
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: "barriers",
        init=_init,
        invalidate=_retire,
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
