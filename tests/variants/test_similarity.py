"""Variants with a similarity of their own, against plain PyTorch written by hand: outputs and every gradient."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attncc as ac
from attncc.runtime.samples import Shape, sample_inputs
from attncc.runtime.verify import verify_variant
from attncc.variants.sdm import intersection

DOUBLE = torch.float64
SHAPES = (
    Shape(2, 4, 2, 7, 11, 6, 5, strided=True),
    Shape(1, 2, 1, 13, 4, 5, 8),  # causal, aligned to the end: nine queries stand before the first key
    Shape(2, 2, 2, 1, 9, 8, 4),
)


def heads(x: Tensor, like: Tensor) -> Tensor:
    """The key heads repeated for the query heads that share them."""
    return x.repeat_interleave(like.shape[1] // x.shape[1], 1)


def positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    m, n = q.shape[2], k.shape[2]
    return torch.arange(m)[:, None] + n - m, torch.arange(n)


def attend(s: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Softmax attention of scores (B, H, M, N), with rows of zeros where nothing is seen."""
    m, n = s.shape[2:]
    visible = torch.ones(m, n, dtype=torch.bool).tril(n - m) if causal else torch.ones(m, n, dtype=torch.bool)
    s = s.masked_fill(~visible, -torch.inf)
    return torch.where(visible.any(-1, keepdim=True), s, 0.0).softmax(-1).masked_fill(~visible, 0.0) @ v


def cosine(q, k, v, tau):
    return attend(tau[:, None, None] * (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT), v)


def squared_distance(q, k, v):
    return attend(-torch.cdist(q, k).square() / math.sqrt(q.shape[-1]), v, causal=True)


def trilinear(q, k, v, w_q, w_k, w_qk):
    both = q.unsqueeze(3), k.unsqueeze(2)
    features = torch.cat([x.expand(*q.shape[:3], k.shape[2], -1) for x in (*both, both[0] * both[1])], -1)
    weights = torch.cat([w_q, w_k, w_qk], -1)
    return attend((features * weights[:, None, None]).sum(-1), v)


def location(q, k, v, table):
    return attend(torch.einsum("bhmd,hnd->bhmn", q, table.expand(q.shape[1], -1, -1)), v)


def gaussian_position(q, k, v, center, spread):
    i, j = positions(q, k)
    normal = torch.distributions.Normal(i + center[:, None, None], spread[:, None, None])
    p = normal.log_prob(j.double()).exp()
    return (p / p.sum(-1, keepdim=True)).expand(q.shape[0], q.shape[1], -1, -1) @ v


def gmm(q, k, v, w, mu, sigma):
    w, mu, sigma = w[..., :5], mu[..., :5], sigma[..., :5]  # the formula has five
    components = torch.distributions.Normal(mu.unsqueeze(2), sigma.unsqueeze(2))
    p = components.log_prob(torch.arange(k.shape[2]).double()[None, None, :, None]).exp()
    return (w.unsqueeze(2) * p).sum(-1).unsqueeze(1) @ v


def afa(q, k, v, **inputs):
    rate, sigma2, eta2, gamma2, nu, tau = (
        inputs[name][:, None, None] for name in ("rate", "sigma2", "eta2", "gamma2", "nu", "tau")
    )
    i, j = positions(q, k)
    carried = torch.exp(-rate * (i - j).abs())
    variance = sigma2 * (1 - carried**2) / (2 * rate) + eta2 * carried**2 + gamma2
    moved = carried[..., None] * k.unsqueeze(2)
    residual = (q.unsqueeze(3) - moved).square().sum(-1)
    score = tau**2 * (-variance.log() - torch.log1p(residual / (nu * variance * q.shape[-1] / 2)))
    visible = j <= i
    p = torch.where(visible, score, -torch.inf).exp()
    total = p.sum(-1, keepdim=True)
    return (p / torch.where(total > 0, total, 1) * carried) @ v


