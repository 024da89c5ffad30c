"""Recipes against plain PyTorch by hand, in float64: results and gradients."""

from __future__ import annotations

import pytest
import torch

import attncc as ac
from attncc import recipes
from tests.variants.by_hand import causal, draw, rep, score, softmax


def close(got, want, tolerance=1e-5):
    scale = want.abs().max().clamp_min(1)
    torch.testing.assert_close(got.double() / scale, want / scale, rtol=0, atol=tolerance)


def agree(recipe, oracle, arguments, dtype=torch.float32, tolerance=1e-5):
    """A recipe in `dtype` and an oracle in float64, on tensors of which all want a gradient."""
    leaves = [x.to(dtype).requires_grad_() for x in arguments]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    got, want = recipe(*leaves), oracle(*exact)
    assert got.dtype == dtype
    close(got, want, tolerance)
    cotangent = draw(*want.shape, seed=9)
    found = torch.autograd.grad(got, leaves, cotangent.to(dtype), materialize_grads=True)
    wanted = torch.autograd.grad(want, exact, cotangent.to(dtype).double(), materialize_grads=True)
    for a, b in zip(found, wanted, strict=True):
        close(a, b, 5 * tolerance)


DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 3e-3)], ids=["fp32", "fp16"]
)


@DTYPES
def test_parts_of_the_keys_merge(dtype, tolerance):
    """Causal over two parts, of which early rows see none, or the first alone."""
    first = ac.compile(ac.Variant(mask=lambda q_idx, kv_idx: kv_idx + 3 <= q_idx))
    second = ac.compile(ac.Variant(mask=lambda q_idx, kv_idx: kv_idx + 20 <= q_idx))
    arguments = draw(1, 4, 29, 16), draw(1, 2, 26, 16, seed=1), draw(1, 2, 26, 16, seed=2)
    both = ("out", "lse")

    def recipe(q, k, v):
        parts = [op(q, k[:, :, s], v[:, :, s], outputs=both) for op, s in ((first, slice(17)), (second, slice(17, 26)))]
        out, lse = recipes.merge(*parts)
        assert (lse[:, :, :3] == -torch.inf).all()
        return torch.cat([out, lse[:, :, 3:].unsqueeze(-1).to(out.dtype).expand(-1, -1, -1, 3).mT @ out[:, :, 3:]], 2)

    def oracle(q, k, v):
        shown = torch.arange(26) + 3 <= torch.arange(29)[:, None]
        s = score(q, k)
        out = softmax(s, shown) @ rep(v, 4)
        lse = s.masked_fill(~shown, -torch.inf)[:, :, 3:].logsumexp(-1)
        return torch.cat([out, lse.unsqueeze(-1).expand(-1, -1, -1, 3).mT @ out[:, :, 3:]], 2)

    agree(recipe, oracle, arguments, dtype, tolerance)


@DTYPES
def test_lamemo(dtype, tolerance):
    """Memory of 21 tokens that has attended to its past gets the right context from position 9 on: the result is
    attention over both, and its gradients those of the new part with the old one held fixed."""
    old_k, old_v = draw(1, 2, 21, 16, seed=5), draw(1, 2, 21, 16, seed=6)
    arguments = draw(1, 4, 21, 16), draw(1, 2, 13, 16, seed=1), draw(1, 2, 13, 16, seed=2)
    right = torch.arange(9, 22) > torch.arange(21)[:, None]

    def old(q):
        s = score(q, old_k).masked_fill(~causal(21, 21), -torch.inf)
        return (s.softmax(-1) @ rep(old_v, 4)).detach(), s.logsumexp(-1).detach()

    def recipe(q, k, v):
        out, lse = old(q.double())
        return recipes.lamemo(q, k, v, out.to(q.dtype), lse.float(), first=9)[0]

    def oracle(q, k, v):
        out, lse = old(q)
        s = score(q, k).masked_fill(~right, -torch.inf)
        share = torch.sigmoid(s.logsumexp(-1) - lse).unsqueeze(-1)
        return share * (s.softmax(-1) @ rep(v, 4)) + (1 - share) * out

    agree(recipe, oracle, arguments, dtype, tolerance)


def test_lamemo_takes_an_op_of_its_own():
    def distant(score, q_idx, kv_idx, h, first, slope):
        return score - slope[h] * (kv_idx + first - q_idx)

    variant = ac.Variant(
        score=distant,
        mask=lambda q_idx, kv_idx, first: kv_idx + first > q_idx,
        inputs={"first": ac.Scalar(1), "slope": ac.Input("h", grad=True)},
    )
    op = ac.compile(variant)

    def recipe(q, k, v, slope):
        out, lse = torch.zeros(1, 2, 9, 16), torch.full((1, 2, 9), 0.5)
        return recipes.lamemo(q, k, v, out, lse, 4, op, slope=slope)[0]

    def oracle(q, k, v, slope):
        distance = torch.arange(4, 12) - torch.arange(9)[:, None]
        s = (score(q, k) - slope[:, None, None] * distance).masked_fill(distance <= 0, -torch.inf)
        return torch.sigmoid(s.logsumexp(-1) - 0.5).unsqueeze(-1) * (s.softmax(-1) @ v)

    agree(recipe, oracle, (draw(1, 2, 9, 16), draw(1, 2, 8, 16, seed=1), draw(1, 2, 8, 16, seed=2), draw(2, seed=3)))


