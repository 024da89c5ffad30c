"""Check candidates at full size. Only there the launch is that of real calls: a grid with more tiles than the GPU has
SMs is scheduled differently, and by another binary, than a slice.

The results of the first correct candidate are checked against the reference for one key head, as far as memory allows,
and those of all others against the first, everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attncc.ir import symbols as sym
from attncc.ir.graph import VariantGraph
from attncc.runtime.reference import largest_score, reference
from attncc.runtime.samples import Shape
from attncc.runtime.verify import Kind, check, eager

#: bytes that the reference takes for a pair of a query and a key, with its gradients (softmax: 200; other formulas keep
#: more), and how many there are without a GPU
PAIR_BYTES, ROOM = 400, 2**30
#: how far two results may be apart, RMS over RMS, each of which may be half of it off the reference
APART = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 2e-5}


class FullSize:
    """The correct results of one call at full size: its tensors by name (q, k and, unless it is part of k, v), its
    inputs and scalars, and the cotangent of its output."""

    def __init__(
        self, graph: VariantGraph, shape: Shape, qkv: Mapping[str, Tensor], inputs: Mapping[str, Any], dout: Tensor
    ):
        self._graph, self._shape, self._qkv, self._inputs, self._dout = graph, shape, qkv, inputs, dout
        self._right: dict[bool, dict[str, Tensor]] = {}
        #: whether the reference had no room, so that candidates were held against each other alone
        self.cramped = False

    def wrong(self, results: Mapping[str, Tensor], gradients: bool) -> list[str]:
        """Which results, of a forward or of a backward, are not right: those of later ones are told by the first.

        Gradients of the inputs beside q, k and v are not looked at: they are sums that may cancel.
        """
        held = {name: x for name, x in results.items() if name in ("out", "dq", "dk", "dv")}
        known = self._right.get(gradients)
        if known is not None:
            limit = APART[self._dout.dtype]
            return [name for name, x in held.items() if not _distance(x, known[name]) <= limit]
        found = self._against_reference(held, gradients)
        if not found:
            self._right[gradients] = held
        return found

    def _against_reference(self, results: Mapping[str, Tensor], gradients: bool) -> list[str]:
        """The results that differ from the reference, for the first sequence and its first key head."""
        shape = self._shape
        group, key_heads = shape.heads // shape.kv_heads, 1
        if any(sym.NUM_HEADS in stage.expr.free_symbols for stage in self._graph.stages):
            group, key_heads = shape.heads, shape.kv_heads  # to whom the number of heads is something
        if group * shape.q_len * shape.kv_len * PAIR_BYTES > _room(self._dout.device):
            self.cramped = True
            return []
        places = {"b": 1, "h": group, "h_kv": key_heads}
        heads = {"q": group, "k": key_heads, "v": key_heads * shape.values}
        part = {name: t.detach()[:1, : heads[name]] for name, t in self._qkv.items()}
        inputs = dict(self._inputs)
        for decl in self._graph.inputs:
            cut = tuple(slice(places.get(d)) for d in decl.pattern)
            inputs[decl.name] = self._inputs[decl.name].detach()[cut]
        dout = self._dout[:1, : group * shape.values]
        try:
            exact = self._results(reference, {name: t.double() for name, t in part.items()}, inputs, dout, gradients)
            plain = self._results(eager, part, inputs, dout, gradients)
            score = largest_score(self._graph, *part.values(), **inputs) if gradients else 0.0
        except torch.OutOfMemoryError:  # it keeps more than was thought
            torch.cuda.empty_cache()
            self.cramped = True
            return []
        kind: Kind = "gradient" if gradients else "forward"
        rows = [
            check(name, x[: len(exact[name]), : exact[name].shape[1]], exact[name], plain[name], kind, score=score)
            for name, x in results.items()
        ]
        return [row.name for row in rows if not row.ok]

    def _results(
        self,
        function: Callable[..., Tensor],
        qkv: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
        dout: Tensor,
        gradients: bool,
    ) -> dict[str, Tensor]:
        """out, or dq, dk and dv, as the reference or plain PyTorch has them."""
        leaves = {name: t.requires_grad_(gradients) for name, t in qkv.items()}
        out = function(self._graph, *leaves.values(), **inputs)
        if not gradients:
            return {"out": out}
        found = torch.autograd.grad(out, tuple(leaves.values()), dout.to(out.dtype), materialize_grads=True)
        return {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}


def _distance(x: Tensor, other: Tensor) -> float:
    """RMS of the difference over that of `other`; 0 where both are 0. In float32, for the tensors are large."""
    size = other.float().square().mean().sqrt()
    apart = (x.float() - other.float()).square().mean().sqrt()
    return float(torch.where(apart == 0, apart, apart / size))


def _room(device: torch.device) -> int:
    """Bytes that the reference may take."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else ROOM
