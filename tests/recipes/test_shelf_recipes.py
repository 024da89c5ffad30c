"""Recipes against plain PyTorch by hand: values and every gradient, odd lengths, grouped heads, dead rows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import attncc as ac
from attncc import recipes
from tests.variants.by_hand import causal, draw, rep, score, softmax

HALF = {"dtype": torch.float16, "tolerance": 4e-3}
DTYPES = pytest.mark.parametrize("options", [{}, HALF], ids=["fp32", "fp16"])


def agree(program, oracle, *tensors, dtype=torch.float32, tolerance=3e-5):
    """A function of tensors in `dtype` against one in float64; parameters that no q, k or v are float32 at least."""
    own = [x.to(dtype).requires_grad_() for x in tensors]
    exact = [x.detach().double().requires_grad_() for x in own]
    got, want = program(*own), oracle(*exact)
    assert got.isfinite().all()
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    cotangent = draw(*want.shape, seed=9).to(got.dtype)
    found = torch.autograd.grad(got, own, cotangent, allow_unused=True)
    wanted = torch.autograd.grad(want, exact, cotangent.double(), allow_unused=True)
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        largest = b.abs().max().clamp_min(1)
        torch.testing.assert_close(
            a.double() / largest, b / largest, rtol=0, atol=6 * tolerance, msg=lambda m, i=i: f"argument {i}: {m}"
        )


def qkv(heads=4, kv_heads=2, m=13, n=13, d=16, d_v=16, batch=2):
    return draw(batch, heads, m, d), draw(batch, kv_heads, n, d, seed=1), draw(batch, kv_heads, n, d_v, seed=2)


@DTYPES
@pytest.mark.parametrize(("m", "n", "block"), [(13, 13, 5), (9, 14, 4), (15, 9, 6)])
def test_selective(m, n, block, options):
    """The last queries stand at the last keys; with more queries than keys, the first see nothing."""

    def oracle(q, k, v):
        s, visible = score(q, k), causal(m, n)
        i, j = torch.arange(m)[:, None] + n - m, torch.arange(n)
        asked = F.relu(s[:, :1]) * ((j < i) & (j > 0))
        forgotten = torch.stack([asked[:, :, :row].sum(2) for row in range(m)], 2)
        return softmax(s - forgotten, visible) @ rep(v, q.shape[1])

    agree(lambda *x: recipes.selective(*x, block=block), oracle, *qkv(m=m, n=n), **options)


def convolved(x, kernel, visible):
    """By its definition: out[i, j] = sum_ab kernel[a, b] x[i - (cq - 1) + a, j - (ck - 1) / 2 + b]."""
    x = x * visible
    cq, ck = kernel.shape[-2:]
    out = torch.zeros_like(x)
    for a in range(cq):
        for b in range(ck):
            back, aside = cq - 1 - a, b - (ck - 1) // 2
            moved = F.pad(x, (max(-aside, 0), max(aside, 0), back, 0))
            moved = moved[:, :, : x.shape[2], max(aside, 0) : max(aside, 0) + x.shape[3]]
            out = out + kernel[:, 0, a, b][:, None, None] * moved
    return out


@DTYPES
@pytest.mark.parametrize(("m", "n"), [(13, 13), (9, 14), (12, 9)])
def test_multi_token(m, n, options):
    q, k, v = qkv(m=m, n=n)
    pre, post = draw(4, 1, 3, 5, seed=3) / 3, draw(4, 1, 2, 3, seed=4) / 2
    pre_mix, post_mix = draw(4, 4, seed=5) / 2, draw(4, 4, seed=6) / 2

    def oracle(q, k, v, pre, pre_mix, post=None, post_mix=None):
        shown = causal(m, n)
        p = softmax(torch.einsum("hg,bgmn->bhmn", pre_mix, convolved(score(q, k), pre, shown)), shown)
        if post is not None:
            p = torch.einsum("hg,bgmn->bhmn", post_mix, convolved(p, post, shown) * shown)
        return p @ rep(v, q.shape[1])

    def program(*x):
        return recipes.multi_token(*x, block=5)

    agree(program, oracle, q, k, v, pre, pre_mix, **options)
    agree(program, oracle, q, k, v, pre, pre_mix, post, post_mix, **options)


def test_multi_token_without_mixing_is_attention():
    """An identity kernel; and nothing of the future comes through the convolution of keys."""
    q, k, v = (x.float() for x in qkv())
    identity = torch.zeros(4, 1, 3, 5)
    identity[:, :, -1, 2] = 1
    out = recipes.multi_token(q, k, v, identity, block=4)
    torch.testing.assert_close(out, ac.compile("causal")(q, k, v), rtol=1e-5, atol=1e-6)
    kernel = draw(4, 1, 3, 5, seed=3).float()
    changed = k.clone()
    changed[:, :, 8:] += 1
    before, after = (recipes.multi_token(q, x, v, kernel, block=4) for x in (k, changed))
    assert torch.equal(before[:, :, :8], after[:, :, :8])


@DTYPES
def test_fastformer(options):
    q, k = draw(2, 3, 13, 16), draw(2, 3, 13, 16, seed=1)
    w_q, w_k = draw(3, 48, seed=2) / 4, draw(3, 48, seed=3) / 4
    keep = (torch.arange(13) < torch.tensor([[13], [8]])).int()

    def oracle(q, k, w_q, w_k):
        """The paper's, head by head."""
        result = torch.zeros_like(q)
        rows, products = q.transpose(1, 2).flatten(2), []
        for h in range(3):
            a = (rows @ w_q[h] / 4).masked_fill(keep == 0, -torch.inf).softmax(-1)
            products.append(torch.einsum("bn,bnd->bd", a, q[:, h])[:, None] * k[:, h])
        rows = torch.cat(products, -1)
        for h in range(3):
            b = (rows @ w_k[h] / 4).masked_fill(keep == 0, -torch.inf).softmax(-1)
            result[:, h] = torch.einsum("bn,bnd->bd", b, products[h])[:, None] * q[:, h]
        return result

    agree(lambda *x: recipes.fastformer(*x, keep), oracle, q, k, w_q, w_k, **options)


