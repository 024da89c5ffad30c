"""Compile the steps of a recorded call to one straight-line Python function: values that are the same in every call are
constants of it, and each tensor and address is a variable.

    def replay(stream, t0, t1):                     the call's own tensors
        t2 = empty(shape2, strides2, dtype2)        an allocation
        p0, p2 = t0.data_ptr(), t2.data_ptr()
        try: ...                                    a launch: its arguments are prepared, except for addresses
        launch, cell0, cell2 = ...
        cell0.value, cell2.value = p0, p2
        launch(stream)
        t3 = operator(t2, [t1, None], **words)      a PyTorch operator
        return t2, t3
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attncc.runtime.steps import Direct, Foreign, Make, Operator, Slot, Step, slots_in, tensors_in

try:  # what TorchInductor's own output allocates with: half the time of torch.empty_strided
    from torch._C._dynamo.guards import _empty_strided_cuda as _empty  # type: ignore[attr-defined]
except ImportError:

    def _empty(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype, device="cuda")


def straight(
    steps: Sequence[Step], given: int, defaults: Sequence[Tensor], results: Sequence[int | None]
) -> Callable[..., tuple[Any, ...]]:
    """`replay(stream, *tensors)` of `given` tensors, whose slots come first; then come those of `defaults`. Returns the
    tensors of `results`, None for None."""
    writer = _Writer()
    for place, tensor in enumerate(defaults, given):
        writer.names[f"t{place}"] = tensor
    for step in steps:
        writer.write(step)
    own = "".join(f", t{slot}" for slot in range(given))
    found = "".join("None, " if slot is None else f"t{slot}, " for slot in results)
    body = "\n".join(f"    {line}" for line in (*writer.lines, f"return ({found})"))
    exec(compile(f"def replay(stream{own}):\n{body}\n", "<a recorded call>", "exec"), writer.names)
    function: Callable[..., tuple[Any, ...]] = writer.names["replay"]
    return function


class _Writer:
    """The lines of a function, and the constants that they name."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.names: dict[str, Any] = {"empty": _empty, "tensors_in": tensors_in}
        self._addressed: set[int] = set()

    def write(self, step: Step) -> None:
        """The lines of one step."""
        if isinstance(step, Make):
            shape, strides, dtype = (self._constant(fact) for fact in step.facts)
            self.lines.append(f"t{step.slot} = empty({shape}, {strides}, {dtype})")
        elif isinstance(step, Operator):
            self._operator(step)
        elif isinstance(step, Direct):
            self._direct(step)
        else:
            self._foreign(step)

    def _operator(self, step: Operator) -> None:
        arguments = [self._expression(a) for a in step.args]
        if step.kwargs:
            arguments.append(f"**{self._expression(step.kwargs)}")
        call = f"{self._constant(step.function)}({', '.join(arguments)})"
        if step.single:
            call = f"t{step.slots[0]} = {call}"
        elif step.slots:
            call = f"{''.join(f't{slot}, ' for slot in step.slots)}= tensors_in({call})"
        self.lines.append(call)
        if step.function._schema.is_mutable:  # which may give its argument other memory
            self._addressed.clear()

    def _direct(self, step: Direct) -> None:
        for slot in sorted(set(step.slots.values()) - self._addressed):
            self.lines.append(f"p{slot} = t{slot}.data_ptr()")
            self._addressed.add(slot)
        take, put, make = (self._constant(f) for f in (step.shelf.pop, step.shelf.append, step.made))
        addresses = ", ".join(f"p{slot}" for slot in step.slots.values())
        self.lines += ["try:", f"    taken = {take}()", "except IndexError:", f"    taken = {make}({addresses})"]
        cells, boxes = ([f"{kind}{i}" for i in range(len(of))] for kind, of in (("c", step.cells), ("b", step.boxes)))
        self.lines.append(f"launch, {''.join(f'{name}, ' for name in cells + boxes)}= taken")
        self.lines += [f"{cell}.value = p{slot}" for cell, slot in zip(cells, step.cells, strict=True)]
        for box, slot in zip(boxes, step.boxes, strict=True):
            # mostly not: in each step of a training memory is given out in the same order
            self.lines.append(f"if {box}.pointer != p{slot}: {box}.point(p{slot})")
        self.lines += ["launch(stream)", f"{put}(taken)"]

    def _foreign(self, step: Foreign) -> None:
        self.lines.append(f"{self._constant(step)}(stream, {', '.join(f't{slot}' for slot in step.slots.values())})")

    def _expression(self, argument: Any) -> str:
        """An operator's argument: constants by name, with the tensors of its slots."""
        if type(argument) is Slot:
            return f"t{int(argument)}"
        if not slots_in(argument):
            return self._constant(argument)
        if isinstance(argument, dict):
            return "{" + ", ".join(f"{name!r}: {self._expression(value)}" for name, value in argument.items()) + "}"
        elements = "".join(f"{self._expression(a)}, " for a in argument)
        return f"[{elements}]" if isinstance(argument, list) else f"({elements})"

    def _constant(self, value: Any) -> str:
        """A name for a value."""
        name = f"k{len(self.names)}"
        self.names[name] = value
        return name
