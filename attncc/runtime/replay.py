"""A call like the last one costs little more host time than its launches: the first is recorded, later ones replay.

A recording holds the compiled kernels with their arguments, in which every tensor is a slot: one of the call's own
tensors, one of its results, or scratch. Replaying fills the slots and launches; checks, schedules, grids and Triton's
own argument binding are behind it. The key says everything that any of those depended on, alignment of pointers
included.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from attncc.runtime.interpreter import compiling
from attncc.runtime.warm import collector, wait

_ALIGNED = 16


@dataclass(frozen=True)
class _Launch:
    kernel: CompiledKernel
    grid: int
    arguments: tuple[Any, ...]
    slots: tuple[tuple[int, int], ...]  # (position in the arguments, index in the call's tensors)
    boxes: tuple[tuple[int, int, Any], ...]  # the same for descriptors, with one to copy


@dataclass(frozen=True)
class Recording:
    """One kind of call. `made`: shape, strides and dtype of what each call allocates, results first; `zeroed`: which of
    these begin at zero."""

    launches: tuple[_Launch, ...]
    made: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    results: int
    device: torch.device
    defaults: tuple[Tensor, ...]
    zeroed: tuple[int, ...] = ()

    def play(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """Run the call on other tensors of the same kind; returns its results."""
        device = self.device
        made = [torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype in self.made]
        for index in self.zeroed:
            made[index].zero_()
        known = [*tensors, *self.defaults, *made]
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        for launch in self.launches:
            arguments = list(launch.arguments)
            for position, index in launch.slots:
                arguments[position] = known[index]
            for position, index, box in launch.boxes:
                arguments[position] = _moved(box, known[index])
            kernel = launch.kernel
            kernel.run(launch.grid, 1, 1, stream, kernel.function, kernel.packed_metadata, None, None, None, *arguments)
        return tuple(made[: self.results])


def key_of(q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, Any]) -> Any:
    """What a recording depends on."""
    pointers = q.data_ptr() | k.data_ptr() | v.data_ptr()
    # which arguments are one and the same tensor: a recording tells slots apart by identity
    rest: list[Any] = [(k is q, v is q, v is k)]
    seen = [q, k, v]
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            pointers |= value.data_ptr()
            rest.append(next((i for i, t in enumerate(seen) if t is value), -1))
            seen.append(value)
            rest.append((name, value.shape, value.stride(), value.dtype, value.device, value.requires_grad))
        else:
            rest.append((name, type(value), value))
    return (
        *(q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride()),
        *(q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, scale, pointers % _ALIGNED),
        *rest,
    )


def usable() -> bool:
    """May launches bypass Triton's front end? Not while a profiler has hooks on them."""
    runtime = triton.knobs.runtime
    return not any(_hooks(h) for h in (runtime.launch_enter_hook, runtime.launch_exit_hook))


def _hooks(hook: Any) -> Any:
    """The functions of a hook: Triton has it as None, one function, or a chain of them."""
    return getattr(hook, "calls", hook)


class Recorder(threading.local):
    """Collects the launches of one call, on the thread that makes it."""

    def __init__(self) -> None:
        self.launches: list[tuple[CompiledKernel, int, tuple[Any, ...]]] | None = None
        self.zeroed: list[Tensor] = []

    def zeros(self, device: torch.device) -> Tensor:
        """The `_zeros` of a compiled module: a counter, noted while a call is recorded."""
        counter = torch.zeros(1, dtype=torch.int32, device=device)
        if self.launches is not None:
            self.zeroed.append(counter)
        return counter

    def launch(self, kernel: Any, grid: int, arguments: Sequence[Any], meta: Mapping[str, Any]) -> None:
        """The `_launch` of a compiled module: run a kernel, and note it while a call is recorded."""
        if not grid:
            return
        if collector.jobs is not None:
            collector.jobs.append((kernel, grid, arguments, dict(meta)))
            return
        wait(kernel)
        with compiling():
            compiled = kernel[(grid,)](*arguments, **meta)
        if self.launches is not None:
            constants = tuple(meta[p.name] for p in kernel.params[len(arguments) :])
            self.launches.append((compiled, grid, (*arguments, *constants)))

    def record(
        self, call: Callable[[], tuple[Tensor, ...]], tensors: Sequence[Tensor], defaults: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], Recording]:
        """Make a call, and a recording of it. `defaults` are tensors that stay the same for every such call."""
        self.launches, self.zeroed = [], []
        try:
            results = call()
            noted, zeroed = self.launches, self.zeroed
        finally:
            self.launches, self.zeroed = None, []
        made: list[Tensor] = list(results)
        known = [*tensors, *defaults]
        launches = []
        for kernel, grid, arguments in noted:
            slots, boxes = [], []
            for position, argument in enumerate(arguments):
                if isinstance(argument, Tensor):
                    slots.append((position, _index(argument, known, made)))
                elif _is_descriptor(argument):
                    boxes.append((position, _index(argument.base, known, made), _moved(argument, None)))
            blank = tuple(None if isinstance(a, Tensor) or _is_descriptor(a) else a for a in arguments)
            launches.append(_Launch(kernel, grid, blank, tuple(slots), tuple(boxes)))
        shapes = tuple((tuple(t.shape), t.stride(), t.dtype) for t in made)
        begun = tuple(i for i, t in enumerate(made) if any(t is z for z in zeroed))
        return results, Recording(tuple(launches), shapes, len(results), tensors[0].device, tuple(defaults), begun)


def _is_descriptor(argument: Any) -> bool:
    """Is it a descriptor of a tensor? Triton and Gluon each have a class of them."""
    return hasattr(argument, "block_shape")


def _moved(box: Any, base: Tensor | None) -> Any:
    """The descriptor of another tensor of the same kind, which need not be checked again."""
    moved: Any = object.__new__(type(box))
    moved.__dict__.update(box.__dict__, base=base)
    return moved


def _index(argument: Tensor, known: Sequence[Tensor], made: list[Tensor]) -> int:
    for index, tensor in enumerate((*known, *made)):
        if tensor is argument:
            return index
    made.append(argument)
    return len(known) + len(made) - 1


recorder = Recorder()
