"""Plain PyTorch by hand beside an op: the pieces that tests of variants share. Everything in float64."""

from __future__ import annotations

import torch

import attncc as ac


def rep(x, heads):
    return x.repeat_interleave(heads // x.shape[1], 1)


def causal(m, n):
    return torch.ones(m, n, dtype=torch.bool).tril(n - m)


def softmax(scores, shown):
    """Over the shown keys; a row without any is all 0."""
    p = scores.masked_fill(~shown, float("-inf")).softmax(-1)
    return torch.where(shown.any(-1, keepdim=True), p, 0.0)


def score(q, k):
    return q @ rep(k, q.shape[1]).mT * q.shape[-1] ** -0.5


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agree(variant, oracle, arguments, dtype=torch.float32, tolerance=2e-5, **inputs):
    """The op, in `dtype`, against a function of plain PyTorch in float64: its result and every gradient."""
    leaves = [x.to(dtype).requires_grad_() for x in arguments]
    own = {n: x.float().requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    exact = [x.detach().double().requires_grad_() for x in leaves]
    exact_own = {n: x.detach().double().requires_grad_() if x.is_floating_point() else x for n, x in own.items()}
    got, want = ac.compile(variant)(*leaves, **own), oracle(*exact, **exact_own)
    assert got.dtype == dtype
    assert got.isfinite().all()
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    cotangent = draw(*want.shape, seed=9).to(dtype)
    names = [n for n, x in own.items() if x.is_floating_point()]
    found = torch.autograd.grad(got, (*leaves, *(own[n] for n in names)), cotangent)
    wanted = torch.autograd.grad(want, (*exact, *(exact_own[n] for n in names)), cotangent.double())
    for name, a, b in zip((*"qkv"[: len(leaves)], *names), found, wanted, strict=True):
        largest = b.abs().max().clamp_min(1)
        torch.testing.assert_close(
            a.double() / largest, b / largest, rtol=0, atol=5 * tolerance, msg=lambda m, n=name: f"d{n}: {m}"
        )


HALF = {"dtype": torch.float16, "tolerance": 2e-3}
