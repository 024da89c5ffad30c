"""A small generated kernel, that of delta, and arguments for its launch: for tests of how kernels are launched."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget

import attncc as ac
from attncc.runtime.modules import Features

H100 = GPUTarget("cuda", 90, 32)
META = {"BLOCK_M": 32, "HAS_DLSE": False}


def delta_kernel() -> Any:
    """The kernel, loaded anew."""
    return ac.compile("causal").engine.modules.load(Features(16, 16)).delta_kernel


def arguments(length: int = 48, dtype: torch.dtype = torch.float16) -> tuple[Any, ...]:
    """The arguments of a launch for 2 sequences, 3 heads and this many queries."""
    out, dout = torch.randn(2, 2, 3, length, 16).to(dtype)
    delta = torch.empty(2, 3, length)
    return (out, dout, delta, delta, *out.stride()[:3], *dout.stride()[:3], 3, length)