def linear_attention(q, k, v):
    i, j = positions(q, k)
    p = torch.where(j <= i, (F.elu(q) + 1) @ (F.elu(k) + 1).mT, 0.0)
    total = p.sum(-1, keepdim=True)
    return (p / torch.where(total > 0, total, 1)) @ v


def lightning(q, k, v, rates):
    i, j = positions(q, k)
    return torch.where(j <= i, (q @ k.mT) * torch.exp(rates[:, None, None] * (i - j).clamp(min=0)), 0.0) @ v


def gla(q, k, v, g):
    """Token by token, for the last tokens that the queries are of."""
    m, n = q.shape[2], k.shape[2]
    state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=q.dtype)
    outs = [torch.zeros_like(v[:, :, 0]) for _ in range(max(m - n, 0))]
    for t in range(n):
        state = g[:, :, t].exp()[..., None] * state + k[:, :, t][..., None] * v[:, :, t][..., None, :]
        if t >= n - m:
            outs.append((q[:, :, m - n + t][..., None] * state).sum(-2) * q.shape[3] ** -0.5)
    return torch.stack(outs, 2)


BY_HAND = {
    "cosine": cosine,
    "squared_distance": squared_distance,
    "trilinear": trilinear,
    "location": location,
    "gaussian_position": gaussian_position,
    "gmm": gmm,
    "afa": afa,
    "linear_attention": linear_attention,
    "lightning": lightning,
    "gla": gla,
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BY_HAND)
def test_the_reference_is_the_formula_by_hand(name, shape):
    variant = ac.variants.get(name)
    sample = sample_inputs(variant.graph, shape, DOUBLE, seed=5)
    leaves = {"q": sample.q, "k": sample.k, "v": sample.v}
    leaves |= {n: x.double() for n, x in sample.inputs.items() if isinstance(x, Tensor)}
    leaves = {n: x.detach().requires_grad_() for n, x in leaves.items()}
    q, k, v, *_ = leaves.values()
    inputs = {n: x for n, x in leaves.items() if n not in ("q", "k", "v")}
    got = ac.reference(variant, q, k, v, **inputs)
    expected = BY_HAND[name](q, heads(k, q), heads(v, q), **inputs)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    cotangent = torch.randn_like(got)
    ours, theirs = (
        torch.autograd.grad(x, tuple(leaves.values()), cotangent, materialize_grads=True) for x in (got, expected)
    )
    for leaf, a, b in zip(leaves, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda text, leaf=leaf: f"d{leaf}: {text}")


