"""Compute the inputs that kernels need besides the user's: see `passes.phases`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attncc.ir.graph import VariantGraph
from attncc.passes.phases import Made


class Maker:
    """Makes one input of a call. `compiled` compiles a graph to an op."""

    def __init__(self, made: Made, compiled: Callable[[VariantGraph], Any]):
        self.made = made
        self._op = compiled(made.graph)
        self._names = [*(d.name for d in made.graph.inputs), *(s.name for s in made.graph.scalars)]

    def __call__(self, q: Tensor, k: Tensor, scale: float | None, inputs: Mapping[str, Any]) -> Tensor:
        """int32 (B, Hq, M), or float32 (B, Hq, N), through which no gradient passes: the main op has those of sums."""
        read = {name: inputs[name] for name in self._names if name in inputs}
        read = {name: x.detach() if isinstance(x, Tensor) else x for name, x in read.items()}
        q, k = q.detach(), k.detach()
        with torch.no_grad():
            if not self.made.transposed:
                seen: Tensor = self._op(q, k, _ones(k), outputs="lse", **read)
                return (seen == -torch.inf).to(torch.int32)
            if k.shape[1] and q.shape[1] % k.shape[1] == 0:
                k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            scale = scale if self.made.graph.has_scale else None
            lse: Tensor = self._op(k, q, _ones(q), scale=scale, outputs="lse", **read)
            return lse


def _ones(keys: Tensor) -> Tensor:
    """v where nobody reads the output: as many as keys, of one element."""
    return keys.new_ones(1).expand(*keys.shape[:3], 1)
