"""Refuse double backward: gradients of gradients raise an error instead of being silently wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_REFUSAL = (
    b"attncc derives gradients, and no gradients of gradients: a loss that is made of a gradient "
    b"(create_graph=True) cannot go back through this op. ac.reference(...) can, for small tensors"
)


class _Held:
    """A context whose saved tensors are fetched once, as recomputation has them."""

    def __init__(self, ctx: Any):
        self.ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)


def first_order(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """The backward of an autograd.Function whose gradients raise a RuntimeError where somebody differentiates them.

    PyTorch's `once_differentiable` refuses only where the incoming gradients are themselves to be differentiated. That
    of `out.sum()` is a constant, but the gradients depend on q, k and v all the same.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():  # no create_graph
            return backward(ctx, *grads)
        held = _Held(ctx)
        with torch.no_grad():
            found = backward(held, *grads)
        # what they depend on is an argument, too: who asks for the gradient by it alone is refused, not told of none
        origins = [x for x in held.saved_tensors if x is not None and x.requires_grad]
        refuse: Any = torch._C._functions.DelayedError(_REFUSAL, len(found) + len(origins))
        refused = refuse(*(None if x is None else x.detach().requires_grad_() for x in found), *origins)
        return tuple(refused[: len(found)])

    return once
