"""Running sums of a call's inputs, one small PyTorch operation each, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attncc.errors import InputError
from attncc.ir.graph import VariantGraph
from attncc.passes.running import RunningSum
from attncc.runtime.refusals import fail_unknown
from attncc.runtime.shapes import bound_input, sizes_of


def with_running_sums(
    sums: Sequence[RunningSum], graph: VariantGraph, core: VariantGraph, inputs: Mapping[str, Any], q: Tensor, k: Tensor
) -> dict[str, Any]:
    """The inputs of the core of `graph` (see `passes.running`) from those of a call of `graph` with these tensors.

    A sum is at least float32; an entry that is the same at every token (size 1) counts once a token. InputError where
    an input that is summed, or a name, does not match `graph`.
    """
    if not inputs.keys() <= {d.name for d in graph.inputs} | {s.name for s in graph.scalars}:
        fail_unknown(graph, inputs)
    needed = {d.name for d in core.inputs} | {s.name for s in core.scalars}
    sizes, found = sizes_of(q, k), dict(inputs)
    for s in sums:
        decl = graph.input(s.of)
        given = bound_input(graph, decl, inputs, sizes, q.device)
        tokens = sizes.get(decl.pattern[s.axis], sizes["kv_idx"])
        if given.shape[s.axis] not in (1, tokens):
            raise InputError(
                f"dimension {s.axis} of the input '{s.of}' has size {given.shape[s.axis]}, expected {tokens}, "
                f"the tokens that are summed, or 1"
            )
        shape = [tokens if i == s.axis else n for i, n in enumerate(given.shape)]
        found[s.name] = given.to(torch.promote_types(given.dtype, torch.float32)).expand(shape).cumsum(s.axis)
    return {name: x for name, x in found.items() if name in needed or name not in {s.of for s in sums}}
