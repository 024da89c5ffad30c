"""Each PyTorch function of the tracer's tables, traced, against the function itself: values, dtypes and derivatives."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import attncc as ac
from attncc.language.flex.functions import BINARY, OTHER, UNARY
from attncc.runtime.evaluate import evaluate

POINTS = torch.tensor([-4.0, -2.5, -1.0, -0.4, 0.3, 0.5, 1.0, 1.5, 2.6, 7.0], dtype=torch.float64)
POSITIVE = ("log", "log2", "log10", "log1p", "sqrt", "rsqrt")
Q, K = torch.arange(6)[:, None], torch.arange(7)


def traced(function, **at):
    """The value of what is traced from a function of (score, q_idx, kv_idx), at float64 scores or int64 indices."""
    variant = ac.from_flex(lambda s, b, h, q, k: function(s, q, k))
    names = {"raw_score": at.get("s"), "q_idx": at.get("q"), "kv_idx": at.get("k")}
    return evaluate(variant.graph["score"].expr, {n: x for n, x in names.items() if x is not None})


def torch_function(name):
    for owner in (torch, F, torch.special):
        if hasattr(owner, name):
            return getattr(owner, name)
    return None


UNARY_OF_TORCH = [n for n in UNARY if not n.startswith("__") and n not in ("log_sigmoid", "_threshold")]


@pytest.mark.parametrize("name", UNARY_OF_TORCH)
def test_unary(name):
    function = torch_function(name)
    assert function is not None
    points = (
        POINTS[(POINTS > 0) & (POINTS < 1)] if name == "logit" else POINTS[POINTS > 0] if name in POSITIVE else POINTS
    )
    x = points.clone().requires_grad_()
    got = traced(lambda s, q, k: function(s), s=x).double()
    want = function(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    if got.requires_grad:
        left, right = (torch.autograd.grad(y.sum(), x)[0] for y in (got, want))
        # at a kink either side's derivative will do, and PyTorch's own 1/6 is a float32
        smooth = (points != -1) & (points != 1) | (name != "hardtanh")
        torch.testing.assert_close(left[smooth], right[smooth], rtol=1e-7 if "hard" in name else 1e-10, atol=1e-12)
    else:  # a function of steps
        assert not want.requires_grad or not torch.autograd.grad(want.sum(), x)[0].any()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: F.softplus(x, 2.0, 3.0),
        lambda x: F.elu(x, 0.7),
        lambda x: F.celu(x, 0.7),
        lambda x: F.leaky_relu(x, 0.3),
        lambda x: F.leaky_relu(x, negative_slope=0.3),
        lambda x: F.hardtanh(x, -0.5, 2.0),
        lambda x: F.threshold(x, 0.6, -3.0),
        lambda x: torch.clamp(x, max=1.2),
        lambda x: x.clamp(-1.2, 1.2),
        lambda x: x.clamp_min(-0.7),
        lambda x: torch.clip(x, None, 2.0),
        lambda x: torch.lerp(x, x * x, 0.3),
        lambda x: torch.addcmul(x, x, x + 1, value=0.5),
        lambda x: torch.add(x, x * x, alpha=2),
        lambda x: torch.sub(x, 3, alpha=0.5),
        lambda x: torch.rsub(x, 1.5),
        lambda x: torch.where(x > 0.2, x, 2 * x),
        lambda x: x.where(x > 0.2, -x),
        lambda x: torch.where(x > 0.2, 1.0, x),
        lambda x: x.masked_fill(x > 0.2, 4.0),
        lambda x: torch.maximum(x, 0.1 * x),
        lambda x: torch.pow(2.0, x),
        lambda x: (1 + x * x) ** 1.7,
        lambda x: x.div(0.3, rounding_mode="floor") + x,
        lambda x: torch.div(x, 0.3, rounding_mode="trunc") + x,
        lambda x: x % 0.7,
        lambda x: torch.fmod(x, 0.7),
        lambda x: x.float().double().to(torch.float16) * 2,
        lambda x: x * (x > 0.2),
        lambda x: x + (x > 0.2).int() * 3,
        lambda x: x * torch.ones_like(x) + torch.full_like(x, 2.0) + x.new_zeros(()) + torch.tensor(3.0),
        lambda x: x + x.new_tensor(2.5) * x.new_tensor(data=3) + torch.hypot(x, x + 2),
        lambda x: torch.stack([x, x * x, 2 * x]).sum() + torch.cat([x[None], x[None]]).mean(),
        lambda x: torch.dot(torch.stack([x, x + 1]), torch.stack([x, x * x])),
        lambda x: torch.stack([x, 1 - 0.9 * x, 1.1 * x * x]).amax() + torch.max(torch.stack([x, -x])),
        lambda x: torch.linalg.vector_norm(torch.stack([x, x + 3])),
        lambda x: sum(y * y for y in torch.stack([x, 2 * x]).unbind()),
        lambda x: torch.stack([x, 3 * x]).reshape(2, 1).T[0].flip(0)[0],
        lambda x: torch.ops.aten.mul(x, torch.ops.aten.sin.default(x)),
        lambda x: math.pi * x - math.e,
    ],
)
def test_functions_with_options(function):
    x = POINTS.clone().requires_grad_()
    got = traced(lambda s, q, k: function(s), s=x)
    want = torch.stack([function(y) for y in x])
    torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-3 if "float16" in str(want.dtype) else 1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(y.double().sum(), x)[0] for y in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k: q - k,
        lambda q, k: (q + 3) // (k + 1),
        lambda q, k: (q - 2 * k) // 3,
        lambda q, k: torch.div(q - 2 * k, 3, rounding_mode="trunc"),
        lambda q, k: (q - 2 * k) % 3,
        lambda q, k: torch.fmod(q - 2 * k, 3),
        lambda q, k: 7 % (k + 1),
        lambda q, k: 20 // (k + 1),
        lambda q, k: q / (k + 1),
        lambda q, k: (q - k).float() // 0.7,
        lambda q, k: 1.0 / (k + 1),
        lambda q, k: 2 ** (q - k).float(),
        lambda q, k: (q - k).abs() ** 2,
        lambda q, k: q & k,
        lambda q, k: (q | k) ^ 5,
        lambda q, k: (q << 2) | (k >> 1),
        lambda q, k: ~q + k,
        lambda q, k: q * 1.0 / 4,
        lambda q, k: (q / 4).floor() + (k / 4).ceil() + (k / 4).round(),
        lambda q, k: torch.round((q - k) / 2),
        lambda q, k: (q / 3).int() * k,
        lambda q, k: (q * 0.7).long() - (k * 0.7).to(torch.int32),
        lambda q, k: torch.where(q > k, q, -k),
        lambda q, k: torch.clamp(q - k, min=-2, max=2),
        lambda q, k: torch.minimum(q, k) * torch.maximum(q, k),
        lambda q, k: (q == k).float() + (q != k) + (q >= k).to(torch.int64),
        lambda q, k: torch.logical_xor(q > 2, k > 3).float() + torch.logical_not(q) + torch.logical_and(q, k),
        lambda q, k: ((q > 2) == (k > 2)).float() + ((q > 2) ^ (k > 2)) * 2 + ((q > 2) != (k > 2)) * 4,
        lambda q, k: torch.sqrt((q - k).float().square() + 1),
        lambda q, k: torch.exp2(-(q + 1) * 8.0 / 4),
        lambda q, k: torch.sign(q - k) + torch.sgn((k - q).float()),
        lambda q, k: (torch.stack([q, k]) == torch.stack([k, k])).any().float(),
        lambda q, k: (
            (torch.stack([q, k]) > 2).all(dim=0).float() + torch.stack([q, k, k]).prod() + torch.stack([q, k]).sum()
        ),
        lambda q, k: torch.stack([q, k]).float().mean() + torch.stack([q, k]).amin(dim=-1, keepdim=True)[0],
    ],
)
def test_functions_of_indices(function):
    got = traced(lambda s, q, k: function(q, k) + 0.0 * s, s=torch.zeros(6, 7, dtype=torch.float64), q=Q, k=K)
    want = torch.stack([torch.stack([function(q, k) for k in K]) for q in Q.flatten()])
    torch.testing.assert_close(got.double().expand(6, 7), want.double(), rtol=1e-6, atol=1e-6)


def test_every_binary_function_is_pytorchs():
    tensor = torch.Tensor
    for name in (*BINARY, *OTHER):
        assert hasattr(torch, name) or hasattr(tensor, name), name


def test_dtypes_follow_pytorch():
    seen = []

    def score_mod(score, b, h, q, k):
        seen.append(
            [x.dtype for x in (q / 2, q * 2, q * 2.0, q > k, (q > k) + 1, score.half() + q, q.to(torch.int64) + k)]
        )
        assert (score.shape, q.ndim, score.device.type, score.requires_grad) == ((), 0, "cpu", False)
        assert isinstance(q, torch.Tensor)
        return score

    ac.from_flex(score_mod)
    q, k, score = torch.tensor(1, dtype=torch.int32), torch.tensor(2, dtype=torch.int32), torch.tensor(0.5)
    score_mod(score, None, None, q, k)
    assert seen[0] == seen[1]
