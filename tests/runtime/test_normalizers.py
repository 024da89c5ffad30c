"""Normalizers of several passes, and implicit ones: kernels in the interpreter against plain PyTorch written by hand.

The oracles are not the reference: sorted closed forms of sparsemax and entmax, and formulas over whole rows.
"""

from __future__ import annotations

import pytest
import torch

import attncc as ac
from attncc.runtime.reference import reference
from attncc.runtime.samples import Shape, sample_inputs
from tests.passes import dense
from tests.variants.by_hand import agree, draw, score

from .oracles import sorted_entmax15, sorted_sparsemax

ODD = Shape(1, 2, 1, 21, 37, 16, 24, strided=True)
#: with causal, the first 12 queries see no key
MORE_QUERIES = Shape(1, 2, 2, 29, 17, 16, 16)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 6e-3}


def causal(m, n):
    return torch.ones(m, n, dtype=torch.bool).tril(n - m)


def below_the_largest(s):
    return (s - s.amax(-1, keepdim=True) + 1).relu()


def visible(s):
    return s > -torch.inf


def above_the_mean(s):
    shown = visible(s)
    mean = s.where(shown, 0.0).sum(-1, keepdim=True) / shown.sum(-1, keepdim=True)
    return (s - mean).relu().where(shown, 0.0)


def standardized(s):
    shown = visible(s)
    count, x = shown.sum(-1, keepdim=True), s.where(shown, 0.0)
    mean = x.sum(-1, keepdim=True) / count
    spread = (x - mean).square().where(shown, 0.0).sum(-1, keepdim=True) / count
    return ((x - mean) / (spread + 1e-3).sqrt()).masked_fill(~shown, -torch.inf).softmax(-1)


def from_least_to_largest(s):
    shown = visible(s)
    low, high = s.where(shown, torch.inf).amin(-1, keepdim=True), s.amax(-1, keepdim=True)
    x = ((s.where(shown, 0.0) - low) / (high - low + 0.1)).where(shown, 0.0)
    return x / (x.sum(-1, keepdim=True) + 1)


def kept_probabilities(s):
    p = s.softmax(-1)
    kept = p.where(p > 0.03, 0.0)
    return kept / (kept.sum(-1, keepdim=True) + 0.1)


def sharper_where_flat(s):
    """A temperature by the row's entropy, which rows below 0.5 have not: there its slope is 0."""
    log_p = s.log_softmax(-1).where(visible(s), 0.0)
    entropy = -(s.softmax(-1) * log_p).sum(-1, keepdim=True)
    factor = torch.where(entropy > 0.5, 1 + 0.3 * entropy - 0.05 * entropy.square(), 1.0)
    return (factor * s.where(visible(s), 0.0)).masked_fill(~visible(s), -torch.inf).softmax(-1)


def over_the_largest(s):
    return (s - s.amax(-1, keepdim=True)).exp()


def sharp(s):
    """The t with sum sigmoid(3 (s - t)) = 0.7, by bisection and the implicit function theorem."""
    shown = visible(s)
    low, high = s.amax(-1, keepdim=True) - 9, s.amax(-1, keepdim=True) + 9
    with torch.no_grad():
        for _ in range(80):
            t = (low + high) / 2
            more = (torch.sigmoid(3 * (s - t)).where(shown, 0.0).sum(-1, keepdim=True)) > 0.7
            low, high = low.where(~more, t), high.where(more, t)
    w = torch.sigmoid(3 * (s - t)).where(shown, 0.0)
    slope = (3 * w * (1 - w)).detach().sum(-1, keepdim=True)
    t = t + (w.sum(-1, keepdim=True) - w.detach().sum(-1, keepdim=True)) / slope
    return torch.sigmoid(3 * (s - t)).where(shown, 0.0)


def _kept_probabilities(score, row):
    p = ac.softmax(score, row)
    kept = ac.where(p > 0.03, p, 0)
    return kept / (row.sum(kept) + 0.1)


def _sharp(score, row):
    top = row.max(score)
    t = row.root(lambda t: row.sum(ac.sigmoid(3 * (score - t))) - 0.7, top - 9, top + 9)
    return ac.sigmoid(3 * (score - t))


def _sharper_where_flat(score, row):
    top = row.max(score)
    p = ac.exp(score - top)
    total = row.sum(p)
    entropy = ac.log(total) - row.sum(p * (score - top)) / total
    factor = ac.where(entropy > 0.5, 1 + 0.3 * entropy - 0.05 * entropy**2, 1)
    w = ac.exp(factor * (score - top))
    return w / row.sum(w)


