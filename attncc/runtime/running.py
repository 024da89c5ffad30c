"""The running sums of a call's inputs, in PyTorch: one small operation each, whose gradient autograd knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attncc.errors import InputError
from attncc.ir.graph import VariantGraph
from attncc.passes.running import RunningSum


def with_running_sums(
    sums: Sequence[RunningSum], graph: VariantGraph, core: VariantGraph, inputs: Mapping[str, Any], tokens: int
) -> dict[str, Any]:
    """The inputs of the core of `graph` (see `passes.running`) from those of a call with so many tokens.

    A sum is at least float32; an entry that is the same at every token (size 1) counts once a token.
    """
    needed = {d.name for d in core.inputs} | {s.name for s in core.scalars}
    found = dict(inputs)
    for s in sums:
        decl, given = graph.input(s.of), inputs.get(s.of)
        if not isinstance(given, Tensor) or given.dim() != len(decl.pattern):
            pattern = ", ".join(decl.pattern)
            raise InputError(
                f"'{graph.name}' needs the input '{s.of}' [{pattern}], a tensor of {len(decl.pattern)} dimensions",
                remedy=f"pass {s.of}=...",
            )
        if given.requires_grad and not decl.grad and torch.is_grad_enabled():
            raise InputError(
                f"the input '{s.of}' requires a gradient, but is declared without one",
                remedy=f"declare it with ac.Input(..., grad=True), or pass {s.of}.detach()",
            )
        if given.shape[s.axis] not in (1, tokens):
            raise InputError(
                f"dimension {s.axis} of the input '{s.of}' has size {given.shape[s.axis]}, expected {tokens}, "
                f"the size of {decl.pattern[s.axis]}, or 1"
            )
        shape = [tokens if i == s.axis else n for i, n in enumerate(given.shape)]
        found[s.name] = given.to(torch.promote_types(given.dtype, torch.float32)).expand(shape).cumsum(s.axis)
    return {name: x for name, x in found.items() if name in needed or name not in {s.of for s in sums}}