@DTYPES
def test_interactive(options):
    q, k, v = qkv(heads=3, kv_heads=3, m=11, n=14)
    weights = [draw(*s, seed=i + 3) for i, s in enumerate(((3, 5, 3), (3, 5), (6, 3), (3, 6)))]

    def oracle(q, k, v, inner_in, inner_out, cross_in, cross_out):
        maps = [[q[:, h] @ k[:, g].mT / 4 for g in range(3)] for h in range(3)]
        heads = []
        for h in range(3):
            units = [F.relu(sum(inner_in[h, c, g] * maps[h][g] for g in range(3))) for c in range(5)]
            heads.append(sum(inner_out[h, c] * units[c] for c in range(5)))
        units = [F.relu(sum(cross_in[c, h] * heads[h] for h in range(3))) for c in range(6)]
        scores = torch.stack([sum(cross_out[h, c] * units[c] for c in range(6)) for h in range(3)], 1)
        return scores.softmax(-1) @ v

    agree(lambda *x: recipes.interactive(*x, block=4), oracle, q, k, v, *weights, **options)


def superglue(s, alpha, iterations):
    """The authors' log-domain Sinkhorn."""
    m, n = s.shape[-2:]
    z = F.pad(s, (0, 1, 0, 1))
    edge = torch.zeros_like(z, dtype=torch.bool)
    edge[..., -1, :] = edge[..., -1] = True
    z = torch.where(edge, alpha, z)
    norm = -math.log(m + n)
    mu, nu = (torch.full((*s.shape[:-2], size + 1), norm, dtype=s.dtype) for size in (m, n))
    mu[..., -1] += math.log(n)
    nu[..., -1] += math.log(m)
    u, w = torch.zeros_like(mu), torch.zeros_like(nu)
    for _ in range(iterations):
        u = mu - torch.logsumexp(z + w[..., None, :], -1)
        w = nu - torch.logsumexp(z + u[..., None], -2)
    return z + u[..., None] + w[..., None, :] - norm


@DTYPES
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_sinkhorn(kv_heads, options):
    q, k, v = qkv(heads=2, kv_heads=kv_heads, m=9, n=14)
    alpha = torch.tensor(0.7, dtype=torch.float64)

    def program(q, k, v, alpha):
        u, w, norm = recipes.potentials(q, k, alpha, iterations=4)
        return recipes.transported(q, k, v, u, w, norm)

    agree(program, lambda q, k, v, a: superglue(score(q, k), a, 4)[..., :-1, :-1].exp() @ v, q, k, v, alpha, **options)


