"""An output's own expression over its reductions, in PyTorch: `maximum(count, 1)` of a mean, the sign of an entropy.

The kernels compute the reductions; what is left is elementwise on the output, and PyTorch's autograd sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attncc.ir.graph import LOOP_DIMS, VariantGraph
from attncc.ir.outputs import Output
from attncc.ir.vocabulary import where
from attncc.runtime.evaluate import evaluate
from attncc.runtime.shapes import Bound

#: the dimension of each index in an output (B, Hq, cells...)
_AXES = {"b": 0, "h": 1, "h_kv": 1, "q_idx": 2, "kv_idx": 2}


def finish(
    graph: VariantGraph, output: Output, values: Mapping[str, Tensor], bound: Bound, number: torch.dtype
) -> Tensor:
    """The output from its reductions by symbol name. `number` is the dtype of arithmetic on integers."""
    if output.expr.is_Symbol:
        return values[output.expr.name]
    first = next(iter(values.values()))
    used = {s.name for s in output.expr.free_symbols}
    env: dict[str, Any] = {**values, **_program(bound)}
    for name in used & set(_AXES):
        size = bound.sizes["h" if name == "h_kv" else name]
        index = torch.arange(size, device=first.device)
        if name == "h_kv":
            index = index // (bound.sizes["h"] // bound.sizes["h_kv"])
        env[name] = index.reshape([-1 if axis == _AXES[name] else 1 for axis in range(first.dim())])
    for decl in graph.inputs:
        if decl.name in used:
            tensor = bound.tensors[decl.name]
            if tensor.is_floating_point():
                tensor = tensor.to(torch.promote_types(tensor.dtype, number))
            env[decl.name] = tensor.expand([bound.sizes[d] if d in LOOP_DIMS else -1 for d in decl.pattern])
    if isinstance(output.expr, where):
        # a cell without a pair has no part in any gradient either
        live = evaluate(output.expr.args[0], env, number, first.device)
        env |= {name: torch.where(live, x, 1) for name, x in values.items()}
        return torch.where(live, evaluate(output.expr.args[1], env, number, first.device), 0).expand(first.shape)
    return evaluate(output.expr, env, number, first.device).expand(first.shape)


def _program(bound: Bound) -> dict[str, Any]:
    sizes = bound.sizes
    return {"q_len": sizes["q_idx"], "kv_len": sizes["kv_idx"], "num_heads": sizes["h"], **bound.scalars}