def rope(x, position, theta):
    a, b = x.chunk(2, -1)
    c, s = torch.cos(position[..., None] * theta), torch.sin(position[..., None] * theta)
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def pine_by_hand(q, k, v, doc, position, theta):
    """All keys rotated anew for every head and query; q, k, v (H, length, D)."""
    heads, m, d = q.shape
    count, region = int(doc.max()) + 1, doc >= 0
    length = torch.stack([(doc == i).sum() for i in range(count)])
    p = (q @ k[:, region].mT * d**-0.5).softmax(-1)
    importance = torch.stack([p[..., doc[region] == i].mean(-1) for i in range(count)], -1)
    order = importance.argsort(dim=-1, descending=True, stable=True)
    sizes = length[order]
    behind = torch.gather(sizes.cumsum(-1) - sizes, -1, order.argsort(dim=-1))
    end = int(torch.nonzero(region).max()) + 1
    local = torch.cat([torch.arange(int(n)) for n in length])
    at = torch.arange(len(doc)).expand(heads, m, -1).clone()
    at[..., region] = end - behind[..., doc[region]] - length[doc[region]] + local
    rotated = rope(k[:, None].expand(-1, m, -1, -1), at.to(k), theta)
    s = (rope(q, position.to(q), theta)[:, :, None] * rotated).sum(-1) * d**-0.5
    shown = region | (torch.arange(len(doc)) <= position[:, None])
    return s.masked_fill(~shown, -torch.inf).softmax(-1) @ v


def test_pine():
    """A prompt, three documents of unequal length, and seven queries behind them, which see one another causally."""
    doc = torch.tensor([-1] * 4 + [0] * 9 + [1] * 5 + [2] * 12 + [-1] * 7)
    q, k, v = draw(1, 4, 7, 16), draw(1, 2, 37, 16, seed=1), draw(1, 2, 37, 24, seed=2)
    theta, position = 10.0 ** -(torch.arange(8) / 4).double(), torch.arange(30, 37)
    got = recipes.pine(q.float(), k.float(), v.float(), doc, position, theta.float())
    close(got, pine_by_hand(q[0], rep(k, 4)[0], rep(v, 4)[0], doc, position, theta)[None])
    # the order of the documents does not matter
    turned = torch.cat([torch.arange(4), torch.arange(18, 30), torch.arange(4, 13), torch.arange(13, 18)])
    turned = torch.cat([turned, torch.arange(30, 37)])
    relabelled = torch.tensor([-1] * 4 + [0] * 12 + [1] * 9 + [2] * 5 + [-1] * 7)
    again = recipes.pine(
        q.float(), k[:, :, turned].float(), v[:, :, turned].float(), relabelled, position, theta.float()
    )
    torch.testing.assert_close(again, got, rtol=1e-4, atol=1e-5)


@DTYPES
@pytest.mark.parametrize("mode", ["add", "multiply"])
def test_heads_that_differ_by_an_embedding(mode, dtype, tolerance):
    """Against keys and values of every head, in full; the first rows see no key."""
    own = [0.5 * draw(4, 16, seed=i) for i in (3, 4, 5)]
    arguments = [draw(2, 1, n, 16, seed=i) for i, n in enumerate((19, 13, 13))] + own

    def oracle(q, k, v, *embeddings):
        q, k, v = (
            x + e[:, None] if mode == "add" else x * (1 + e[:, None])
            for x, e in zip((q, k, v), embeddings, strict=True)
        )
        return softmax(q @ k.mT / 4, causal(19, 13)) @ v

    agree(lambda *x: recipes.shared_heads(*x, mode=mode), oracle, arguments, dtype, tolerance)


@DTYPES
def test_agents(dtype, tolerance):
    shapes = (2, 2, 37, 16), (2, 2, 29, 16), (2, 2, 29, 24), (2, 2, 5, 16), (1, 2, 5, 29), (1, 2, 37, 5)

    def oracle(q, k, v, agent, gather, spread):
        inner = (agent @ k.mT / 4 + gather).softmax(-1) @ v
        return (q @ agent.mT / 4 + spread).softmax(-1) @ inner

    agree(recipes.agents, oracle, [draw(*s, seed=i) for i, s in enumerate(shapes)], dtype, tolerance)


@DTYPES
@pytest.mark.parametrize(("turns", "kv_heads"), [(1, 2), (4, 2), (3, 1)])
def test_sinkhorn(turns, kv_heads, dtype, tolerance):
    def oracle(q, k, v):
        s = q @ k.mT / 4  # a single key head meets both
        for number in range(turns):
            s = s - s.logsumexp(-1 if number % 2 == 0 else -2, keepdim=True)
        return s.exp() @ v

    shapes = (1, 2, 21, 16), (1, kv_heads, 33, 16), (1, kv_heads, 33, 24)
    agree(
        lambda *x: recipes.sinkhorn(*x, turns=turns),
        oracle,
        [draw(*s, seed=i) for i, s in enumerate(shapes)],
        dtype,
        tolerance,
    )


@DTYPES
def test_diff_transformer(dtype, tolerance):
    """As the authors' code has it: heads in pairs, the difference of two maps, a norm a head."""
    shapes = (1, 4, 29, 16), (1, 2, 29, 16), (1, 1, 29, 32), (), (32,)
    arguments = [draw(*s, seed=i) for i, s in enumerate(shapes)]

    def oracle(q, k, v, lam, gain):
        p = softmax(q @ k.repeat(1, 2, 1, 1).mT / 4, causal(29, 29)).unflatten(1, (-1, 2))
        out = (p[:, :, 0] - lam * p[:, :, 1]) @ rep(v, 2)
        return out * torch.rsqrt(out.square().mean(-1, keepdim=True) + 1e-5) * gain * 0.3

    agree(lambda *x: recipes.diff_transformer(*x, lam_init=0.7), oracle, arguments, dtype, 3 * tolerance)
