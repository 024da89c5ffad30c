"""What a user would call instead: FlexAttention, PyTorch's SDPA backends, plain PyTorch under torch.compile."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attncc as ac
from attncc.schedule.problem import Backend
from bench.case import Case, Shape, Tensors
from bench.dense_cases import CAUSAL, FULL

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

SDPA = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@cache
def _compiled_flex() -> Callable[..., Any]:
    # One compiled function serves all cases; each case is a recompilation of it, so the limit must not end the run.
    torch._dynamo.config.recompile_limit = 10_000
    torch._dynamo.config.accumulated_recompile_limit = 100_000
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return compiled


def flex(case: Case, shape: Shape, inputs: Tensors, *, compile_mask: bool = False) -> Attend:
    """FlexAttention for a case that has a flex form. `compile_mask` builds the block mask without an M x N tensor."""
    assert case.flex is not None
    form = case.flex
    score_mod = form.score_mod(shape, inputs) if form.score_mod else None
    block_mask = None
    if form.mask_mod:
        block_mask = create_block_mask(
            form.mask_mod(shape, inputs), None, None, shape.m, shape.n, device="cuda", _compile=compile_mask
        )
    run = _compiled_flex()
    gqa = shape.group > 1
    return lambda q, k, v: run(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=gqa)


def sdpa(backend: str, case: Case, shape: Shape) -> Attend:
    """One SDPA backend, "fa2" or "cudnn", for a case with an SDPA form."""
    options = dict(case.sdpa or {}, enable_gqa=shape.group > 1)
    kind = SDPA[backend]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return run


def has_fa4() -> bool:
    """Is FlashAttention-4 installed? Its wheels have no place in a package index of ours."""
    try:
        return all(find_spec(name) is not None for name in ("flash_attn.cute", "cutlass"))
    except ModuleNotFoundError:
        return False


def fa4(case: Case) -> Attend:
    """FlashAttention-4 for a case with an SDPA form. Its tensors are (B, L, H, D): views of ours."""
    from flash_attn.cute import flash_attn_func

    causal = bool((case.sdpa or {}).get("is_causal", False))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)
        out: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return out.transpose(1, 2)

    return run


def triton(case: Case, shape: Shape, inputs: Tensors) -> Attend:
    """Our own Triton kernels, where ours are those of another backend."""
    op = ac.compile(case.variant, plan="parallel", backend="triton")
    return lambda *operands: op(*operands, **inputs)


def own_softmax(case: Case, shape: Shape, inputs: Tensors, *, backend: Backend | None = None) -> Attend:
    """Our own softmax over as many pairs, in the same race: figures of two races are of two clocks."""
    plain = FULL if case.area(shape.m, shape.n) == shape.m * shape.n else CAUSAL
    op = ac.compile(plain.variant, plan="parallel", backend=backend)
    return lambda *operands: op(*operands)


def compiled_sigmoid(shape: Shape) -> Attend:
    """Causal sigmoid attention as plain PyTorch under torch.compile: an M x N tensor a head."""
    visible = torch.ones(shape.m, shape.n, dtype=torch.bool, device="cuda").tril()

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        score = (q @ k.transpose(-1, -2)) * shape.d**-0.5 - math.log(shape.n)
        return torch.where(visible, torch.sigmoid(score), 0).to(q.dtype) @ v

    compiled: Attend = torch.compile(run, dynamic=False)
    return compiled
