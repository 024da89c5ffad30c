"""The operands of kernels for a checked call: its tensors and, for a backward, saved results and their gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attncc.runtime.launch import ghost
from attncc.runtime.shapes import Bound


class Operands(NamedTuple):
    """A checked call: q, k, v, and what the names of its variant are bound to."""

    bound: Bound
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def device(self) -> torch.device:
        """Where all its tensors are."""
        return self.q.device

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As the functions of a generated module take them first."""
        bound = self.bound
        return (self.q, self.k, self.v, *bound.tensors.values(), *bound.scalars.values(), bound.scale)

    def ghosts(self) -> Operands:
        """The same call on tensors without storage."""
        bound, *qkv = self
        return Operands(bound.among({name: ghost(x) for name, x in bound.tensors.items()}), *map(ghost, qkv))

    def graded(self) -> tuple[str, ...]:
        """The inputs that require a gradient."""
        return tuple(name for name, x in self.bound.tensors.items() if x.requires_grad)


class Adjoint(NamedTuple):
    """The further operands of a backward: out (B, Hq, M, Dv), the rows that the forward `saved`, the gradients of out
    and of lse (None if lse was not used), and the inputs whose gradients are wanted."""

    out: Tensor
    saved: tuple[Tensor, ...]
    dout: Tensor
    dlse: Tensor | None
    wanted: tuple[str, ...]
