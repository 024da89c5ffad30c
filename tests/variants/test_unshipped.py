"""Formulas of newer papers that nobody shipped, as a reader would write them: kernels against plain PyTorch by hand,
with every gradient, more keys than queries and fewer, grouped heads, rows that see nothing.

Written from the papers' ideas, as remembered: what is tested is that such formulas can be said.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import attncc as ac
from tests.runtime.oracles import sorted_entmax15
from tests.variants.by_hand import agree, causal, draw, rep, score, softmax

BY_QUERY = ac.Input("b", "h", "q_idx", grad=True)
BY_HEAD = ac.Input("h", grad=True)


def positions(m, n):
    """(M, 1) and (N,): where queries and keys stand, the last query at the last key."""
    return torch.arange(m)[:, None] + n - m, torch.arange(n)


def position(q_idx, q_len, kv_len):
    return q_idx + kv_len - q_len


# Adaptive-scalable entmax: a temperature that grows with a power of log(n), learned for each query.
def adaptive_scale(score, b, h, q_idx, q_len, kv_len, beta, gamma):
    n = ac.maximum(position(q_idx, q_len, kv_len) + 1, 2)
    return score * (1 + beta[b, h, q_idx] * ac.exp(gamma[b, h, q_idx] * ac.log(ac.log(n))))


def scaled_entmax(q, k, beta, gamma):
    m, n = q.shape[2], k.shape[2]
    count = (positions(m, n)[0] + 1).clamp(min=2).double().log()
    s = score(q, k) * (1 + beta[..., None] * count ** gamma[..., None])
    live = causal(m, n).any(-1)
    weights = sorted_entmax15(s.masked_fill(~causal(m, n), -torch.inf)[:, :, live])
    return torch.zeros_like(s).index_add(2, live.nonzero().squeeze(1), weights)


# Softplus attention, weighed a second time: what is below a share of 1 / n falls away.
def twice(score, row, q_idx, q_len, kv_len):
    n = ac.maximum(position(q_idx, q_len, kv_len) + 1, 1)
    a = ac.softplus(score * ac.log(1.0 * n + 1))
    above = ac.relu(n * a / row.sum(a) - 0.3) ** 3
    return above / (row.sum(above) + 1e-6)


def weighed_twice(q, k):
    m, n = q.shape[2], k.shape[2]
    shown, count = causal(m, n), (positions(m, n)[0] + 1).clamp(min=1).double()
    a = F.softplus(score(q, k) * (count + 1).log()) * shown
    above = F.relu(count * a / a.sum(-1, keepdim=True).clamp_min(1e-30) - 0.3) ** 3 * shown
    return above / (above.sum(-1, keepdim=True) + 1e-6)


# Elliptical attention: distances by a learned diagonal metric.
def elliptical(q_vec, k_vec, h, metric):
    return -0.5 * ac.sum_d(metric[h] * (q_vec - k_vec) ** 2)


def by_metric(q, k, metric):
    apart = q[:, :, :, None] - rep(k, q.shape[1])[:, :, None]
    return softmax(-(metric[:, None, None] * apart**2).sum(-1) / 2, causal(q.shape[2], k.shape[2]))


# Scale-invariant attention: scores spread and fall with the log of the distance, in a unit of each head.
def invariant(score, h, q_idx, kv_idx, q_len, kv_len, unit):
    far = ac.log(ac.abs(position(q_idx, q_len, kv_len) - kv_idx) / unit[h] + 1)
    return score * ac.sqrt(2 * far + 1) - 2 * far


def by_log_distance(q, k, unit):
    i, j = positions(q.shape[2], k.shape[2])
    far = ((i - j).abs() / unit[:, None, None] + 1).log()
    return softmax(score(q, k) * (2 * far + 1).sqrt() - 2 * far, causal(q.shape[2], k.shape[2]))


# Power attention with a gate: an even power of the score in place of its exponential.
def power(score, row, b, h, q_idx, kv_idx, q_len, kv_len, gate):
    left = ac.cumsum(gate[b, h, position(q_idx, q_len, kv_len)]) - ac.cumsum(gate[b, h, kv_idx])
    p = score**4 * ac.exp(left)
    return p / ac.maximum(row.sum(p), 1e-20)


def gated_power(q, k, gate):
    m, n = q.shape[2], k.shape[2]
    sums = gate.cumsum(-1)
    left = sums[..., positions(m, n)[0][:, 0].clamp(min=0)][..., None] - sums[..., None, :]
    p = score(q, k) ** 4 * left.clamp(max=9).exp() * causal(m, n)
    return p / p.sum(-1, keepdim=True).clamp_min(1e-20)


# Affine weights: softmax times a factor, plus a constant for each visible key.
def affine(score, row, b, h, q_idx, factor, shift):
    p = ac.exp(score - row.max(score))
    return factor[b, h, q_idx] * p / row.sum(p) + shift[b, h, q_idx]


def affine_by_hand(q, k, factor, shift):
    shown = causal(q.shape[2], k.shape[2])
    return factor[..., None] * softmax(score(q, k), shown) + shift[..., None] * shown


# Top-theta with both compensations: of the denominator, and of the mass that fell away by the mean of the values.
def compensated(score, row, h, theta, dense):
    top, n = row.max(score), row.count()
    keep = (score > theta[h]) | (n <= dense)
    kept, number = ac.where(keep, ac.exp(score - top), 0), row.sum(ac.where(keep, 1.0, 0.0))
    p = kept / (row.sum(kept) + ac.where(n <= dense, 0, (n - number) * ac.exp(theta[h] - top)))
    return p + (1 - row.sum(p)) / n


def compensated_by_hand(q, k, theta):
    s, shown = score(q, k), causal(q.shape[2], k.shape[2])
    count, bar = shown.sum(-1, keepdim=True), theta.detach()[:, None, None]
    top = s.masked_fill(~shown, -1e9).amax(-1, keepdim=True)
    keep = ((s > bar) | (count <= 3)) & shown
    kept = (s - top).clamp(max=0).exp() * keep
    lost = torch.where(count <= 3, 0.0, (count - keep.sum(-1, keepdim=True)) * (bar - top).clamp(max=50).exp())
    p = kept / (kept.sum(-1, keepdim=True) + lost).clamp_min(1e-300)
    return (p + (1 - p.sum(-1, keepdim=True)) / count.clamp(min=1)) * shown


def of_queries(b, h, m, n):
    return {"beta": draw(b, h, m, seed=3).abs(), "gamma": draw(b, h, m, seed=4) / 4}


#: the stages, their inputs' tensors, the weights by hand
CASES = {
    "scaled_entmax": (
        {"score": adaptive_scale, "normalizer": ac.entmax15, "inputs": {"beta": BY_QUERY, "gamma": BY_QUERY}},
        of_queries,
        scaled_entmax,
    ),
    "weighed_twice": ({"normalizer": twice}, lambda *_: {}, weighed_twice),
    "elliptical": (
        {"similarity": elliptical, "inputs": {"metric": ac.Input("h", "d", grad=True)}},
        lambda b, h, m, n: {"metric": draw(h, 12, seed=3).abs()},
        by_metric,
    ),
    "scale_invariant": (
        {"score": invariant, "inputs": {"unit": BY_HEAD}},
        lambda b, h, m, n: {"unit": draw(h, seed=3).abs() + 1},
        by_log_distance,
    ),
    "gated_power": (
        {"normalizer": power, "inputs": {"gate": ac.Input("b", "h", "kv_idx", grad=True)}},
        lambda b, h, m, n: {"gate": -draw(b, h, n, seed=3).abs() / 9},
        gated_power,
    ),
    "affine": (
        {"normalizer": affine, "inputs": {"factor": BY_QUERY, "shift": BY_QUERY}},
        lambda b, h, m, n: {"factor": draw(b, h, m, seed=3), "shift": draw(b, h, m, seed=4)},
        affine_by_hand,
    ),
    "compensated": (
        {"normalizer": compensated, "inputs": {"theta": ac.Input("h"), "dense": ac.Scalar(3)}},
        lambda b, h, m, n: {"theta": torch.tensor([0.1, -0.2, 0.9, 0.4], dtype=torch.float64)[:h]},
        compensated_by_hand,
    ),
}


@pytest.mark.parametrize("shape", [(1, 4, 2, 21, 21), (2, 2, 2, 9, 23), (1, 2, 1, 17, 8)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_formula_that_nobody_shipped(name, shape):
    stages, make, weights = CASES[name]
    (b, h, h_kv, m, n) = shape
    op = ac.compile(ac.Variant(name=name, mask=ac.causal, **stages))
    tensors = [
        draw(b, h, m, 12),
        draw(b, h_kv, n, 12, seed=1),
        draw(b, h_kv, n, 10, seed=2),
        *make(b, h, m, n).values(),
    ]
    own, exact = ([x.to(kind).requires_grad_() for x in tensors] for kind in (torch.float32, torch.float64))
    q, k, v, *rest = own
    names = list(make(b, h, m, n))
    held = {x for x in names if not stages["inputs"][x].grad}
    got = op(q, k, v, **{x: t.detach() if x in held else t for x, t in zip(names, rest, strict=True)})
    want = weights(exact[0], exact[1], *exact[3:]) @ rep(exact[2], h)
    cotangent = draw(*want.shape, seed=9)
    found = torch.autograd.grad(got, own, cotangent.float(), allow_unused=True)
    wanted = torch.autograd.grad(want, exact, cotangent, allow_unused=True)
    for a, e in zip((got, *found), (want, *wanted), strict=True):
        if e is not None:
            assert a.isfinite().all()
            assert (a.double() - e).abs().max() <= 1e-4 * e.abs().max()


def test_the_key_that_has_the_maximum_is_known_as_such():
    """Its score is computed again, with another rounding; the gradient is that of the soft weights."""

    def straight(score, row):
        p = ac.exp(score - row.max(score))
        soft = p / row.sum(p)
        return soft + ac.detach(ac.where(score >= row.max(score), 1.0, 0.0) - soft)

    def oracle(q, k, v):
        soft = softmax(score(q, k), causal(23, 31))
        hard = F.one_hot(soft.argmax(-1), 31).double() * soft.any(-1, keepdim=True)
        return (soft + (hard - soft).detach()) @ rep(v, 4)

    arguments = draw(1, 4, 23, 16), draw(1, 2, 31, 16, seed=1), draw(1, 2, 31, 24, seed=2)
    agree(ac.Variant(normalizer=straight, mask=ac.causal), oracle, arguments)


@pytest.mark.parametrize(
    ("relation", "holds"),
    [("score < row.max(score)", True), ("score > row.min(score)", False), ("score != row.max(score)", True)],
)
def test_all_but_the_extreme_of_a_row(relation, holds):
    variant = ac.loads_toml(f"[stages]\nnormalizer = 'sigmoid(score) if {relation} else 0'")
    q, k, v = draw(1, 1, 40, 16), draw(1, 1, 33, 16, seed=1), draw(1, 1, 33, 8, seed=2)
    s = score(q, k)
    left = (s.argmax if holds else s.argmin)(-1, keepdim=True)
    want = s.sigmoid().scatter(-1, left, 0) @ v
    torch.testing.assert_close(ac.compile(variant)(q.float(), k.float(), v.float()), want.float())


def test_lse_moves_with_what_shifts_a_rows_exponents():
    """exp(-rate (i - j)) has a part of its row, exp(-rate i), which is one of the denominator."""

    def decaying(score, row, h, q_idx, kv_idx, rate):
        p = score**2 * ac.exp(-rate[h] * (q_idx - kv_idx))
        return p / (row.sum(p) + 1e-2)

    op = ac.compile(
        ac.Variant(normalizer=decaying, mask=lambda kv_idx, q_idx: kv_idx < q_idx, inputs={"rate": BY_HEAD})
    )
    q, k, v = draw(1, 2, 60, 8), draw(1, 2, 13, 8, seed=1), draw(1, 2, 13, 8, seed=2)
    rate = torch.tensor([4.0, 0.02], dtype=torch.float64, requires_grad=True)  # the weights of a far row are all 0
    i, j = torch.arange(60)[:, None], torch.arange(13)
    p = torch.where(j < i, score(q, k) ** 2 * (-rate[:, None, None] * (i - j)).exp(), 0)
    out, lse = p / (p.sum(-1, keepdim=True) + 1e-2) @ v, (p.sum(-1) + 1e-2).log() + rate[:, None] * i[:, 0]
    lse = lse * (i[:, 0] > 0)
    own = rate.detach().float().requires_grad_()
    got = op(q.float(), k.float(), v.float(), rate=own, outputs=("out", "lse"))
    cotangents = draw(*out.shape, seed=3), draw(*lse.shape, seed=4)  # of the first row, too, which sees no key
    (want,) = torch.autograd.grad((out, lse), rate, cotangents)
    (found,) = torch.autograd.grad(got, own, [c.float() for c in cotangents])
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-4)


def over_magnitude(w):
    return w / (1 + w.abs().sum(-1, keepdim=True))


@pytest.mark.parametrize(
    ("text", "by_hand"),
    [
        ("score**10", lambda s, i, j: s**10),
        ("score**9", lambda s, i, j: s**9),
        ("score**whole", lambda s, i, j: s**3),
        ("relu(score)**whole", lambda s, i, j: s.relu() ** 3),
        ("score * (-1)**kv_idx * 0.9**q_idx", lambda s, i, j: s * (-1.0) ** j * 0.9**i),
    ],
)
def test_powers_of_what_is_negative_or_zero(text, by_hand):
    scalars = "[scalars]\nwhole = 3" if "whole" in text else ""
    variant = ac.loads_toml(f"[stages]\nnormalizer = '({text}) / (1 + row.sum(abs({text})))'\n{scalars}")

    def oracle(q, k, v):
        return over_magnitude(by_hand(score(q, k), torch.arange(21.0)[:, None], torch.arange(33.0))) @ v

    agree(variant, oracle, (draw(1, 2, 21, 16), draw(1, 2, 33, 16, seed=1), draw(1, 2, 33, 8, seed=2)))


def test_the_gradient_of_an_exponent_is_0_where_its_base_is():
    variant = ac.loads_toml(
        "[stages]\nnormalizer = 'relu(score)**p[h] / (1 + row.sum(relu(score)**p[h]))'\n"
        "[inputs]\np = { index = ['h'], grad = true }"
    )

    def oracle(q, k, v, p):
        return over_magnitude(score(q, k).relu() ** p[:, None, None]) @ v

    arguments = draw(1, 2, 21, 16), draw(1, 2, 33, 16, seed=1), draw(1, 2, 33, 8, seed=2)
    agree(variant, oracle, arguments, p=torch.tensor([1.7, 2.0], dtype=torch.float64))


def test_talking_heads_by_heads_side_by_side():
    q, k, v, scores, weights = (
        draw(2, 3, 9, 4),
        draw(2, 3, 9, 4, seed=1),
        draw(2, 3, 9, 4, seed=2),
        draw(3, 3),
        -draw(3, 3),
    )

    def by_hand(q, k, v, scores, weights):
        mixed = torch.einsum("hg,bgmn->bhmn", scores, score(q, k)).softmax(-1)
        return torch.einsum("hg,bgmn->bhmn", weights, mixed) @ v

    def side_by_side(q, k, v, scores, weights):
        wide = torch.einsum("hg,bgmd->bhmgd", scores, q).flatten(-2)
        keys, values = (x.transpose(1, 2).flatten(-2)[:, None] for x in (k, v))
        out = ac.compile("full")(wide, keys, values, scale=q.shape[-1] ** -0.5).unflatten(-1, (3, 4))
        return torch.einsum("hg,bgmhd->bhmd", weights, out)

    leaves = [x.requires_grad_() for x in (q, k, v, scores, weights)]
    found = [x.detach().float().requires_grad_() for x in leaves]
    want, got = by_hand(*leaves), side_by_side(*found)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    wanted, gradients = torch.autograd.grad(want.sum(), leaves), torch.autograd.grad(got.sum(), found)
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


SHOWN = torch.tensor([[1.0, 1, 1, 1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 1, 1, 1, 1]])
LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    "text",
    [
        "score + (1 - shown[b, kv_idx]) * -1e9",
        "score + (1.0 - shown[b, kv_idx]) * -10000.0",
        f"score + (1 - shown[b, kv_idx]) * {LOWEST}",
        "score - 1e9 + 1e9 * shown[b, kv_idx]",
        "score * shown[b, kv_idx] - 1e9 * (1 - shown[b, kv_idx])",
        "tanh(score / 5) * 5 + (2 - shown[b, kv_idx] - shown[b, 0]) * -1e9",
        "score + (1 - float(shown[b, kv_idx] > 0.5)) * -1e9",
        "score + (int(shown[b, kv_idx] > 0.5) - 1) * 100000",
    ],
)
@pytest.mark.parametrize("stage", ["score", "normalizer"])
def test_a_mask_that_is_added_keeps_the_score(text, stage):
    """Algebra multiplies the sum out, and score + 1e9 - 1e9 is 0 in float32."""
    if stage == "normalizer":
        text = text.replace(str(LOWEST), "-1e15")  # of larger ones sympy takes the exponential
        text = f"s = {text}\np = exp(s - row.max(s))\np / row.sum(p)"
    variant = ac.loads_toml(
        f'[stages]\nmask = "causal"\n{stage} = """\n{text}"""\n[inputs]\nshown = {{ index = ["b", "kv_idx"] }}'
    )
    q, k, v = (draw(2, 2, 9, 8, seed=i).float().requires_grad_() for i in range(3))

    def by_hand(q, k, v):
        hidden, s = SHOWN[:, None, None] == 0, score(q, k)
        if "tanh" in text:
            s = 5 * torch.tanh(s / 5)
        return (s - 1e9 * hidden).masked_fill(~causal(9, 9), -torch.inf).softmax(-1) @ v

    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    got, want = ac.compile(variant)(q, k, v, shown=SHOWN), by_hand(*exact)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ac.reference(variant, *exact, shown=SHOWN), want, rtol=1e-6, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(x.sum(), y) for x, y in ((got, (q, k, v)), (want, exact))), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def gated_by_the_mean(s, p):
    return p * (s.sum(-1, keepdim=True) / (s != 0).sum(-1, keepdim=True).clamp_min(1)).relu()


def gated_by_a_sum(s, p):
    w = s.sigmoid() * (s != 0)
    return w * (7 - w.sum(-1, keepdim=True)).relu()


@pytest.mark.parametrize(
    ("text", "by_hand"),
    [
        ("p = exp(score - row.max(score))\\np / row.sum(p) * relu(row.mean(score))", gated_by_the_mean),
        ("s = sigmoid(score)\\ns * relu(7 - row.sum(s))", gated_by_a_sum),
        (
            "p = exp(score - row.max(score))\\nw = p / row.sum(p)\\nw - row.sum(w * w) * w",
            lambda s, p: p * (1 - (p * p).sum(-1, keepdim=True)),
        ),
    ],
)
def test_gradients_where_a_factor_of_the_row_is_zero(text, by_hand):
    """Many rows, and for the last formula the one that sees a single key: they were NaN."""
    variant = ac.loads_toml(f'[stages]\nmask = "causal"\nnormalizer = "{text}"')

    def oracle(q, k, v):
        s = score(q, k)
        return by_hand(s * causal(33, 33), softmax(s, causal(33, 33))) @ v

    agree(variant, oracle, (draw(1, 2, 33, 16), draw(1, 2, 33, 16, seed=1), draw(1, 2, 33, 8, seed=2)))
