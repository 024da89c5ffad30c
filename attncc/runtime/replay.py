"""A call like the last one costs little more host time than its launches: the first is recorded, later ones replay.

A recording is a tape of what the host code did to tensors: it allocated some, launched kernels on them, and perhaps
called operators of PyTorch, all of which depend on the kind of the call alone. Every tensor is a slot: one of the
call's own, or one that the tape makes. Checks, schedules, grids and Triton's argument binding are behind it. The key
says everything that any of those depended on, alignment of pointers included.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attncc.runtime.arguments import Cells, moved, tensors_of, without_tensors
from attncc.runtime.cuda import Function
from attncc.runtime.launch import Call, launch_compiled, trace

_ALIGNED = 16
_ATEN = torch.ops.aten
_ALLOCATES = {
    _ATEN.empty.memory_format,
    _ATEN.empty_strided.default,
    _ATEN.empty_like.default,
    _ATEN.new_empty.default,
    _ATEN.new_empty_strided.default,
}
_BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
#: the tensors of a replay by slot; None until a step makes one
Values: TypeAlias = list[Any]

try:  # what TorchInductor's own output allocates with: half the time of torch.empty_strided
    from torch._C._dynamo.guards import _empty_strided_cuda as _empty  # type: ignore[attr-defined]
except ImportError:

    def _empty(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype, device="cuda")


class _Slot(int):
    """A tensor's place among the values of a replay, where it stands for an argument."""


class _Make:
    """An allocation."""

    def __init__(self, slot: int, made: Tensor):
        self.slot, self.tensor = slot, made
        self.facts = (tuple(made.shape), made.stride(), made.dtype)

    def __call__(self, values: Values, stream: int) -> None:
        values[self.slot] = _empty(*self.facts)


class _Operator:
    """A call of one of PyTorch's operators."""

    def __init__(self, function: Any, args: Any, kwargs: Any, slots: Sequence[int] = (), view: Tensor | None = None):
        self.function, self.args, self.kwargs, self.slots, self.view = function, args, kwargs, slots, view

    def __call__(self, values: Values, stream: int) -> None:
        found = self.function(*_filled(self.args, values), **_filled(self.kwargs, values))
        for slot, tensor in zip(self.slots, _tensors(found), strict=True):
            values[slot] = tensor


class _Direct:
    """A launch of a binary. Each thread that replays it takes a set of cells from the shelf, and puts it back."""

    def __init__(self, call: Call, slots: Mapping[int, int]):
        self._function: Function = call.kernel
        self._grid = ctypes.c_uint(call.grid)
        self._call, self.slots = call, slots
        self._shelf: list[Any] = []

    def __call__(self, values: Values, stream: int) -> None:
        try:
            entry = self._shelf.pop()
        except IndexError:
            tensors = {position: values[slot].data_ptr() for position, slot in self.slots.items()}
            made = Cells(self._call.kinds, self._call.arguments, self._call.boxes, tensors)
            entry = made, *made.movers(self.slots)
        arguments, cells, boxes = entry
        for cell, slot in cells:
            cell.value = values[slot].data_ptr()
        for box, slot in boxes:
            box.point(values[slot].data_ptr())
        self._function.launch(self._grid, ctypes.c_void_p(stream), arguments.addresses)
        self._shelf.append(entry)


class _Foreign:
    """A launch that Triton makes."""

    def __init__(self, call: Call, slots: Mapping[int, int]):
        self._compiled, self._grid, self._arguments, self.slots = call.kernel, call.grid, call.arguments, slots

    def __call__(self, values: Values, stream: int) -> None:
        arguments = list(self._arguments)
        for position, slot in self.slots.items():
            box, tensor = arguments[position], values[slot]
            arguments[position] = tensor if box is None else moved(box, tensor)
        launch_compiled(self._compiled, self._grid, stream, arguments)


_Step: TypeAlias = _Make | _Operator | _Direct | _Foreign


