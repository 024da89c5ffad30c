"""Replay calls, so that a repeated call costs little more host time than its launches.

A recording is a tape of what the host code did with tensors: allocations, launches, and calls of PyTorch operators, all
of which depend only on the kind of the call. Every tensor is a slot: one of the call's own, or one that the tape
creates. A replay skips checks, schedules, grids and Triton's argument binding. The key of a recording contains
everything that these depend on, including the alignment of pointers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attncc.runtime.arguments import tensors_of, without_tensors
from attncc.runtime.launch import Call, trace
from attncc.runtime.steps import Direct, Foreign, Make, Operator, Slot, Step, forget, read, tensors_in
from attncc.runtime.straight import straight

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


class Recording:
    """One kind of call on a device: `function` makes it, on a stream and the call's tensors."""

    def __init__(self, steps: Sequence[Step], function: Callable[..., tuple[Any, ...]], device: int):
        self.steps, self._function, self._device = tuple(steps), function, device

    def play(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """Run the call on other tensors of the same kind; returns its results."""
        device = self._device
        if torch._C._cuda_getDevice() != device:
            with torch.cuda.device(device):
                return self._function(torch._C._cuda_getCurrentRawStream(device), *tensors)
        return self._function(torch._C._cuda_getCurrentRawStream(device), *tensors)


class _Tape(TorchDispatchMode):
    """Notes what a call does to tensors, in order. `failure` says why the call cannot be replayed, if it cannot."""

    def __init__(self, given: Sequence[Tensor]):
        super().__init__()
        self.given = list(given)
        self.steps: list[Step] = []
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
        made = tensors_in(results)
        if trace.jobs is not None or any(t.is_meta for t in made):
            return results  # host code that runs for its launches alone, or for shapes
        if func in _ALLOCATES:
            self.steps.append(Make(self._new(results), results))
            return results
        if _BY_VALUE & set(func.tags):
            self.failure = f"{func} depends on values"
        if func is _ATEN.lift_fresh.default:  # a tensor of numbers that the host code wrote out
            stored = Operator(_ATEN.clone.default, args, {})
        else:
            view = made[0] if len(made) == 1 and _is_view(func) else None
            stored = Operator(func, self._stored(args), self._stored(kwargs), view, isinstance(results, Tensor))
        stored.slots = [self._new(t) for t in made]
        self.steps.append(stored)
        return results

    def launched(self, call: Call) -> None:
        """Note a launch."""
        slots = {position: self.slot(t) for position, t in tensors_of(call.arguments).items()}
        kept = replace(call, arguments=without_tensors(call.arguments))
        self.steps.append((Direct if call.kinds else Foreign)(kept, slots))

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
            return Slot(self.slot(argument))
        if isinstance(argument, list | tuple):
            return type(argument)(map(self._stored, argument))
        if isinstance(argument, dict):
            return {name: self._stored(value) for name, value in argument.items()}
        return argument


def _is_view(function: Any) -> bool:
    """Whether an operator returns its argument's memory, unchanged."""
    return any(a.alias_info is not None and not a.alias_info.is_write for a in function._schema.arguments)


def _place(tensor: Tensor) -> Any:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _needed(steps: Sequence[Step], results: set[int]) -> list[Step]:
    """The steps that the results, a launch or a change in place depend on."""
    kept: list[Step] = []
    wanted = set(results)
    for step in reversed(steps):
        if isinstance(step, Make):
            idle = step.slot not in wanted
        elif isinstance(step, Operator):
            idle = not (step.function._schema.is_mutable or wanted.intersection(step.slots))
        else:
            idle = False
        if not idle:
            wanted |= read(step)
            kept.append(step)
    return kept[::-1]


def _merged(steps: Sequence[Step], results: set[int]) -> list[Step]:
    """A fresh tensor of which only one view is used, such as a transposed one, is made as that view."""
    uses = Counter(results)
    for step in steps:
        uses.update(read(step))
    fresh = {step.slot: step for step in steps if isinstance(step, Make)}
    merged: list[Step] = []
    for step in steps:
        if isinstance(step, Operator) and step.view is not None:
            (base,) = (fresh.get(slot) for slot in read(step))
            whole = base is not None and step.view.numel() == base.tensor.numel()
            if base is not None and whole and uses[base.slot] == 1:
                seen = fresh[step.slots[0]] = Make(step.slots[0], step.view)
                merged[merged.index(base)] = seen
                continue
        merged.append(step)
    return merged


def key_of(q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, Any]) -> Any:
    """The properties of a call that a recording depends on."""
    pointers = q.data_ptr() | k.data_ptr() | v.data_ptr()
    key: list[Any] = [q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device]
    # which arguments are one and the same tensor: a recording tells slots apart by identity
    key += v.shape, v.stride(), v.dtype, v.device, scale, k is q, v is q, v is k
    if inputs:
        own = [id(q), id(k), id(v)]
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                pointers |= value.data_ptr()
                key += name, value.shape, value.stride(), value.dtype, value.device, value.requires_grad
                place = id(value)
                key.append(own.index(place) if place in own else -1)
                own.append(place)
            else:
                key += name, type(value), value
    if pointers % _ALIGNED:
        tensors = [q, k, v, *(x for x in inputs.values() if isinstance(x, Tensor))]
        key += None, tuple(t.data_ptr() % _ALIGNED for t in tensors)  # None is no input's name
    return tuple(key)


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
    forget(steps)
    replay = straight(steps, len(tensors), defaults, slots)
    return results, Recording(steps, replay, tensors[0].get_device())
