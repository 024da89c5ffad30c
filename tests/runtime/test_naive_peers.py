"""Plans in linear time against the plain loops that flash-linear-attention ships as its references, gradients included.

They are not ours, and not always installed: `pip install flash-linear-attention` has them.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

import attncc as ac

pytest.importorskip("fla", reason="flash-linear-attention is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, H, N, D = 1, 3, 45, 16


def naive(path: str):
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"fla.ops.{module}"), name)


def of_heads(path: str):
    """A loop whose tensors are (B, H, N, D)."""
    return lambda q, k, v, *factors: _first(naive(path)(q, k, v, *factors))


def of_tokens(path: str):
    """A loop whose tensors are (B, N, H, D)."""

    def call(*tensors):
        return _first(naive(path)(*(x.transpose(1, 2) for x in tensors))).transpose(1, 2)

    return call


def _first(found):
    return found[0] if isinstance(found, tuple) else found


def gate(*more: int):
    return F.logsigmoid(torch.randn(B, H, N, *more))


def beta():
    return torch.sigmoid(torch.randn(B, H, N))


CASES = {
    "retention": (of_heads("retention.naive.naive_retention"), dict),
    "simple_gla": (of_tokens("simple_gla.naive.naive_recurrent_simple_gla"), lambda: {"g": gate()}),
    "gla": (of_tokens("gla.naive.naive_recurrent_gla"), lambda: {"g": gate(D)}),
    "rwkv6": (
        lambda q, k, v, g, u: naive("rwkv6.recurrent_naive.naive_recurrent_rwkv6")(q, k, v, g, u, 1.0)[0],
        lambda: {"g": gate(D), "u": torch.randn(H, D)},
    ),
    "taylor_causal": (of_heads("based.naive.naive_parallel_based"), dict),
    "delta_net": (of_heads("delta_rule.naive.delta_rule_recurrence"), lambda: {"beta": beta()}),
    "gated_delta_net": (
        of_tokens("gated_delta_rule.naive.naive_recurrent_gated_delta_rule"),
        lambda: {"beta": beta(), "g": gate()},
    ),
}


@pytest.mark.parametrize("plan", ["chunk", "recurrent"])
@pytest.mark.parametrize("name", CASES)
def test_plans_are_the_peers_loops(name, plan):
    theirs, make = CASES[name]
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, N, D) for _ in range(3))
    factors = make()
    leaves = [x.to(DEVICE).requires_grad_() for x in (q, F.normalize(k, dim=-1), v, *factors.values())]
    out = ac.compile(name, plan=plan)(*leaves[:3], **dict(zip(factors, leaves[3:], strict=True)))
    exact = theirs(*leaves)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(out)
    found = [torch.autograd.grad(x, leaves, cotangent) for x in (out, exact)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=2e-5)