def test_the_assignment_of_sinkhorn():
    q, k, _ = (x.float() for x in qkv(heads=2, kv_heads=2, m=9, n=14))
    alpha = torch.tensor(0.7)
    found = recipes.potentials(q, k, alpha, iterations=30)
    log_p = recipes.assignment(q, k, *found, alpha)
    torch.testing.assert_close(log_p.double(), superglue(score(q.double(), k.double()), 0.7, 30), rtol=1e-5, atol=1e-5)
    columns = log_p.exp().sum(-2)
    torch.testing.assert_close(columns[..., :-1], torch.ones(2, 2, 14), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(columns[..., -1], torch.full((2, 2), 9.0), rtol=1e-4, atol=1e-4)


@DTYPES
@pytest.mark.parametrize(("m", "n"), [(11, 13), (15, 4)])
def test_attention_flow(m, n, options):
    """Both directions, as the paper writes them: [h; u; h * u] for every pair."""

    def oracle(q, k, v, w_q, w_k, w_qk):
        h, u = q[..., :, None, :], rep(k, 4)[..., None, :, :]
        pairs = torch.cat([h.expand(-1, -1, -1, n, -1), u.expand(-1, -1, m, -1, -1), h * u], -1)
        s = torch.einsum("bhmnd,hd->bhmn", pairs, torch.cat([w_q, w_k, w_qk], -1))
        back = (s.amax(-1).softmax(-1)[..., None] * q).sum(-2)
        return torch.cat([(s.softmax(-1) @ rep(v, 4)).flatten(1), back.flatten(1)], 1)

    def program(q, k, v, *w):
        out, top = recipes.attention_flow(q, k, v, *w)
        back = (top.softmax(-1)[..., None] * q.float()).sum(-2)
        return torch.cat([out.float().flatten(1), back.flatten(1)], 1)

    w = (draw(4, 16, seed=i) / 4 for i in (3, 4, 5))
    agree(program, oracle, *qkv(m=m, n=n), *w, **options)


@DTYPES
def test_weighted_groups(options):
    op, (q, k, v) = ac.compile("causal"), qkv(kv_heads=4, m=11, n=13)
    of_k, of_v = draw(4, 1, 1, seed=3), draw(4, 1, 16, seed=4)

    def oracle(q, k, v, a, b):
        keys, values = ((x[:, :2] * w[:2]).sum(1, keepdim=True) for x, w in ((k, a), (v, b)))
        keys = torch.cat([keys, (k[:, 2:] * a[2:]).sum(1, keepdim=True)], 1)
        values = torch.cat([values, (v[:, 2:] * b[2:]).sum(1, keepdim=True)], 1)
        return softmax(score(q, keys), causal(11, 13)) @ rep(values, 4)

    agree(lambda *x: recipes.weighted_groups(op, *x, groups=2), oracle, q, k, v, of_k, of_v, **options)


@DTYPES
def test_relational(options):
    op, (q, k, symbols) = ac.compile("causal"), qkv(m=11, n=13)
    q_rel, k_rel, w = draw(2, 3, 11, 8, seed=3), draw(2, 3, 13, 8, seed=4), draw(4, 16, 3, seed=5) / 2

    def oracle(q, k, symbols, q_rel, k_rel, w):
        p, r = softmax(score(q, k), causal(11, 13)), q_rel @ k_rel.mT / math.sqrt(8)
        return torch.einsum("bhmn,bhmnd->bhmd", p, rep(symbols, 4)[:, :, None] + torch.einsum("brmn,hdr->bhmnd", r, w))

    agree(lambda *x: recipes.relational(op, *x), oracle, q, k, symbols, q_rel, k_rel, w, **options)


@DTYPES
def test_collinear(options):
    """The paper's sum over pairs, with the angle of the difference of positions."""
    theta = torch.tensor([1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003], dtype=torch.float64)
    op, (q, t, v) = ac.compile("causal"), qkv(m=9, n=12)

    def oracle(q, t, v):
        a, b = q.chunk(2, -1)
        lengths = rep(F.relu((t[..., :8] + t[..., 8:]) / 2), 4)
        i, j = torch.arange(9)[:, None] + 3, torch.arange(12)
        turn = torch.cos((i - j)[..., None] * theta)
        s = torch.einsum("bhmd,bhnd,mnd->bhmn", a * a + b * b, lengths, turn) / 4
        return softmax(s, causal(9, 12)) @ rep(v, 4)

    agree(lambda *x: recipes.collinear(op, *x, theta), oracle, q, t, v, **options)


@DTYPES
def test_rela(options):
    q, k, v = qkv(m=13, n=13)
    gain, gate = draw(64, seed=3), draw(64, seed=4)

    def oracle(q, k, v, gain, gate):
        x = ((F.relu(score(q, k)) * causal(13, 13)) @ rep(v, 4)).transpose(1, 2).flatten(2)
        return F.rms_norm(x, (64,), gain, 1e-2) * torch.sigmoid(gate * x)

    agree(lambda *x: recipes.rela_block(*x, eps=1e-2), oracle, q, k, v, gain, gate, **options)


def test_rescaled():
    """At the step of the refresh itself, and one later with other tensors."""
    q, k, v = (x.float() for x in qkv(m=16, n=16))
    near = ac.compile(ac.Variant(mask=ac.window(3, 3)))
    out, rho, rest = recipes.refresh(near, q, k, v)
    torch.testing.assert_close(recipes.rescaled(near, q, k, v, rho, rest), out, rtol=1e-5, atol=1e-6)
    shown = (torch.arange(16)[:, None] - torch.arange(16)).abs() <= 3
    p = score(q.double(), k.double()).softmax(-1)
    torch.testing.assert_close(rho.double(), (p * shown).sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)
    later = recipes.rescaled(near, q, k, v + 1, rho + 0.04, rest)
    masked = softmax(score(q.double(), k.double()), shown) @ rep(v.double() + 1, 4)
    torch.testing.assert_close(later.double(), (rho + 0.04) * masked + rest, rtol=1e-5, atol=1e-5)


def test_monotonic():
    """Against the recursion over keys that defines it, and a sum over where the reader stops."""
    p, energy, v = draw(1, 2, 7, 9).sigmoid(), draw(1, 2, 7, 9, seed=1), draw(1, 2, 9, 4, seed=2)

    def alignment(p):
        before, rows = F.one_hot(torch.zeros(1, 2, dtype=torch.long), 9).double(), []
        for i in range(7):
            reach, row = torch.zeros(1, 2, dtype=torch.float64), []
            for j in range(9):
                reach = (reach * (1 - p[:, :, i, j - 1]) if j else reach) + before[..., j]
                row.append(p[:, :, i, j] * reach)
            before = torch.stack(row, -1)
            rows.append(before)
        return torch.stack(rows, 2)

    def oracle(p, energy, v):
        alpha, u = alignment(p), energy.exp()
        beta = sum(
            alpha[..., stop : stop + 1] * F.pad(u[..., : stop + 1], (0, 8 - stop)) / u[..., : stop + 1].sum(-1, True)
            for stop in range(9)
        )
        return beta @ v

    agree(recipes.monotonic, oracle, p, energy, v)
    long = torch.full((1, 1, 1, 4000), 0.3)
    assert recipes.expected_alignment(long).isfinite().all()


def test_dynamic_convolution():
    last = draw(2, 11).softmax(-1)
    dynamic, static = draw(2, 3, 5, seed=1), draw(4, 1, 5, seed=2)
    u, t, b, v = draw(4, 6, seed=3), draw(3, 6, seed=4), draw(6, seed=5), draw(6, seed=6)
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def oracle(last, dynamic, static, u, t, b, v, prior):
        padded = F.pad(last, (2, 2))
        windows = padded.unfold(1, 5, 1)  # (B, N, 5)
        f, g = torch.einsum("bnw,cw->bnc", windows, static[:, 0]), torch.einsum("bnw,bcw->bnc", windows, dynamic)
        ahead = sum(prior[i] * F.pad(last, (i, 0))[:, :11] for i in range(3))
        return (torch.tanh(f @ u + g @ t + b) @ v + ahead.clamp_min(1e-6).log()).softmax(-1)

    agree(recipes.dynamic_convolution, oracle, last, dynamic, static, u, t, b, v, prior)


@DTYPES
def test_a_learned_query_is_a_scan_over_keys(options):
    token, k, v = draw(2, 16), draw(2, 2, 140, 16, seed=1), draw(2, 2, 140, 8, seed=2)
    if "dtype" in options:
        k, v = k[:, :, :20], v[:, :, :20]

    def oracle(token, k, v):
        s = (k * token[:, None]).sum(-1) / 4
        return torch.stack(
            [s[..., : i + 1].softmax(-1)[..., None, :] @ v[:, :, : i + 1] for i in range(k.shape[2])], 2
        )[..., 0, :]

    agree(recipes.one_query, oracle, token, k, v, **options)
    agree(lambda t, k, v: recipes.keys_alone((k * t[:, None]).sum(-1) / 4, v), oracle, token, k, v, **options)


def test_a_scan_of_steep_scores_does_not_overflow():
    s = torch.linspace(-300, 300, 130)[None, None].requires_grad_()
    v = draw(1, 1, 130, 4).float()
    out = recipes.keys_alone(s, v)
    torch.testing.assert_close(out[0, 0, -1], s[0, 0].softmax(-1) @ v[0, 0])
    assert torch.autograd.grad(out.sum(), s)[0].isfinite().all()


def test_mixing_and_gates():
    w, x = draw(9, 9), draw(2, 9, 6, seed=1)
    expected = torch.stack([sum(w[i, j] * x[:, j] for j in range(i + 1)) for i in range(9)], 1)
    torch.testing.assert_close(recipes.left_multiplied(w, x, causal=True), expected)
    torch.testing.assert_close(recipes.left_multiplied(w, x), torch.einsum("ij,bjd->bid", w, x))
    uniform = torch.full((9, 9), 1 / 9, dtype=torch.float64) @ x
    torch.testing.assert_close(recipes.mixed_with_mean(x), (x + uniform) / 2)
    gain = draw(6, seed=2)
    torch.testing.assert_close(recipes.mixed_with_mean(x, gain), x + gain * uniform)
    center, width = draw(3, seed=3), draw(3, seed=4).abs() + 0.5
    z = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-8).sqrt()
    density = sum(torch.distributions.Normal(c, s).log_prob(z) for c, s in zip(center, width, strict=True))
    torch.testing.assert_close(recipes.gaussian_gate(x, center, width, 1), x * density.softmax(1))