#: odd lengths, grouped heads, Dqk != Dv and no power of two, views; more queries than keys, so that rows see nothing
SMALL = (Shape(2, 4, 2, 19, 37, 24, 16, strided=True), Shape(1, 2, 1, 35, 21, 16, 24, broadcast=("b", "h")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", BY_HAND)
def test_kernels_are_right_and_repeatable(name, dtype):
    rows = verify_variant(ac.variants.get(name), dtype=dtype, shapes=SMALL)
    assert [f"{r.shape} {r.check} repeatable={r.repeatable}" for r in rows if not r.ok] == []


VECTOR = ac.Input("h", "d", grad=True)
TABLE = {"table": ac.Input("distance"), "bits": ac.Scalar(64)}
UNSHIPPED = {
    "a learned scale": ac.Variant(
        similarity=lambda q_vec, k_vec, h, tau: tau[h] * ac.dot(q_vec, k_vec),
        inputs={"tau": ac.Input("h", grad=True)},
        mask=ac.causal,
    ),
    "random features": ac.Variant(
        similarity=lambda q_vec, k_vec: ac.log(ac.dot(ac.exp(q_vec), ac.exp(k_vec))), mask=ac.causal
    ),
    "keys alone": ac.Variant(
        similarity=lambda k_vec, h, u: ac.dot(k_vec, u[h]) + ac.norm(k_vec), inputs={"u": VECTOR}, mask=ac.causal
    ),
    "vectors of rows and columns": ac.Variant(
        similarity=lambda q_vec, k_vec, h, b, q_idx, kv_idx, a, g, p: ac.dot(
            ac.tanh(a[h] * q_vec + p[q_idx]), k_vec + g[b, h, kv_idx]
        ),
        inputs={
            "a": VECTOR,
            "g": ac.Input("b", "h", "kv_idx", "d", grad=True),
            "p": ac.Input("q_idx", "d", grad=True),
        },
    ),
    "terms of functions": ac.Variant(
        similarity=lambda q_vec, k_vec, scale: (
            scale * ac.dot(q_vec, k_vec)
            - ac.sum_d(ac.abs(k_vec)) / 8
            + ac.sum_d(ac.tanh(k_vec) * ac.softplus(k_vec)) / 8
        ),
    ),
    "a number inside": ac.Variant(
        similarity=lambda q_vec, k_vec, h, gain, scale: scale * ac.dot(ac.softplus(gain[h] * q_vec), k_vec),
        inputs={"gain": ac.Input("h", grad=True)},
    ),
    "no reading of q or k": ac.Variant(
        similarity=lambda h, slope, q_idx, kv_idx: -slope[h] * ac.abs(q_idx - kv_idx),
        inputs={"slope": ac.Input("h", grad=True)},
        normalizer="sigmoid",
    ),
    "a step of a distance": ac.Variant(
        similarity=lambda q_vec, k_vec: -ac.sum_d((q_vec - k_vec) ** 2), normalizer=intersection, inputs=TABLE
    ),
    "a step of features": ac.Variant(
        similarity=lambda q_vec, k_vec: ac.dot(ac.relu(q_vec), ac.relu(k_vec)), normalizer=intersection, inputs=TABLE
    ),
}


@pytest.mark.parametrize("name", UNSHIPPED)
def test_what_nobody_shipped_is_right(name):
    rows = verify_variant(UNSHIPPED[name], shapes=[Shape(2, 4, 2, 19, 37, 24, 16, strided=True)])
    assert [f"{r.shape} {r.check} repeatable={r.repeatable}" for r in rows if not r.ok] == []


def test_what_softmax_cancels_has_no_gradient_in_16_bits():
    """w_q . q moves a whole row of scores. The stored delta is that of a rounded output, and would leave 3e-3 here."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 32, generator=generator).half() for n in (50, 70, 70))
    w = {name: (0.2 * torch.randn(2, 32, generator=generator)).requires_grad_() for name in ("w_q", "w_k", "w_qk")}
    out = ac.compile("trilinear")(q, k, v, **w)
    dw_q, dw_k, _ = torch.autograd.grad(out, w.values(), torch.randn(out.shape, generator=generator).half())
    assert dw_q.abs().max() < 1e-4
    assert dw_k.abs().max() > 0.1


@pytest.mark.parametrize("name", ["gla", "rwkv6"])
def test_what_a_gate_gets_from_queries_and_keys_cancels_pair_by_pair(name):
    """A step's gradient is that of the pairs on both sides of it. What all other pairs add to the running sum's is gone
    only if queries and keys multiply the very same rounded factors: else it is 6 or 7e-4 off, more in longer calls."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, cotangent = (torch.randn(1, 1, 192, 16, generator=generator).half() for _ in range(4))
    inputs = {"g": -0.03 * torch.rand(1, 1, 192, 16, generator=generator)}
    if name == "rwkv6":
        inputs["u"] = torch.randn(1, 16, generator=generator)

    def gradient(run, dtype):
        g = inputs["g"].clone().requires_grad_()
        out = run(*(x.to(dtype) for x in (q, k, v)), **{**inputs, "g": g})
        return torch.autograd.grad(out, g, cotangent.to(dtype))[0].double()

    got = gradient(ac.compile(name, plan="parallel"), torch.float16)
    exact = gradient(lambda *x, **more: ac.reference(name, *x, **more), DOUBLE)
    assert (got - exact).norm() <= 5e-4 * exact.norm()
