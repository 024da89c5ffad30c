"""Random tensors for any variant, from the declarations of its inputs and its formula."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor

from attncc.ir.graph import HEAD_DIM, InputDecl, VariantGraph
from attncc.ir.vocabulary import Read, cumsum
from attncc.passes.running import running_sums

#: the size that a free dimension gets
FREE_SIZE = 32


@dataclass(frozen=True)
class Shape:
    """The sizes of a call. `strided` makes q, k, v transposed views of (batch, length, heads, dim) tensors.

    The loop dimensions in `broadcast` have size 1 in the inputs. `d_qk` is that of one branch; with `shared_key` a
    variant with several has one k for all. `values`: heads of v for each head of k. Where v is part of k, d_qk counts
    what k has besides.
    """

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    d_qk: int
    d_v: int
    strided: bool = False
    broadcast: tuple[str, ...] = ()
    shared_key: bool = False
    values: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """The loop sizes by their names in a formula."""
        return {
            "b": self.batch,
            "h": self.heads,
            "h_kv": self.kv_heads,
            "q_idx": self.q_len,
            "kv_idx": self.kv_len,
        }

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}" if self.heads != self.kv_heads else f"{self.heads}"
        dims = f"{self.d_qk}/{self.d_v}" if self.d_qk != self.d_v else f"{self.d_qk}"
        notes = " strided" * self.strided + f" {','.join(self.broadcast)}=1" * bool(self.broadcast)
        return f"B{self.batch} H{heads} M{self.q_len} N{self.kv_len} D{dims}{notes}"


@dataclass(frozen=True)
class Sample:
    """The arguments of one call: q, k, v (None where it is part of k), and each input and scalar by name."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    inputs: dict[str, Any] = field(default_factory=dict)


def sample_inputs(
    graph: VariantGraph, shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Sample:
    """Arguments for `graph`, the same on every device. No tensor requires a gradient.

    q, k, v are normal. An input with a default has it; another float input is normal, or within [0.5, 1.5] where the
    formula divides by it, takes its logarithm or a root of it; what is summed along the tokens is a little below 0, as
    the logs of gates are, or above 0 where exponents have the sum times what is below; vectors over the head dimension
    are about as long as 1;
    a recurrence, whose state should neither grow nor vanish, has keys of length 1, factors of tokens between 0 and 1,
    and exponents a little below 0;
    integers along the sequence are sorted ids, as documents
    have them, and others are lengths up to the number of keys. An int scalar whose default is longer than the sequence
    is a third of it, so that a window hides something.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def sequence(heads: int, length: int, dim: int) -> Tensor:
        size = (shape.batch, length, heads, dim) if shape.strided else (shape.batch, heads, length, dim)
        tensor = normal(*size).to(device, dtype)
        return tensor.transpose(1, 2) if shape.strided else tensor

    d_qk = shape.d_qk + (graph.value or 0)
    q = sequence(shape.heads, shape.q_len, graph.branches * d_qk)
    k = sequence(shape.kv_heads, shape.kv_len, (1 if shape.shared_key else graph.branches) * d_qk)
    v = sequence(shape.kv_heads * shape.values, shape.kv_len, shape.d_v) if graph.value is None else None
    if graph.recurrent:
        k = torch.nn.functional.normalize(k.float(), dim=-1).to(dtype)
    positive = _positive(graph)
    gates = {s.of for s in running_sums(graph)} | _exponents(graph)
    inputs: dict[str, Any] = {}
    for decl in graph.inputs:
        if decl.default is not None:
            value = torch.as_tensor(decl.default(shape.sizes)).detach()
        elif decl.dtype == "int":
            value = _integers(graph, decl, shape, generator)
        elif decl.name in positive:
            value = 0.5 + torch.rand(_size(graph, decl, shape), generator=generator)
        elif decl.name in gates:
            value = -min(0.2, 8 / max(shape.kv_len, 1)) * torch.rand(_size(graph, decl, shape), generator=generator)
        elif graph.recurrent:
            value = torch.rand(_size(graph, decl, shape), generator=generator)
        elif decl.name in graph.vectors:
            value = shape.d_qk**-0.5 * normal(*_size(graph, decl, shape))
        else:
            value = 0.5 * normal(*_size(graph, decl, shape))
        # what is as large as the scores is stored like them; small parameters are float32
        dense = {"q_idx", "kv_idx"} <= set(decl.pattern)
        kind = torch.int32 if decl.dtype == "int" else dtype if dense else torch.promote_types(dtype, torch.float32)
        inputs[decl.name] = value.to(device, kind)
    inputs |= {name: -inputs[name] for name in _times_negative(graph, inputs)}
    for scalar in graph.scalars:
        third = max(shape.kv_len // 3, 1)
        inputs[scalar.name] = third if scalar.is_int and scalar.default > shape.kv_len else scalar.default
    return Sample(q, k, v, inputs)


def _size(graph: VariantGraph, decl: InputDecl, shape: Shape) -> list[int]:
    sizes = {**shape.sizes, **dict.fromkeys(shape.broadcast, 1)}
    if decl.name in graph.vectors:
        sizes[HEAD_DIM] = shape.d_qk
    return [sizes.get(d, FREE_SIZE) for d in decl.pattern]


def _integers(graph: VariantGraph, decl: InputDecl, shape: Shape, generator: torch.Generator) -> Tensor:
    size = _size(graph, decl, shape)
    if decl.pattern and decl.pattern[-1] in ("q_idx", "kv_idx"):
        return torch.randint(0, 2 + size[-1] // 24, size, generator=generator).sort(-1).values
    return torch.randint(0, shape.kv_len + 1, size, generator=generator)


def _exponents(graph: VariantGraph) -> set[str]:
    """The inputs that a recurrence has in its exponents, as the log of what a token leaves of the state."""
    if not graph.recurrent:
        return set()
    return {r.input for s in graph.stages for e in s.expr.atoms(sympy.exp) for r in e.args[0].atoms(Read)}


def _times_negative(graph: VariantGraph, inputs: dict[str, Any]) -> set[str]:
    """The inputs whose running sums an exponent has times an input that is below 0: they would grow, not decay."""
    found: set[str] = set()
    for stage in graph.stages:
        products = {m for power in stage.expr.atoms(sympy.exp) for m in power.args[0].atoms(sympy.Mul)}
        for product in products:
            sums = {s.args[0].input for s in product.atoms(cumsum)}
            factors = [inputs[f.input].double().mean().sign().item() for f in product.args if isinstance(f, Read)]
            if math.prod(factors) < 0:
                found |= sums
    return found


def _positive(graph: VariantGraph) -> set[str]:
    """The inputs that the formula divides by, or takes a logarithm or a root of."""
    found: set[str] = set()
    for stage in graph.stages:
        for node in stage.expr.atoms(sympy.Pow, sympy.log):
            if isinstance(node, sympy.log) or not (node.exp.is_Integer and node.exp > 0):
                found |= {read.input for read in node.args[0].atoms(Read)}
    return found
