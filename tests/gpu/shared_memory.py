"""NaN in the shared memory of every processor, which outlives the kernel that left it there: what the next kernel reads
before it, or TMA, has written shows."""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
#: all bits: a NaN in every type of floats
NAN = -1


@gluon.jit
def fill(SEEN_PTR, WORD: gl.constexpr, FIRST: gl.constexpr, SECOND: gl.constexpr, THIRD: gl.constexpr):
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    spread: gl.constexpr = gl.BlockedLayout([1], [32], [32], [0])
    first = gl.allocate_shared_memory(gl.int32, [FIRST], layout, gl.full([FIRST], WORD, gl.int32, spread))
    second = gl.allocate_shared_memory(gl.int32, [SECOND], layout, gl.full([SECOND], WORD, gl.int32, spread))
    third = gl.allocate_shared_memory(gl.int32, [THIRD], layout, gl.full([THIRD], WORD, gl.int32, spread))
    _barrier()
    # what is read was written: the compiler leaves no store out
    seen = gl.min(first.load(spread), 0) + gl.min(second.load(spread), 0) + gl.min(third.load(spread), 0)
    gl.store(SEEN_PTR + gl.program_id(0), seen)


@gluon.jit
def peek(SEEN_PTR, WORDS: gl.constexpr):
    """What lies in shared memory that nobody has written: one bits alone?"""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    spread: gl.constexpr = gl.BlockedLayout([1], [32], [32], [0])
    found = gl.allocate_shared_memory(gl.int32, [WORDS], layout).load(spread)
    gl.store(SEEN_PTR + gl.program_id(0), gl.max((found != -1).to(gl.int32), 0))


def words() -> tuple[int, int, int]:
    """The three greatest powers of two that fill a program's shared memory, but for a few thousand bytes."""
    left = torch.cuda.get_device_properties("cuda").shared_memory_per_block_optin // 4 - 256  # a reduction has some
    found = []
    for _ in range(3):
        found.append(triton.next_power_of_2(left + 1) // 2)
        left -= found[-1]
    return tuple(found)


def _filled() -> torch.Tensor:
    """As many programs as the GPU has processors, twice, each of which fills one; what each then read."""
    programs = 2 * torch.cuda.get_device_properties("cuda").multi_processor_count
    seen = torch.empty(programs, device="cuda", dtype=torch.int32)
    fill[(programs,)](seen, NAN, *words(), num_warps=32)
    return seen


def fill_with_nan() -> None:
    """NaN wherever a kernel's shared memory may be."""
    assert (_filled() == 3 * NAN).all()


def nan_is_found() -> bool:
    """Does every program of a kernel that is launched right behind find NaN in all of its memory? PyTorch's kernels
    would leave something else there, so that nothing is looked at in between."""
    programs = torch.cuda.get_device_properties("cuda").multi_processor_count
    seen = torch.empty(programs, device="cuda", dtype=torch.int32)
    _filled()
    peek[(programs,)](seen, words()[0], num_warps=32)
    return not bool(seen.any())
