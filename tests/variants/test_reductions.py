"""Variants of the reduction stage against plain PyTorch, written by hand: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch

import attncc as ac
from attncc.errors import InputError, SpecError

from .by_hand import HALF, agree, causal, draw, rep, score, softmax


@pytest.mark.parametrize(
    ("heads", "kv_heads", "m", "n", "options"), [(4, 2, 37, 53, {}), (2, 2, 70, 41, {}), (4, 1, 45, 45, HALF)]
)
def test_gates_of_heads(heads, kv_heads, m, n, options):
    """Top-2 routing, token by token: closed gates, in single rows and in whole blocks, take no part and get no
    gradient. The oracle routes as its authors do, so that their zeros are constants there, too."""
    arguments = draw(2, heads, m, 16), draw(2, kv_heads, n, 16, seed=1), draw(2, kv_heads, n, 24, seed=2)
    gate = draw(2, heads, m, seed=3).abs() + 0.5
    chosen = torch.zeros_like(gate, dtype=torch.bool).scatter(1, draw(2, heads, m, seed=4).topk(2, 1).indices, True)
    chosen[:, 0] = torch.arange(m) >= 36  # a whole block of closed gates, then an open one

    def oracle(q, k, v, gate):
        out = softmax(score(q, k), causal(m, n)) @ rep(v, heads)
        return torch.where(chosen, gate, 0.0)[..., None] * out

    agree(ac.variants.get("head_gates"), oracle, arguments, gate=torch.where(chosen, gate, 0.0), **options)


def test_one_gate_a_sequence():
    """The mixture of h - 1 heads: sum_j h/(h-1) (1 - g_j) H_j, with one expert left out entirely."""
    arguments = [draw(2, 3, 20, 8, seed=i) for i in range(3)]
    share = draw(2, 3, 1, seed=4).softmax(1)
    share[0] = torch.tensor([[0.0], [1.0], [0.0]])

    def oracle(q, k, v, gate):
        return (gate * (gate != 0))[..., None] * (softmax(score(q, k), causal(20, 20)) @ v)

    agree(ac.variants.get("head_gates"), oracle, arguments, gate=1.5 * (1 - share))


def test_blocks_with_closed_gates_are_skipped():
    """Their keys are not even read: NaN in them does not reach the result, and gradients stay finite."""
    q, k, v = (draw(1, 2, 128, 16, seed=i).float() for i in range(3))
    gate = torch.ones(1, 2, 128)
    gate[:, 1] = 0.0
    v[:, 1] = k[:, 1] = float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v, gate)]
    out = ac.compile("head_gates")(*leaves[:3], gate=leaves[3])
    assert out.isfinite().all()
    assert (out[:, 1] == 0).all()
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert (gradient[:, 1] == 0).all()


def test_shared_differential_projections():
    """Shared DIFF: one matrix for both maps and one of low rank for each, the head norm behind the op."""
    heads, d, length, width = 2, 8, 21, 32
    x, lam = draw(1, length, width).requires_grad_(), draw(heads, seed=1).requires_grad_()
    common = [draw(width, heads * d, seed=i) for i in (2, 3)]
    low = [(draw(2, width, 2, seed=i), draw(2, 2, heads * d, seed=i + 1)) for i in (4, 6)]
    w_v, gamma, lam_init = draw(width, heads * 2 * d, seed=8), draw(2 * d, seed=9), 0.2
    maps = [torch.stack([x @ w + (x @ a[r]) @ b[r] for r in (0, 1)]) for w, (a, b) in zip(common, low, strict=True)]
    q, k = (m.unflatten(-1, (heads, d)).permute(1, 3, 2, 0, 4).flatten(3) for m in maps)  # (B, H, L, 2 * d)
    v = (x @ w_v).unflatten(-1, (heads, 2 * d)).transpose(1, 2)

    def finished(out):
        return out * torch.rsqrt(out.square().mean(-1, keepdim=True) + 1e-5) * gamma * (1 - lam_init)

    op = ac.compile("differential")
    got = finished(op(q.float(), k.float(), v.float(), lam=lam.float()).double())
    p = [softmax(score(a, b), causal(length, length)) for a, b in zip(q.split(d, -1), k.split(d, -1), strict=True)]
    want = finished((p[0] - lam[:, None, None] * p[1]) @ v)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    cotangent = draw(*want.shape, seed=12)
    for a, b in zip(
        *(torch.autograd.grad(y, (x, lam), cotangent, retain_graph=True) for y in (got, want)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("value", "d_qk", "options"), [(24, 40, {}), (32, 32, {}), (32, 48, HALF)])
def test_values_that_are_the_first_part_of_the_keys(value, d_qk, options):
    """Absorbed latent attention: one key head, no v, and a gradient of k with both of its parts."""
    variant = ac.Variant(mask=ac.causal, value=f"k[:{value}]")
    arguments = draw(2, 4, 37, d_qk), draw(2, 1, 29, d_qk, seed=1)
    agree(variant, lambda q, k: softmax(score(q, k), causal(37, 29)) @ k[..., :value], arguments, **options)


def test_a_part_of_k_is_the_value_whatever_the_normalizer_and_the_similarity():
    """A second sweep, and the sweep of a gradient through a mean, read v where k lies; so do scores without k."""
    arguments = draw(1, 4, 21, 40), draw(1, 1, 29, 40, seed=1)

    def above_the_mean(s):
        return (s - s.mean(-1, keepdim=True)).relu()

    variant = ac.Variant(normalizer=lambda score, row: ac.relu(score - row.mean(score)), value="k[:24]")
    agree(variant, lambda q, k: above_the_mean(score(q, k)) @ k[..., :24], arguments)
    near = ac.Variant(similarity=lambda q_idx, kv_idx: -0.1 * (q_idx - kv_idx) ** 2, value="k[:24]")
    op, (q, k) = ac.compile(near), (x.float().requires_grad_() for x in arguments)
    i, j = torch.arange(21)[:, None], torch.arange(29)
    want = (-0.1 * (i - j) ** 2).softmax(-1) @ k[..., :24].expand(1, 4, 29, 24)
    torch.testing.assert_close(op(q, k), want, rtol=1e-5, atol=1e-6)
    found, exact = (torch.autograd.grad(x.square().sum(), k)[0] for x in (op(q, k), want))
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_absorbed_latents_are_the_unabsorbed_form():
    """MLA's identity, at its own sizes: absorbing W_K into q and W_V into the output changes nothing."""
    heads, m, nope, rope, latent = 2, 9, 16, 64, 512
    q_n, q_r = draw(1, heads, m, nope), draw(1, heads, m, rope, seed=1)
    c, k_r = draw(1, 1, m, latent, seed=2) / 8, draw(1, 1, m, rope, seed=3)
    w_k, w_v = draw(heads, nope, latent, seed=4) / 8, draw(heads, 16, latent, seed=5) / 8
    keys = torch.cat([torch.einsum("bnc,hdc->bhnd", c[:, 0], w_k), k_r.expand(-1, heads, -1, -1)], -1)
    want = softmax(score(torch.cat([q_n, q_r], -1), keys), causal(m, m)) @ torch.einsum("bnc,hdc->bhnd", c[:, 0], w_v)
    q = torch.cat([torch.einsum("bhmd,hdc->bhmc", q_n, w_k), q_r], -1).float()
    out = ac.compile("mla")(q, torch.cat([c, k_r], -1).float(), scale=(nope + rope) ** -0.5)
    torch.testing.assert_close(torch.einsum("bhmc,hdc->bhmd", out.double(), w_v), want, rtol=1e-4, atol=1e-5)


