"""The steps of a recorded call. Every tensor is a slot: one of the call's own, or one that a step creates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from attncc.runtime.arguments import Cells, moved
from attncc.runtime.cuda import Function
from attncc.runtime.launch import Call, launch_compiled


class Slot(int):
    """A tensor's place among those of a call, where it stands for an argument."""


class Make:
    """An allocation. `tensor` is the recorded call's, until `forget`."""

    def __init__(self, slot: int, made: Tensor):
        self.slot, self.tensor = slot, made
        self.facts = (tuple(made.shape), made.stride(), made.dtype)


class Operator:
    """A call of one of PyTorch's operators, on slots and constants. It returns `slots`, as a tensor where it is
    `single`; `view` is the recorded call's result where it is its argument's memory."""

    def __init__(self, function: Any, args: Any, kwargs: Any, view: Tensor | None = None, single: bool = True):
        self.function, self.args, self.kwargs, self.view, self.single = function, args, kwargs, view, single
        self.slots: list[int] = []


class Direct:
    """A launch of a binary. `slots` are those of its tensors, by position among its arguments.

    Each thread that makes it takes a set of what is `made` from the shelf, and puts it back: the launch, the cells of
    its addresses and its descriptors, of the slots in `cells` and `boxes`.
    """

    def __init__(self, call: Call, slots: Mapping[int, int]):
        self._function: Function = call.kernel
        self._call, self.slots = call, slots
        described = {position for position, kind in enumerate(call.kinds) if not kind.startswith("*")}
        self.cells = [slot for position, slot in slots.items() if position not in described]
        self.boxes = [slot for position, slot in slots.items() if position in described]
        self.shelf: list[tuple[Any, ...]] = []

    def made(self, *addresses: int) -> tuple[Any, ...]:
        """The launch, then its cells, then its descriptors, for tensors at these addresses, one for each slot."""
        at = dict(zip(self.slots, addresses, strict=True))
        made = Cells(self._call.kinds, self._call.arguments, self._call.boxes, at)
        cells, boxes = made.movable()
        return self._function.ready(self._call.grid, made.addresses), *cells, *boxes


class Foreign:
    """A launch that Triton makes."""

    def __init__(self, call: Call, slots: Mapping[int, int]):
        self._compiled, self._grid, self._arguments, self.slots = call.kernel, call.grid, call.arguments, slots

    def __call__(self, stream: int, *tensors: Tensor) -> None:
        """Launch it on other tensors, one for each slot."""
        arguments = list(self._arguments)
        for position, tensor in zip(self.slots, tensors, strict=True):
            box = arguments[position]
            arguments[position] = tensor if box is None else moved(box, tensor)
        launch_compiled(self._compiled, self._grid, stream, arguments)


Step: TypeAlias = Make | Operator | Direct | Foreign


def tensors_in(results: Any) -> list[Tensor]:
    """The tensors that an operator returns, in order."""
    found = results if isinstance(results, list | tuple) else (results,)
    return [t for t in found if isinstance(t, Tensor)]


def slots_in(argument: Any) -> set[int]:
    """The slots that an operator's argument reads."""
    if type(argument) is Slot:
        return {int(argument)}
    if isinstance(argument, list | tuple):
        return set().union(*map(slots_in, argument))
    if type(argument) is dict:
        return slots_in(list(argument.values()))
    return set()


def read(step: Step) -> set[int]:
    """The slots that a step reads."""
    if isinstance(step, Make):
        return set()
    return slots_in((step.args, step.kwargs)) if isinstance(step, Operator) else set(step.slots.values())


def forget(steps: Sequence[Step]) -> None:
    """Let no tensor of the recorded call stay alive."""
    for step in steps:
        if isinstance(step, Make):
            del step.tensor
        elif isinstance(step, Operator):
            del step.view