def test_a_backward_keeps_no_scores():
    """What a block of queries made is made again: between the passes nothing has M x N entries."""
    q, k, v = (x.float().requires_grad_() for x in qkv(batch=1, m=64, n=64))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        recipes.selective(q, k, v, block=16)
        recipes.multi_token(q, k, v, draw(4, 1, 3, 3).float(), block=16)
    assert max(kept) < 64 * 64


@DTYPES
def test_additive_scores(options):
    q, k, v = qkv(m=15, n=11)
    v_a = draw(4, 16, seed=3)

    def scores(q, k, v_a):
        return torch.stack([(torch.tanh(q[:, :, i : i + 1] + k) * v_a[:, None]).sum(-1) for i in range(15)], 2)

    def program(q, k, v, v_a):
        return recipes.pairwise(recipes.additive(v_a), q, k, v, block=7)

    def oracle(q, k, v, v_a):
        return scores(q, rep(k, 4), v_a).softmax(-1) @ rep(v, 4)

    agree(program, oracle, q, k, v, v_a, **options)


@DTYPES
def test_a_network_of_pairs(options):
    q, k, v = qkv(m=15, n=11)
    w2, b2, w3 = draw(4, 16, seed=3) / 2, draw(4, seed=4), draw(4, seed=5)

    def oracle(q, k, v, w2, b2, w3):
        keys, s = rep(k, 4), []
        for i in range(15):
            hidden = (q[:, :, i : i + 1] + keys).clamp(min=0)
            s.append(sum(w3[c] * ((hidden * w2[c]).sum(-1) + b2[c]).clamp(min=0) for c in range(4)))
        return softmax(torch.stack(s, 2), causal(15, 11)) @ rep(v, 4)

    def program(q, k, v, *weights):
        return recipes.pairwise(recipes.network(*weights), q, k, v, causal=True, block=4)

    agree(program, oracle, q, k, v, w2, b2, w3, **options)


@DTYPES
@pytest.mark.parametrize("masked", [False, True], ids=["full", "causal"])
def test_what_keys_receive_of_scores_of_pairs(masked, options):
    """Show, attend and tell wants each part of the image to get as much in all: (1 - sum of its weights)^2."""
    q, k, v = qkv(m=15, n=11)
    v_a = draw(4, 16, seed=3) / 2

    def program(q, k, v, v_a):
        out, sums = recipes.pairwise(recipes.additive(v_a), q, k, v, causal=masked, block=4, received=True)
        return torch.cat([out.float().flatten(1), (1 - sums).square().flatten(1)], 1)

    def oracle(q, k, v, v_a):
        s = (torch.tanh(q[:, :, :, None] + rep(k, 4)[:, :, None]) * v_a[:, None, None]).sum(-1)
        p = softmax(s, causal(15, 11)) if masked else s.softmax(-1)
        return torch.cat([(p @ rep(v, 4)).flatten(1), (1 - p.sum(2)).square().flatten(1)], 1)

    agree(program, oracle, q, k, v, v_a, **options)