def test_a_call_says_once_what_the_values_are():
    q, k = draw(1, 1, 4, 48).float(), draw(1, 1, 4, 48).float()
    op = ac.compile(ac.Variant(value="k[:32]"))
    with pytest.raises(InputError, match=r"are k\[..., :32\](.|\n)*pass q and k alone"):
        op(q, k, k)
    with pytest.raises(InputError, match="head dim >= 32"):
        op(q[..., :16], k[..., :16])
    with pytest.raises(InputError, match="'causal' needs v"):
        ac.compile("causal")(q, k)
    for wrong in ("v[:3]", "k[:0]", 5):
        with pytest.raises(SpecError, match=r"the value is .*(.|\n)*k\[:512\]"):
            ac.Variant(value=wrong)
    with pytest.raises(SpecError, match=r"spec.toml:1: the value is 'k'(.|\n)*\^\^\^\^\^"):
        ac.loads_toml("value = 'k'", file="spec.toml")


@pytest.mark.parametrize("options", [{}, HALF])
def test_several_heads_of_v_share_a_weight(options):
    """Clustered heads (CHAI): one map a cluster, every head its own v. Each key head has three heads of v here."""
    arguments = draw(2, 4, 37, 16), draw(2, 2, 45, 16, seed=1), draw(2, 6, 45, 24, seed=2)

    def oracle(q, k, v):
        p = softmax(score(q, k), causal(37, 45))
        return torch.stack([p[:, h] @ v[:, h // 2 * 3 + i] for h in range(4) for i in range(3)], 1)

    agree(ac.variants.get("causal"), oracle, arguments, **options)


def test_heads_of_v_are_a_multiple_of_those_of_k():
    q, k, v = (draw(1, h, 4, 16).float() for h in (4, 2, 3))
    with pytest.raises(InputError, match="number of key/value heads: 2 and 3, which is no multiple"):
        ac.compile("causal")(q, k, v)
