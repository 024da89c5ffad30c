"""Sums over the head dimension of functions of q and k together: kernels against plain PyTorch written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attncc as ac
from attncc import recipes
from attncc.codegen.crosscompile import cross_compile
from attncc.codegen.module import load_source
from attncc.codegen.plan import Plan
from attncc.codegen.problem import problem_of
from attncc.codegen.render import render
from attncc.runtime.explain import facts, sizes_of
from attncc.runtime.samples import Shape
from attncc.runtime.verify import verify_variant
from attncc.schedule import KERNELS, KernelSchedule, choose, device_for, shared_memory
from attncc.schedule.cost import predict

VECTOR = ac.Input("h", "d", grad=True)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softmax(s: Tensor, visible: Tensor | None = None) -> Tensor:
    """Over the keys that are visible, and 0 in rows that see none."""
    if visible is None:
        return s.softmax(-1)
    s = s.masked_fill(~visible, -torch.inf)
    return torch.where(visible.any(-1, keepdim=True), s, 0.0).softmax(-1).masked_fill(~visible, 0.0)


def causal(m: int, n: int) -> Tensor:
    return torch.ones(m, n, dtype=torch.bool).tril(n - m)


def both(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, H, M, 1, D) and k (B, H, 1, N, D), with a key head for each query head."""
    return q.unsqueeze(3), k.repeat_interleave(q.shape[1] // k.shape[1], 1).unsqueeze(2)


def additive(q, k, v_a):
    q, k = both(q, k)
    return softmax((torch.tanh(q + k) * v_a[:, None, None]).sum(-1))


def l1_distance(q, k):
    q, k = both(q, k)
    return softmax(-(q - k).abs().sum(-1) * q.shape[-1] ** -0.5)


def many(q, k, a, g, p, c):
    """Several sums beside a dot and terms; inputs by head, by key, by query, and with no entry a component."""
    m, n = q.shape[2], k.shape[2]
    dot = q @ both(q, k)[1].squeeze(2).mT * q.shape[-1] ** -0.5
    q, k = both(q, k)
    a, p, c = a[:, None, None], p[:, None], c[:, None, None, None]
    s = dot + torch.sigmoid(a * q - k + c).sum(-1) + q.square().sum(-1) * 0.1
    s = s + torch.relu((torch.maximum(q, k + g[:, :, None]) * p).sum(-1))
    return softmax(s, causal(m, n))


MANY = ac.Variant(
    similarity=lambda q_vec, k_vec, scale, b, h, q_idx, kv_idx, a, g, p, c: (
        scale * ac.dot(q_vec, k_vec)
        + ac.sum_d(ac.sigmoid(a[h] * q_vec - k_vec + c[h]))
        + 0.1 * ac.sum_d(q_vec**2)
        + ac.relu(ac.sum_d(ac.maximum(q_vec, k_vec + g[b, h, kv_idx]) * p[q_idx]))
    ),
    mask=ac.causal,
    inputs={
        "a": VECTOR,
        "g": ac.Input("b", "h", "kv_idx", "d", grad=True),
        "p": ac.Input("q_idx", "d", grad=True),
        "c": ac.Input("h", grad=True),
    },
)


def distances(q, k, r, w):
    """A second dot, with a table by distance, and a bias of the query in it."""
    m, n = q.shape[2], k.shape[2]
    back = (torch.arange(m)[:, None] + n - m - torch.arange(n)).clamp(min=0)
    dot = q @ both(q, k)[1].squeeze(2).mT + torch.einsum("bhmd,hmnd->bhmn", q + w[:, None], r[:, back])
    return softmax(dot * q.shape[-1] ** -0.5, causal(m, n))


def by_distance(q_vec, k_vec, scale, h, q_idx, kv_idx, q_len, kv_len, r, w):
    back = ac.maximum(q_idx + kv_len - q_len - kv_idx, 0)
    return scale * (ac.dot(q_vec, k_vec) + ac.dot(q_vec + w[h], r[h, back]))


DISTANCES = ac.Variant(
    similarity=by_distance,
    mask=ac.causal,
    inputs={"r": ac.Input("h", "distance", "d", grad=True), "w": VECTOR},
)
#: what ships
BY_HAND = {"additive": additive, "l1_distance": l1_distance}
#: variant, its weights by hand, the shapes of its inputs, then B, H, Hkv, M, N, Dqk, Dv
CASES = {
    "additive": ("additive", additive, {"v_a": (4, 20)}, (1, 4, 2, 5, 9, 20, 16)),
    "more queries than keys": ("l1_distance", l1_distance, {}, (2, 2, 1, 9, 4, 5, 3)),
    "one query": ("additive", additive, {"v_a": (2, 6)}, (1, 2, 1, 1, 70, 6, 5)),
    "a wide head": ("l1_distance", l1_distance, {}, (1, 1, 1, 3, 4, 72, 8)),
    "many": (MANY, many, {"a": (2, 6), "g": (2, 2, 7, 6), "p": (9, 6), "c": (2,)}, (2, 2, 1, 9, 7, 6, 5)),
    "distances": (DISTANCES, distances, {"r": (2, 41, 6), "w": (2, 6)}, (2, 2, 1, 37, 41, 6, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels_and_every_gradient(name, dtype):
    variant, weights, shapes, (b, h, hkv, m, n, d, dv) = CASES[name]
    drawn = {"q": draw(b, m, h, d, seed=1), "k": draw(b, n, hkv, d, seed=2), "v": draw(b, n, hkv, dv, seed=3)}
    leaves = {key: x.transpose(1, 2).to(dtype).requires_grad_() for key, x in drawn.items()}
    wanted = {
        d.name for d in (ac.variants.get(variant) if isinstance(variant, str) else variant).graph.inputs if d.grad
    }
    inputs = {key: draw(*size, seed=4 + i).float() for i, (key, size) in enumerate(shapes.items())}
    leaves |= {key: x.requires_grad_() for key, x in inputs.items() if key in wanted}
    exact = {key: x.detach().double().requires_grad_() for key, x in {**leaves, **inputs}.items()}
    q, k, v = (exact[key] for key in "qkv")
    out = ac.compile(variant)(*(leaves[key] for key in "qkv"), **inputs)
    expected = weights(q, k, **{key: exact[key] for key in inputs}) @ v.repeat_interleave(h // hkv, 1)
    # one rounding of what is stored in 16 bits, and of the weights before they meet v
    eps = 3e-6 if dtype == torch.float32 else 1e-3
    assert (out.double() - expected).norm() <= eps * expected.norm()
    cotangent = draw(b, h, m, dv, seed=9)
    got = torch.autograd.grad(out, list(leaves.values()), cotangent.to(dtype))
    exactly = torch.autograd.grad(expected, [exact[key] for key in leaves], cotangent)
    for key, a, e in zip(leaves, got, exactly, strict=True):
        assert (a.double() - e).norm() <= 3 * eps * e.norm(), key


UNSHIPPED = {
    # the slope is infinite where q and k are 0, as they are beyond the edge of a tile
    "an infinite slope": ac.Variant(similarity=lambda q_vec, k_vec: -ac.sum_d(ac.sqrt(ac.abs(q_vec - k_vec)))),
    "several passes": ac.Variant(
        similarity=lambda q_vec, k_vec: ac.sum_d(ac.tanh(q_vec - k_vec)), normalizer="entmax15", mask=ac.causal
    ),
    "a bias beside it": ac.Variant(
        similarity=lambda q_vec, k_vec, h, q_idx, kv_idx, bias: (
            ac.sum_d(ac.gelu(q_vec + k_vec)) + bias[h, q_idx - kv_idx + 16]
        ),
        inputs={"bias": ac.Input("h", "distance", grad=True)},
    ),
    "tables of distances": ac.Variant(
        similarity=lambda q_vec, k_vec, h, q_idx, kv_idx, b, r, t: (
            ac.sum_d(ac.exp(q_vec) * r[h, kv_idx - q_idx + 2]) + ac.dot(k_vec, q_vec + t[kv_idx - q_idx])
        ),
        inputs={"r": ac.Input("h", "distance", "d", grad=True), "t": ac.Input("distance", "d")},
    ),
    "tables of distances in functions": ac.Variant(
        similarity=lambda q_vec, k_vec, h, q_idx, kv_idx, r, s, w: (
            ac.dot(ac.tanh(q_vec * s[h, q_idx - kv_idx] + k_vec + r[h, (kv_idx - q_idx + 8) // 2]), w[h])
            + ac.dot(q_vec, r[h, kv_idx - q_idx + 4])
        ),
        inputs={
            "r": ac.Input("h", "distance", "d", grad=True),
            "s": ac.Input("h", "distance", grad=True),
            "w": ac.Input("h", "d", grad=True),
        },
        mask=ac.causal,
    ),
    "a table at two distances": ac.Variant(
        similarity=lambda q_vec, k_vec: -ac.sum_d(ac.abs(q_vec - k_vec)),
        score=lambda score, q_idx, kv_idx, t: score + t[kv_idx - q_idx + 4] * t[kv_idx - q_idx + 5],
        inputs={"t": ac.Input("distance", grad=True)},
    ),
    "weights without a gradient": ac.Variant(
        similarity=lambda q_vec, k_vec: ac.sum_d(ac.abs(q_vec - k_vec)), normalizer=lambda score, row: ac.sign(score)
    ),
}


@pytest.mark.parametrize("name", UNSHIPPED)
def test_what_nobody_shipped_is_right_and_repeatable(name):
    rows = verify_variant(UNSHIPPED[name], shapes=[Shape(1, 2, 1, 5, 9, 6, 5, strided=True)])
    assert [f"{r.shape} {r.check} repeatable={r.repeatable}" for r in rows if not r.ok] == []


def test_a_network_of_two_layers():
    q, k, v, w2, b2, w3 = draw(1, 2, 5, 4), draw(1, 1, 7, 4), draw(1, 1, 7, 3), draw(2, 4), draw(2), draw(2)
    leaves = [x.float().requires_grad_() for x in (q, k, v, w2, b2, w3)]
    out = recipes.neural(*leaves, causal=True)
    q, k, v, w2, b2, w3 = exact = [x.detach().double().requires_grad_() for x in leaves]
    rows, keys = both(q, k)
    s = torch.relu(torch.relu(rows + keys) @ w2.mT + b2) @ w3
    expected = softmax(s, causal(5, 7)) @ v
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    cotangent = draw(*out.shape, seed=8)
    ours = torch.autograd.grad(out, leaves, cotangent.float())
    for a, e in zip(ours, torch.autograd.grad(expected, exact, cotangent), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


def test_a_gradient_of_what_a_loop_reads_by_pair_is_refused():
    inputs = {"r": ac.Input("h", "distance", "d", grad=True)}
    variant = ac.Variant(
        similarity=lambda q_vec, h, q_idx, kv_idx, r: ac.sum_d(ac.tanh(q_vec + r[h, q_idx * kv_idx])),
        mask=ac.causal,
        inputs=inputs,
    )
    op = ac.compile(variant)
    q = draw(1, 1, 4, 4).float().requires_grad_()
    with pytest.raises(ac.UnsupportedError, match=r"no kernel makes the gradient of r\[(.|\n)*recipes.pairwise") as e:
        op(q, q, q, r=torch.randn(1, 4, 4)).sum().backward()
    assert "test_pairs.py" in str(e.value)


def test_nothing_has_an_entry_for_each_component_of_each_pair():
    """What the host allocates has at most an entry a row, or a component of a row."""
    text = render(Plan(ac.variants.get("additive").graph), 64, 64, True)
    host = text[text.index("def _launch(") :]
    allocated = [line for line in host.splitlines() if "torch.empty(" in line or "torch.zeros(" in line]
    assert allocated
    assert not any("q_len" in line and "kv_len" in line for line in allocated)


@pytest.mark.parametrize(
    ("target", "name", "dim", "kernels"),
    [
        ("sm_80", "additive", 64, ("dkdv",)),
        ("sm_90", "additive", 64, KERNELS),
        ("sm_90", "additive", 96, ("dkdv",)),
        ("gfx942", "l1_distance", 64, ("dq",)),
    ],
)
def test_the_first_choice_fits_and_keeps_its_registers(target, name, dim, kernels):
    device, plan = device_for(target), Plan(ac.variants.get(name).graph)
    problem = problem_of(plan, sizes_of(8192, d_qk=dim), "bf16", "ieee", {})
    schedule = choose(problem, device)
    module = load_source(render(plan, dim, dim, True), f"pairs_{target}")
    only = tuple(f"{kernel}_kernel" for kernel in kernels)
    compiled = cross_compile(module, plan.core, schedule, device, "bf16", only=only)
    for kernel in kernels:
        fact = compiled[f"{kernel}_kernel"]
        assert fact.spills == 0
        assert fact.shared <= shared_memory(kernel, schedule.of(kernel), problem, device)


def test_the_cost_model_names_the_unit_and_counts_components():
    plan, device = Plan(ac.variants.get("additive").graph), device_for("h100")
    problem, wide = (problem_of(plan, sizes_of(8192, d_qk=d), "bf16", "ieee", {}) for d in (64, 256))
    tiles = KernelSchedule(64, 64, 4, 2)
    found = predict("forward", tiles, problem, device)
    assert found.limit == "sfu"
    assert predict("forward", tiles, wide, device).us > 3 * found.us
    # warps that share a row wait for each other at every component of a gradient
    apart, shared = (KernelSchedule(64, 64, w, 2) for w in (4, 8))
    assert predict("dq", apart, problem, device).us < predict("dq", shared, problem, device).us


def test_explain_says_what_a_loop_passes_on():
    found = facts(Plan(MANY.graph), sizes_of(64, d_qk=16), "bf16", device_for("sm_90"))["backward"]
    assert set(found["looped"]) == {"dpair_0", "dpair_1", "dq_vec", "dk_vec"}
    assert found["dqk"] != "0"
    assert "sum over queries of" in found["inputs"]["dg[b, h, kv_idx]"][0]