#: the formula, the oracle over rows of scores in which -inf is hidden, passes over the keys
CASES = {
    "entmax15": (ac.entmax15, sorted_entmax15, 3),
    "sparsemax": (ac.sparsemax, sorted_sparsemax, 3),
    "below_the_largest": (lambda score, row: ac.relu(score - row.max(score) + 1), below_the_largest, 2),
    "above_the_mean": (dense.above_the_mean, above_the_mean, 2),
    "standardized": (dense.standardized, standardized, 3),
    "from_least_to_largest": (dense.from_least_to_largest, from_least_to_largest, 2),
    "kept_probabilities": (_kept_probabilities, kept_probabilities, 2),
    "over_the_largest": (lambda score, row: ac.exp(score - row.max(score)), over_the_largest, 1),
    "sharp": (_sharp, sharp, 3),
    "sharper_where_flat": (_sharper_where_flat, sharper_where_flat, 3),
}


def by_hand(oracle, q, k, v):
    """The oracle's weights times v in float64, causal; a row that sees no key gives 0."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    shown = causal(q.shape[2], k.shape[2])
    live = shown.any(-1)
    score = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~shown, -torch.inf)[:, :, live]
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    return out.index_add(2, live.nonzero().squeeze(1), oracle(score) @ v)


def differ(got, exact):
    got, exact = got.detach().double(), exact.detach()
    return float((got - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [ODD, MORE_QUERIES], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels_against_plain_pytorch(name, shape, dtype):
    formula, oracle, passes = CASES[name]
    variant = ac.Variant(name=name, normalizer=formula, mask=ac.causal)
    op = ac.compile(variant)
    assert op.plan.online.passes == passes
    sample = sample_inputs(variant.graph, shape, dtype, seed=3)
    leaves = [x.clone().requires_grad_() for x in (sample.q, sample.k, sample.v)]
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    out, exact = op(*leaves), by_hand(oracle, *exact_leaves)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad(out, leaves, dout)
    expected = torch.autograd.grad(exact, exact_leaves, dout.double())
    assert differ(out, exact) < TOLERANCE[dtype]
    for which, got, wanted in zip("qkv", found, expected, strict=True):
        assert differ(got, wanted) < TOLERANCE[dtype], f"d{which}"
    dead = max(shape.q_len - shape.kv_len, 0)
    assert not out[:, :, :dead].any()
    assert not found[0][:, :, :dead].any()


@pytest.mark.parametrize("name", CASES)
def test_the_reference_against_plain_pytorch(name):
    formula, oracle, _ = CASES[name]
    variant = ac.Variant(normalizer=formula, mask=ac.causal)
    sample = sample_inputs(variant.graph, MORE_QUERIES, torch.float64)
    leaves = [x.clone().requires_grad_() for x in (sample.q, sample.k, sample.v)]
    results = [run(*leaves) for run in (lambda *x: reference(variant, *x), lambda *x: by_hand(oracle, *x))]
    grads = [torch.autograd.grad(r.square().sum(), leaves) for r in results]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_what_cancels_is_not_multiplied(dtype):
    """A row that sees one key has a deviation of 0 and no gradient; what rounding leaves of that meets 1 / 1e-3."""

    def standardized(score, row):
        mean = row.mean(score)
        z = (score - mean) / ac.sqrt(row.mean((score - mean) ** 2) + 1e-6)
        p = ac.exp(z - row.max(z))
        return p / row.sum(p)

    op = ac.compile(ac.Variant(normalizer=standardized, mask=ac.causal))
    q, k, v = (torch.randn(1, 2, 12, 16, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dq, *_ = torch.autograd.grad(op(*leaves), leaves, torch.randn_like(v))
    assert not dq[:, :, 0].any()
    assert dq[:, :, 2:].any()


def test_a_factor_of_the_reduction_is_none_of_the_weights_sum():
    """Delta is divided by the sum of the weights, which is 1 only without the factor of a row or a key."""

    def tempered(score, row):
        m = row.mean(score)
        z = (score - m) / ac.sqrt(1 + row.mean((score - m) ** 2))
        p = ac.exp(z - row.max(z))
        return p / row.sum(p)

    def oracle(q, k, v, f, e):
        s = score(q, k)
        m = s.mean(-1, keepdim=True)
        z = (s - m) / (1 + ((s - m) ** 2).mean(-1, keepdim=True)).sqrt()
        return f[..., None] * (z.softmax(-1) * e[:, None]) @ v

    variant = ac.Variant(
        normalizer=tempered,
        reduction=lambda weight, v_vec, row, b, h, q_idx, kv_idx, f, e: (
            f[b, h, q_idx] * row.sum(weight * e[h, kv_idx] * v_vec)
        ),
        inputs={"f": ac.Input("b", "h", "q_idx", grad=True), "e": ac.Input("h", "kv_idx", grad=True)},
    )
    arguments = draw(2, 2, 17, 16), draw(2, 2, 23, 16, seed=1), draw(2, 2, 23, 24, seed=2)
    agree(variant, oracle, arguments, f=draw(2, 2, 17, seed=3), e=draw(2, 23, seed=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_keys_that_tie_for_a_maximum_share_its_gradient(dtype):
    variant = ac.Variant(normalizer=lambda score, row: ac.relu(score - row.max(score) + 1))
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 20, 16, generator=generator).to(dtype)
    k = torch.randn(1, 1, 9, 16, generator=generator).to(dtype).repeat(1, 1, 5, 1)  # every key five times
    v = torch.randn(1, 1, 45, 16, generator=generator).to(dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ac.compile(variant)(*leaves)
    found = torch.autograd.grad(out, leaves, torch.ones_like(out))
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    # a product of matrices need not give equal keys the same last bit; these sums do
    score = (exact_leaves[0].unsqueeze(3) * exact_leaves[1].unsqueeze(2)).sum(-1) / 4
    exact = below_the_largest(score) @ exact_leaves[2]
    expected = torch.autograd.grad(exact, exact_leaves, torch.ones_like(exact))
    for got, wanted in zip(found, expected, strict=True):
        assert differ(got, wanted) < TOLERANCE[dtype]


def test_weights_of_implicit_normalizers_sum_to_one_and_are_sparse():
    generator = torch.Generator().manual_seed(0)
    q, k = (3 * torch.randn(1, 1, 40, 16, generator=generator) for _ in range(2))
    v = torch.eye(40)[None, None].contiguous()
    for name in ("entmax15", "sparsemax"):
        weight = ac.compile(name)(q, k, v)[0, 0]
        torch.testing.assert_close(weight.sum(-1), torch.ones(40), rtol=0, atol=2e-6)
        assert (weight == 0).float().mean() > 0.75  # half of it is hidden
        assert (weight >= 0).all()


def test_large_scores_do_not_upset_the_search():
    q, k = (40 * torch.randn(1, 1, 33, 16, generator=torch.Generator().manual_seed(i)) for i in range(2))
    v = torch.randn(1, 1, 33, 16)
    for name, oracle in (("entmax15", sorted_entmax15), ("sparsemax", sorted_sparsemax)):
        exact = by_hand(oracle, q.double(), k.double(), v.double())
        torch.testing.assert_close(ac.compile(name)(q, k, v).double(), exact, rtol=1e-3, atol=1e-3)


def test_an_input_inside_a_statistic_gets_its_gradient():
    def temperature(score, row, h, kv_idx, tau, gate):
        top = row.max(score * tau[h])
        t = row.root(lambda t: row.sum(gate[kv_idx] ** 2 * ac.relu(score * tau[h] - t)) - tau[h], top - 3 * tau[h], top)
        return gate[kv_idx] ** 2 * ac.relu(score * tau[h] - t)

    inputs = {"tau": ac.Input("h", grad=True), "gate": ac.Input("kv_idx", grad=True)}
    variant = ac.Variant(normalizer=temperature, inputs=inputs, mask=ac.causal)
    sample = sample_inputs(variant.graph, ODD, torch.float32)
    tau, gate = torch.tensor([0.7, 1.3]), 1 + 0.3 * torch.rand(37)
    leaves = [x.clone().requires_grad_() for x in (sample.q, sample.k, sample.v, tau, gate)]
    out = ac.compile(variant)(*leaves[:3], tau=leaves[3], gate=leaves[4])
    found = torch.autograd.grad(out.square().sum(), leaves)
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]

    def oracle(s):
        own, squares = exact_leaves[3][:, None, None], exact_leaves[4].square()
        z = (s.where(visible(s), 0.0) * own).masked_fill(~visible(s), -torch.inf)
        # given who is kept, the threshold is in closed form
        with torch.no_grad():
            low, high = z.amax(-1, keepdim=True) - 3 * own, z.amax(-1, keepdim=True)
            for _ in range(80):
                t = (low + high) / 2
                more = (squares * (z - t).relu()).sum(-1, keepdim=True) > own
                low, high = low.where(~more, t), high.where(more, t)
            kept = squares * (z > t)
        kept = kept.detach().bool() * squares
        t = ((kept * z.where(visible(s), 0.0)).sum(-1, keepdim=True) - own) / kept.sum(-1, keepdim=True)
        return squares * (z - t).relu()

    exact = by_hand(oracle, *exact_leaves[:3])
    expected = torch.autograd.grad(exact.square().sum(), exact_leaves)
    assert differ(out, exact) < 2e-5
    for got, wanted in zip(found, expected, strict=True):
        assert differ(got, wanted) < 2e-5
