"""Denominators of every kind, and weights whose row statistic is given, against plain PyTorch by hand."""

from __future__ import annotations

import pytest
import torch

import attncc as ac
from attncc.errors import UnsupportedError

from .by_hand import HALF, agree, causal, draw, rep, score

SIZES = ((4, 2, 37, 53), (2, 1, 29, 17))  # the second has queries that see no key


def bounded(score, row):
    return score / ac.maximum(ac.abs(row.sum(score)), 1)


def bounded_detached(score, row):
    return score / ac.detach(ac.maximum(ac.abs(row.sum(score)), 1))


def retention(score, row):
    return score / ac.detach(ac.maximum(row.sum(ac.abs(score)), 1))


def elu_over_sum(score, row):
    p = ac.where(score > 0, score + 1, ac.exp(ac.minimum(score, 0)))
    return p / (row.sum(p) + 1e-3)


#: the formula in Python and as text, and the denominator of rows of weights in PyTorch
CASES = {
    "bounded": (bounded, "score / maximum(abs(row.sum(score)), 1)", lambda w: w.sum(-1, True).abs().clamp(min=1)),
    "bounded_detached": (
        bounded_detached,
        "score / detach(maximum(abs(row.sum(score)), 1))",
        lambda w: w.sum(-1, True).abs().clamp(min=1).detach(),
    ),
    "retention": (
        retention,
        "score / detach(maximum(row.sum(abs(score)), 1))",
        lambda w: w.abs().sum(-1, True).clamp(min=1).detach(),
    ),
    "elu_over_sum": (
        elu_over_sum,
        "p = score + 1 if score > 0 else exp(minimum(score, 0))\np / (row.sum(p) + 1e-3)",
        lambda w: w.sum(-1, True) + 1e-3,
    ),
}


@pytest.mark.parametrize("options", [{}, HALF], ids=["fp32", "fp16"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_denominators(name, sizes, options):
    normalizer, text, denominator = CASES[name]
    variant = ac.Variant(normalizer=normalizer, mask=ac.causal)
    written = ac.loads_toml(f"[stages]\nmask = 'kv_idx <= q_idx + kv_len - q_len'\nnormalizer = '''{text}'''")
    assert written.graph.digest == variant.graph.digest
    heads, kv_heads, m, n = sizes
    arguments = draw(1, heads, m, 16), draw(1, kv_heads, n, 16, seed=1), draw(1, kv_heads, n, 24, seed=2)

    def oracle(q, k, v):
        s = score(q, k)
        w = (torch.nn.functional.elu(s) + 1 if name == "elu_over_sum" else s) * causal(m, n)
        return w / denominator(w) @ rep(v, heads)

    agree(variant, oracle, arguments, **options)


def given(score, b, h, q_idx, total):
    """`total` is the log of the denominator."""
    return ac.exp(score - total[b, h, q_idx])


GIVEN = {"total": ac.Input("b", "h", "q_idx", grad=True)}


@pytest.mark.parametrize("options", [{}, HALF], ids=["fp32", "fp16"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_weights_with_a_given_denominator(sizes, options):
    """Attention shared by layers, and skimming: the weights of one layer, from its q, k and lse, meet another's v."""
    variant = ac.Variant(normalizer=given, mask=ac.causal, inputs=GIVEN)
    written = ac.loads_toml(
        "[stages]\nmask = 'kv_idx <= q_idx + kv_len - q_len'\nnormalizer = 'exp(score - total[b, h, q_idx])'\n"
        "[inputs]\ntotal = { index = ['b', 'h', 'q_idx'], grad = true }"
    )
    assert written.graph.digest == variant.graph.digest
    heads, kv_heads, m, n = sizes
    arguments = draw(1, heads, m, 16), draw(1, kv_heads, n, 16, seed=1), draw(1, kv_heads, n, 24, seed=2)
    lse = score(*arguments[:2]).masked_fill(~causal(m, n), -torch.inf).logsumexp(-1)

    def oracle(q, k, v, total):
        shown = causal(m, n)
        s = (score(q, k) - total[..., None]).masked_fill(~shown, -torch.inf)
        return torch.where(shown, s.exp(), 0.0) @ rep(v, heads)

    lse = lse.where(lse > -torch.inf, 0.0)  # of rows that see no key: what it is there is never read
    agree(variant, oracle, arguments, total=lse, **options)


def test_shared_weights_are_those_of_the_layer_that_made_them():
    """Two calls: one layer's attention with its lse, and the next layer's v under the same weights. The gradient of q
    and k is that of both layers, through the lse, too, whose -inf in rows without keys does no harm."""
    first, shared = ac.compile("causal"), ac.compile(ac.Variant(normalizer=given, mask=ac.causal, inputs=GIVEN))
    q, k, v, w = (draw(1, 2, n, 16, seed=i).float().requires_grad_() for i, n in enumerate((29, 17, 17, 17)))
    out, lse = first(q, k, v, outputs=("out", "lse"))
    got = (out * shared(q, k, w, total=lse)).sum()
    want = (first(q, k, v) * first(q, k, w)).sum()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v, w)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_row_statistic_no_lse():
    """exp(score) alone has no denominator, nor have weights with a given one; a shift that cancels leaves no trace."""
    q, k, v = (draw(1, 1, 9, 16, seed=i).float() for i in range(3))
    shift = draw(1, 1, 9).float().requires_grad_()
    for normalizer in (given, lambda score: ac.exp(score)):
        inputs = GIVEN if normalizer is given else {}
        op = ac.compile(ac.Variant(normalizer=normalizer, inputs=inputs))
        with pytest.raises(UnsupportedError, match="no row statistic"):
            op(q, k, v, outputs="lse", **dict.fromkeys(inputs, shift.detach()))

    def over_sum(score, b, h, q_idx, row, total):
        p = given(score, b, h, q_idx, total)
        return p / row.sum(p)

    op = ac.compile(ac.Variant(normalizer=over_sum, inputs=GIVEN))
    out, lse = op(q, k, v, outputs=("out", "lse"), total=shift)
    torch.testing.assert_close(lse, score(q, k).logsumexp(-1), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(out.sum() + 3 * lse.sum(), shift)
    assert gradient.abs().max() < 1e-5
