"""Times of PyTorch's own attention at the same sizes.

A yardstick, not an implementation of the same formula: SDPA's backends support no more than a causal mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attncc.ir.graph import VariantGraph
from attncc.runtime.samples import Shape

#: names that users know, of the backends that SDPA can be held to
BACKENDS = {
    "cuDNN": "CUDNN_ATTENTION",
    "FlashAttention-2": "FLASH_ATTENTION",
    "memory-efficient": "EFFICIENT_ATTENTION",
}


def says_the_same(graph: VariantGraph) -> bool | None:
    """Whether SDPA's `is_causal` makes it the variant itself; None where the variant is something else."""
    from attncc import variants

    for name, is_causal in (("full", False), ("causal", True)):
        if graph.core == variants.get(name).graph:
            return is_causal
    return None


def contestants(graph: VariantGraph, shape: Shape, qkv: tuple[Tensor, ...]) -> Mapping[str, Callable[[], Tensor]]:
    """Calls of PyTorch's attention at these sizes, by name; none where v is part of k, or has heads of its own."""
    if len(qkv) != 3 or shape.values > 1:
        return {}
    same = says_the_same(graph)
    # its causal mask starts at the first key, not at the last: with other lengths it is another mask
    is_causal = bool(same) and shape.q_len == shape.kv_len
    options = {"is_causal": is_causal, "enable_gqa": shape.heads != shape.kv_heads}
    whole = same is False or is_causal or (same and shape.q_len == 1)
    label = "" if whole else " (without the mask)" if same else " (plain softmax)"
    return {f"{name}{label}": _held(backend, qkv, options) for name, backend in BACKENDS.items()}


def _held(backend: str, qkv: tuple[Tensor, ...], options: Mapping[str, Any]) -> Callable[[], Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = qkv

    def run() -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return run


def times(
    calls: Mapping[str, Callable[[], Tensor]],
    qkv: tuple[Tensor, ...],
    time: Callable[[Callable[[], Any]], float],
    backward: bool,
) -> dict[str, tuple[float | None, float | None]]:
    """Microseconds of forward and backward of each call; None where it refuses these tensors, or is not asked.

    `qkv` want gradients if `backward`; `time` is what a call's microseconds are told by.
    """
    found: dict[str, tuple[float | None, float | None]] = {}
    for name, call in calls.items():
        try:
            with torch.no_grad():
                forward = time(call)
            found[name] = (forward, _backward_us(call, qkv, time) if backward else None)
        except RuntimeError:  # no such kernel for these tensors
            found[name] = (None, None)
    return found


def _backward_us(
    call: Callable[[], Tensor], qkv: tuple[Tensor, ...], time: Callable[[Callable[[], Any]], float]
) -> float:
    out = call()
    dout = torch.randn_like(out)
    return time(lambda: torch.autograd.grad(out, qkv, dout, retain_graph=True))
