"""A fresh process that compiles one attention and calls it once: `python -m bench.cold NAME` prints seconds.

The clock starts when everything is imported, the GPU context exists, the tensors are there, and PyTorch has run a
backward of its own: the first that is given a gradient imports much of PyTorch. It stops when the gradients are there:
what is counted is the formula, its compilation or look-up, the loading of kernels, one forward and one backward. The
contestants `attncc` and `flex` get causal attention with a linear bias at the size of a unit test, those in linear time
more tokens, so that they are called by chunks.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F

SLOPE = 0.01
SIZE = (1, 8, 1024, 128)
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def variant() -> Any:
    """The formula in attncc's language."""
    import attncc as ac

    return ac.Variant(name="cold", score=lambda score, q_idx, kv_idx: score + SLOPE * (kv_idx - q_idx), mask=ac.causal)


def attncc() -> Attend:
    """attncc, from formula to op."""
    import attncc as ac

    op: Attend = ac.compile(variant())
    return op


def flex() -> Attend:
    """FlexAttention, its block mask included."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    length = SIZE[2]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cuda")
    return lambda q, k, v: compiled(q, k, v, score_mod=lambda s, b, h, i, j: s + SLOPE * (j - i), block_mask=mask)


def in_linear_time(name: str) -> Attend:
    """A shipped variant in linear time, its gates among what is learned."""
    import attncc as ac

    op = ac.compile(name)
    b, h, m, _ = sizes(name)
    factors = {"g": F.logsigmoid(torch.randn(b, h, m, device="cuda")).requires_grad_()}
    if name == "gated_delta_net":
        factors["beta"] = torch.rand(b, h, m, device="cuda").requires_grad_()
    return lambda q, k, v: op(q, k, v, **factors)


def sizes(name: str) -> tuple[int, int, int, int]:
    """(B, H, N, D) of a contestant's call."""
    return (1, 8, 8192, 128) if name in LINEAR else SIZE


LINEAR = ("simple_gla", "gated_delta_net")
BUILDERS = {"attncc": attncc, "flex": flex, **{name: partial(in_linear_time, name) for name in LINEAR}}
_OURS = ("triton", "attncc", "attncc.runtime.compile")
#: what a program that uses the contestant has imported anyway
IMPORTS = {
    "flex": ("triton", "torch.nn.attention.flex_attention", "torch._dynamo"),
    **dict.fromkeys(("attncc", *LINEAR), _OURS),
}


def main(name: str) -> None:
    """Time one contestant and print its row."""
    started = time.perf_counter()
    for module in IMPORTS[name]:
        import_module(module)
    imported = time.perf_counter()
    q, k, v = (F.normalize(torch.randn(sizes(name), device="cuda"), dim=-1).bfloat16() for _ in range(3))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    grad = torch.randn_like(q)
    torch.ones(2, device="cuda", requires_grad=True).exp().backward(torch.ones(2, device="cuda"))
    torch.cuda.synchronize()

    start = time.perf_counter()
    out = BUILDERS[name]()(q, k, v)
    torch.cuda.synchronize()
    middle = time.perf_counter()
    out.backward(grad)
    torch.cuda.synchronize()
    end = time.perf_counter()
    assert all(bool(t.grad.isfinite().all()) for t in (q, k, v) if t.grad is not None)
    print(
        json.dumps(
            {
                "import_s": imported - started,
                "forward_s": middle - start,
                "backward_s": end - middle,
                "total_s": end - start,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