class Recording:
    """One kind of call."""

    def __init__(
        self, steps: Sequence[_Step], count: int, results: Sequence[int | None], device: int, defaults: Sequence[Tensor]
    ):
        self._steps, self._blank, self._results = tuple(steps), (None,) * count, tuple(results)
        self._device, self._defaults = device, tuple(defaults)

    def play(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """Run the call on other tensors of the same kind; returns its results."""
        if torch._C._cuda_getDevice() != self._device:
            with torch.cuda.device(self._device):
                return self._play(tensors)
        return self._play(tensors)

    def _play(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        values: Values = [*tensors, *self._defaults, *self._blank]
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        for step in self._steps:
            step(values, stream)
        return tuple([None if slot is None else values[slot] for slot in self._results])


class _Tape(TorchDispatchMode):
    """Notes what a call does to tensors, in order. `failure` says why the call cannot be replayed, if it cannot."""

    def __init__(self, given: Sequence[Tensor]):
        super().__init__()
        self.given = list(given)
        self.steps: list[_Step] = []
        self.count = 0
        self.failure = ""
        self._made: dict[Any, int] = {}
        self._alive: list[Tensor] = []  # no address is used twice while the call is recorded

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: a tape is on while a call runs, never while one is traced, and PyTorch's guard against that imports all
        of Dynamo at the first operator, 0.6 s of the first backward."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        made = _tensors(results)
        if trace.jobs is not None or any(t.is_meta for t in made):
            return results  # host code that runs for its launches alone, or for shapes
        if func in _ALLOCATES:
            self.steps.append(_Make(self._new(results), results))
            return results
        if _BY_VALUE & set(func.tags):
            self.failure = f"{func} depends on values"
        if func is _ATEN.lift_fresh.default:  # a tensor of numbers that the host code wrote out
            stored = _Operator(_ATEN.clone.default, args, {})
        else:
            view = made[0] if len(made) == 1 and _is_view(func) else None
            stored = _Operator(func, self._stored(args), self._stored(kwargs), view=view)
        stored.slots = [self._new(t) for t in made]
        self.steps.append(stored)
        return results

    def launched(self, call: Call) -> None:
        """Note a launch."""
        slots = {position: self.slot(t) for position, t in tensors_of(call.arguments).items()}
        kept = replace(call, arguments=without_tensors(call.arguments))
        self.steps.append((_Direct if call.kinds else _Foreign)(kept, slots))

    def slot(self, tensor: Tensor) -> int:
        """Where a tensor lies among the values: a caller's own by identity, for two may share memory in one call and
        not in the next; one of the tape's by its place in memory, for views are wrapped anew on their way here."""
        for slot, own in enumerate(self.given):
            if own is tensor:
                return slot
        found = self._made.get(_place(tensor))
        if found is None:
            self.failure = f"a tensor of shape {tuple(tensor.shape)} comes from nowhere"
            return -1
        return found

    def _new(self, tensor: Tensor) -> int:
        known = next((i for i, own in enumerate(self.given) if own is tensor), None)
        if known is not None:  # an operator in place
            return known
        self._alive.append(tensor)
        slot = len(self.given) + self.count
        self.count += 1
        self._made[_place(tensor)] = slot
        return slot

    def _stored(self, argument: Any) -> Any:
        """An operator's argument with slots for its tensors."""
        if isinstance(argument, Tensor):
            return _Slot(self.slot(argument))
        if isinstance(argument, list | tuple):
            return type(argument)(map(self._stored, argument))
        if isinstance(argument, dict):
            return {name: self._stored(value) for name, value in argument.items()}
        return argument


def _is_view(function: Any) -> bool:
    """Does an operator return its argument's memory, unchanged?"""
    return any(a.alias_info is not None and not a.alias_info.is_write for a in function._schema.arguments)


def _place(tensor: Tensor) -> Any:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _tensors(results: Any) -> list[Tensor]:
    """The tensors that an operator returns, in order."""
    found = results if isinstance(results, list | tuple) else (results,)
    return [t for t in found if isinstance(t, Tensor)]


def _filled(argument: Any, values: Values) -> Any:
    """An operator's argument with tensors in its slots."""
    if type(argument) is _Slot:
        return values[argument]
    if isinstance(argument, list | tuple):
        return type(argument)([_filled(a, values) for a in argument])
    if type(argument) is dict:
        return {name: _filled(value, values) for name, value in argument.items()}
    return argument


def _slots_in(argument: Any) -> set[int]:
    """The slots that an operator's argument reads."""
    if type(argument) is _Slot:
        return {int(argument)}
    if isinstance(argument, list | tuple):
        return set().union(*map(_slots_in, argument))
    if type(argument) is dict:
        return _slots_in(list(argument.values()))
    return set()


def _read(step: _Step) -> set[int]:
    """The slots that a step reads."""
    if isinstance(step, _Make):
        return set()
    return _slots_in((step.args, step.kwargs)) if isinstance(step, _Operator) else set(step.slots.values())


def _needed(steps: Sequence[_Step], results: set[int]) -> list[_Step]:
    """The steps that the results, a launch or a change in place depend on."""
    kept: list[_Step] = []
    wanted = set(results)
    for step in reversed(steps):
        if isinstance(step, _Make):
            idle = step.slot not in wanted
        elif isinstance(step, _Operator):
            idle = not (step.function._schema.is_mutable or wanted.intersection(step.slots))
        else:
            idle = False
        if not idle:
            wanted |= _read(step)
            kept.append(step)
    return kept[::-1]


def _merged(steps: Sequence[_Step], results: set[int]) -> list[_Step]:
    """A fresh tensor of which only one view is used, such as a transposed one, is made as that view."""
    uses = Counter(results)
    for step in steps:
        uses.update(_read(step))
    fresh = {step.slot: step for step in steps if isinstance(step, _Make)}
    merged: list[_Step] = []
    for step in steps:
        if isinstance(step, _Operator) and step.view is not None:
            (base,) = (fresh.get(slot) for slot in _read(step))
            whole = base is not None and step.view.numel() == base.tensor.numel()
            if base is not None and whole and uses[base.slot] == 1:
                seen = fresh[step.slots[0]] = _Make(step.slots[0], step.view)
                merged[merged.index(base)] = seen
                continue
        merged.append(step)
    return merged


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
    if pointers % _ALIGNED:
        rest.append(tuple(t.data_ptr() % _ALIGNED for t in seen))
    return (
        *(q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride()),
        *(q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, scale),
        *rest,
    )


def record(
    call: Callable[[], tuple[Any, ...]], tensors: Sequence[Tensor], defaults: Sequence[Tensor]
) -> tuple[tuple[Any, ...], Recording | None]:
    """Make a call, and a recording of it; None where it does what cannot be repeated without looking.

    `defaults` are tensors that stay the same for every such call.
    """
    tape = _Tape([*tensors, *defaults])
    trace.tape = tape
    try:
        with tape:
            results = call()
    finally:
        trace.tape = None
    slots = [None if t is None else tape.slot(t) for t in results]
    if tape.failure:
        return results, None
    wanted = {slot for slot in slots if slot is not None}
    steps = _merged(_needed(tape.steps, wanted), wanted)
    for step in steps:  # no tensor of the recorded call stays alive
        if isinstance(step, _Make):
            del step.tensor
        elif isinstance(step, _Operator):
            del step.view
    return results, Recording(steps, tape.count, slots, tensors[0].get_device(), defaults)
