"""The reference against formulas written by hand, PyTorch's own attention, and its own finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

import attncc as ac
from attncc.errors import InputError, UnsupportedError
from attncc.runtime.evaluate import evaluate
from attncc.runtime.reference import log_denominator
from attncc.runtime.samples import Sample, Shape, sample_inputs

from .oracles import near_the_largest, over_threshold, sorted_entmax15, sorted_sparsemax

SCALE = 0.4
SHAPES = (
    Shape(2, 4, 2, 7, 11, 6, 5, strided=True, broadcast=("b",)),
    Shape(1, 2, 2, 150, 150, 4, 4),
    Shape(2, 2, 1, 1, 9, 3, 4, broadcast=("h", "q_idx")),
)


@dataclass
class Textbook:
    """What a textbook formula is written in: scores (B, H, M, N), positions i (M, 1) and j (N), inputs by name."""

    s: Tensor
    i: Tensor
    j: Tensor
    inputs: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.inputs[name]

    @property
    def causal(self) -> Tensor:
        return self.j <= self.i


def softmax(s: Tensor, visible: Any = True) -> tuple[Tensor, Tensor]:
    s = torch.where(torch.as_tensor(visible), s, -torch.inf)
    return s.softmax(-1), s.logsumexp(-1)


def softmax_beside(s: Tensor, visible: Tensor, logit: Tensor) -> tuple[Tensor, Tensor]:
    """One more logit in every row's denominator."""
    s = torch.cat([s.masked_fill(~visible, -torch.inf), logit.expand(*s.shape[:-1], 1)], -1)
    return s.softmax(-1)[..., :-1], s.logsumexp(-1)


def t5_bucket(relative: Tensor) -> Tensor:
    """T5's rule as its authors write it, with logarithms: 32 buckets, distances to 128, bidirectional."""
    distance = relative.abs()
    large = 8 + (torch.log(distance.float() / 8) / math.log(128 / 8) * 8).long()
    return (relative > 0).long() * 16 + torch.where(distance < 8, distance, large.clamp(max=15))


def document(t: Textbook) -> Tensor:
    doc = t["doc"]
    return t.causal & (doc[:, t.i[:, 0]][:, None, :, None] == doc[:, None, None, :])


def cog(t: Textbook) -> tuple[Tensor, Tensor]:
    p, lse = softmax(t.s.abs(), t.causal)
    return t.s.sign() * p, lse


def taylor(t: Textbook) -> tuple[Tensor, Tensor]:
    p = 1 + t.s + t.s**2 / 2
    return p / p.sum(-1, keepdim=True), p.sum(-1).log()


def implicit(weights: Callable[[Tensor], Tensor], t: Textbook) -> Tensor:
    return weights(t.s.masked_fill(~t.causal, -torch.inf))


def decayed(t: Textbook, log: Tensor) -> Tensor:
    return t.s * torch.where(t.causal, log, -torch.inf).exp()


def gates_between(t: Textbook) -> Tensor:
    """The sum of g over the tokens behind key j up to query i, token by token."""
    tokens = torch.arange(t.j.numel())
    between = (tokens > t.j[:, None]) & (tokens <= t.i[..., None])
    return torch.einsum("bht,ijt->bhij", t["g"], between.to(t["g"].dtype))


FORMULAS = {
    "full": lambda t: softmax(t.s),
    "causal": lambda t: softmax(t.s, t.causal),
    "sliding_window": lambda t: softmax(t.s, t.causal & (t.i - t.j < t["window"])),
    "flash_window": lambda t: softmax(t.s, (t.i - t.j <= t["left"]) & (t.j - t.i <= t["right"])),
    "prefix_lm": lambda t: softmax(t.s, t.causal | (t.j < t["prefix"][:, None, None, None])),
    "document": lambda t: softmax(t.s, document(t)),
    "alibi": lambda t: softmax(t.s + t["slopes"][:, None, None] * (t.j - t.i), t.causal),
    "softcap": lambda t: softmax(t["cap"] * torch.tanh(t.s / t["cap"]), t.causal),
    "gemma2_global": lambda t: softmax(50 * torch.tanh(t.s / 50), t.causal),
    "gemma2_local": lambda t: softmax(50 * torch.tanh(t.s / 50), t.causal & (t.i - t.j < t["window"])),
    "t5_bias": lambda t: softmax(t.s + t["table"][t5_bucket(t.j - t.i)].permute(2, 0, 1)),
    "dense_bias": lambda t: softmax(t.s + t["bias"]),
    "softmax1": lambda t: softmax_beside(t.s, t.causal, torch.zeros(1).double()),
    "sink": lambda t: softmax_beside(t.s, t.causal, t["sink"][:, None, None]),
    "sigmoid": lambda t: (torch.sigmoid(t.s - math.log(t.j.numel())) * t.causal, None),
    "relu": lambda t: (torch.relu(t.s) / t.j.numel(), None),
    "relu2": lambda t: (torch.relu(t.s) ** 2 / t.j.numel(), None),
    "taylor": taylor,
    "cog": cog,
    "entmax15": lambda t: (implicit(sorted_entmax15, t), None),
    "sparsemax": lambda t: (implicit(sorted_sparsemax, t), None),
    "min_p": lambda t: (implicit(lambda s: near_the_largest(s, t["least"]), t), None),
    "top_theta": lambda t: (
        implicit(lambda s: over_threshold(s, t["theta"][:, None, None], t.i < t["dense_keys"]), t),
        None,
    ),
    "retention": lambda t: (decayed(t, t["rates"][:, None, None] * (t.i - t.j)), None),
    "simple_gla": lambda t: (decayed(t, gates_between(t)), None),
    "qk_temperature": lambda t: softmax(t.s * t["tau"][..., None], t.causal),
}


def by_hand(name: str, sample: Sample, scale: float) -> tuple[Tensor, Tensor | None]:
    q, k, v = sample.q, sample.k, sample.v
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    m, n = q.shape[2], k.shape[2]
    weights, lse = FORMULAS[name](
        Textbook(scale * q @ k.mT, torch.arange(m)[:, None] + n - m, torch.arange(n), sample.inputs)
    )
    return weights @ v, lse


def leaves(name: str, sample: Sample) -> dict[str, Tensor]:
    tensors = {"q": sample.q, "k": sample.k, "v": sample.v, **sample.inputs}
    learned = ("q", "k", "v", *(d.name for d in ac.variants.get(name).graph.inputs if d.grad))
    return {n: tensors[n].requires_grad_() for n in learned if tensors[n] is not None}


def outputs_of(name: str) -> tuple[str, ...]:
    try:
        log_denominator(ac.variants.get(name).graph)
    except UnsupportedError:
        return ("out",)
    return ("out", "lse")


def drawn(name: str, shape: Shape, seed: int = 0) -> Sample:
    return sample_inputs(ac.variants.get(name).graph, shape, torch.float64, seed=seed)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_shipped_variants_against_formulas_by_hand(name, shape):
    sample = drawn(name, shape)
    wanted = leaves(name, sample)
    out, lse = by_hand(name, sample, SCALE)
    outputs = ("out",) if lse is None else ("out", "lse")
    expected = [t for t in (out, lse) if t is not None]
    got = ac.reference(
        ac.variants.get(name), sample.q, sample.k, sample.v, scale=SCALE, outputs=outputs, **sample.inputs
    )
    got = [got] if lse is None else list(got)
    cotangents = [torch.randn_like(t) for t in expected]
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(r, tuple(wanted.values()), cotangents) for r in (got, expected)]
    for leaf, ours, theirs in zip(wanted, *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11, msg=lambda m, leaf=leaf: f"d{leaf}: {m}")


@pytest.mark.parametrize("name", ac.variants.names())
def test_gradcheck(name):
    sample = drawn(name, Shape(1, 2, 1, 3, 4, 3, 2), seed=3)
    wanted = leaves(name, sample)
    others = {n: value for n, value in sample.inputs.items() if n not in wanted}
    outputs = outputs_of(name)

    def call(*tensors: Tensor) -> Any:
        given = dict(zip(wanted, tensors, strict=True))
        results = ac.reference(ac.variants.get(name), outputs=outputs, **given, **others)
        # the lse of a row that sees no key is -inf whatever is near
        return tuple(torch.where(x.isfinite(), x, 0.0) for x in (results if len(outputs) > 1 else (results,)))

    assert torch.autograd.gradcheck(call, tuple(wanted.values()), fast_mode=True)


def test_against_scaled_dot_product_attention():
    q, k, v = (torch.randn(2, h, n, 8, dtype=torch.float64) for h, n in ((4, 5), (2, 9), (2, 9)))
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(ac.reference(ac.Variant(mask=ac.causal), q, k, v), expected)
    start = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ac.reference(ac.Variant(mask=ac.causal(align="start")), q, k, v), start)


@pytest.mark.parametrize(
    ("variant", "score_mod", "mask_mod"),
    [
        (ac.Variant(mask=ac.causal), None, lambda b, h, i, j: j <= i + 12),
        (
            ac.Variant(mask=ac.causal & ac.sliding_window(5) | ac.prefix(2)),
            None,
            lambda b, h, i, j: (j <= i + 12) & (i + 12 - j < 5) | (j < 2),
        ),
        (
            ac.Variant(score=ac.alibi() >> ac.softcap(2.0), mask=ac.causal),
            lambda s, b, h, i, j: 2 * torch.tanh((s + 2.0 ** -(2 * h + 2.0) * (j - i - 12)) / 2),
            lambda b, h, i, j: j <= i + 12,
        ),
    ],
    ids=["causal", "window or prefix", "alibi then softcap"],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_against_flex_attention(variant, score_mod, mask_mod):
    q, k, v = (torch.randn(2, h, n, 16, dtype=torch.float64) for h, n in ((4, 20), (2, 32), (2, 32)))
    block_mask = create_block_mask(mask_mod, 2, 4, 20, 32, device="cpu")
    expected, aux = flex_attention(q, k, v, score_mod, block_mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
    out, lse = ac.reference(variant, q, k, v, outputs=("out", "lse"))
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # ALiBi's default slopes are float32
    torch.testing.assert_close(lse, aux.lse, rtol=1e-6, atol=1e-6, check_dtype=False)


DEAD = Shape(1, 2, 1, 9, 4, 6, 5)  # causal, aligned to the end: the first 5 queries stand before the first key


def unseen(name: str, sample: Sample) -> Tensor:
    """(B, H, M): the rows to which no branch's mask shows a key."""
    batch, heads, m, _ = sample.q.shape
    n = sample.k.shape[2]
    axes = {"b": batch, "h": heads, "q_idx": m, "kv_idx": n}
    env: dict[str, Any] = {
        axis: torch.arange(size).reshape([size if i == at else 1 for i in range(4)])
        for at, (axis, size) in enumerate(axes.items())
    }
    env |= {"h_kv": env["h"] // (heads // sample.k.shape[1]), "q_len": m, "kv_len": n, "num_heads": heads}
    masks = [evaluate(p["mask"].expr, {**env, **sample.inputs}) for p in ac.variants.get(name).graph.parts]
    return ~torch.stack([mask.expand(*axes.values()) for mask in masks]).any(0).any(-1)


@pytest.mark.parametrize("name", ac.variants.names())
def test_rows_that_see_no_key(name):
    sample = drawn(name, DEAD)
    wanted = leaves(name, sample)
    outputs = outputs_of(name)
    results = ac.reference(ac.variants.get(name), sample.q, sample.k, sample.v, outputs=outputs, **sample.inputs)
    out, *lse = (results,) if len(outputs) == 1 else results
    dead = unseen(name, sample)
    if name == "causal":
        assert dead[0].tolist() == [[True] * 5 + [False] * 4] * 2
    moving = [t for t in (out, *lse) if t.requires_grad]  # a table's entries move nothing
    cotangents = [torch.randn_like(t) for t in moving]
    gradients = torch.autograd.grad(moving, tuple(wanted.values()), cotangents, materialize_grads=True)
    assert (out[dead] == 0).all()
    assert out.isfinite().all()
    for statistic in lse:
        assert (statistic[dead] == -torch.inf).all()
        assert statistic[~dead].isfinite().all()
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][dead] == 0).all()


def test_nothing_is_visible():
    q, k, v = (torch.randn(1, 2, n, 4, requires_grad=True) for n in (3, 5, 5))
    out, lse = ac.reference(ac.Variant(mask=False), q, k, v, outputs=("out", "lse"))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    for gradient in torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse))):
        assert (gradient == 0).all()


def test_a_formula_that_fails_at_hidden_pairs_is_not_evaluated_there():
    variant = ac.Variant(
        inputs={"slope": ac.Input("h", grad=True), "bias": ac.Input("q_idx", "kv_idx", grad=True)},
        score=lambda score, h, q_idx, kv_idx, slope, bias: (
            score - slope[h] * ac.log(q_idx - kv_idx + 1) + bias[q_idx, kv_idx]
        ),
        mask=ac.causal,
    )
    q, k, v = (torch.randn(1, 2, 4, 3, dtype=torch.float64) for _ in range(3))
    hidden = torch.ones(4, 4, dtype=torch.bool).triu(1)
    bias = torch.randn(4, 4, dtype=torch.float64).masked_fill(hidden, torch.inf).requires_grad_()
    slope = torch.randn(2, dtype=torch.float64, requires_grad=True)
    out = ac.reference(variant, q, k, v, slope=slope, bias=bias)
    got = torch.autograd.grad(out.sum(), (slope, bias))

    distance = (torch.arange(4)[:, None] - torch.arange(4)).clamp(min=0)
    shown = torch.where(hidden, 0.0, bias)
    score = q @ k.mT / 3**0.5 - slope[:, None, None] * (distance + 1).log() + shown
    expected = score.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(got, torch.autograd.grad(expected.sum(), (slope, bias)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("first", "slope"), [(True, 0.0), (False, 1.0)])
def test_a_tie_of_maximum_gives_its_gradient_to_the_second(first, slope):
    variant = ac.Variant(normalizer=lambda score: ac.maximum(score, 0) if first else ac.maximum(0, score))
    q = torch.zeros(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(ac.reference(variant, q, one, one), q, one)
    assert gradient.item() == slope


def test_reads_outside_an_input_are_zero_and_pass_no_gradient():
    variant = ac.Variant(
        inputs={"table": ac.Input("distance", grad=True)},
        score=lambda q_idx, kv_idx, table: table[q_idx - kv_idx],
        normalizer=lambda score: score,
    )
    q, k = (torch.ones(1, 1, n, 1, dtype=torch.float64) for n in (6, 3))
    v = torch.ones(1, 1, 3, 1, dtype=torch.float64)
    table = torch.tensor([10.0, 20.0, 30.0, 40.0], dtype=torch.float64, requires_grad=True)
    out = ac.reference(variant, q, k, v, table=table)
    assert out.flatten().tolist() == [10, 30, 60, 90, 70, 40]  # rows 0 and 1 reach negative distances, 4 and 5 beyond
    (gradient,) = torch.autograd.grad(out.sum(), table)
    assert gradient.tolist() == [3, 3, 3, 3]


def test_an_input_of_size_one_is_the_same_everywhere_within_its_range():
    variant = ac.Variant(
        inputs={"bias": ac.Input("kv_idx", grad=True)},
        score=lambda kv_idx, bias: bias[kv_idx + 1],
        normalizer=lambda score: score,
    )
    ones = torch.ones(1, 1, 4, 1, dtype=torch.float64)
    bias = torch.tensor([5.0], dtype=torch.float64, requires_grad=True)
    out = ac.reference(variant, ones, ones, ones, bias=bias)
    assert out.flatten().tolist() == [15.0] * 4  # the last key reads beyond the end of its dimension
    assert torch.autograd.grad(out.sum(), bias)[0].tolist() == [12.0]


def test_floor_division_and_remainder_round_as_python_does():
    mask = lambda q_idx, kv_idx: ((q_idx - kv_idx) // 3 == -1) | ((q_idx - kv_idx) % -4 == -3)
    count = ac.Variant(mask=mask, normalizer=lambda: 1)
    ones = torch.ones(1, 1, 8, 1)
    expected = [sum((i - j) // 3 == -1 or (i - j) % -4 == -3 for j in range(8)) for i in range(8)]
    assert ac.reference(count, ones, ones, ones).flatten().tolist() == expected


def test_row_reductions_see_only_visible_keys():
    variant = ac.Variant(
        mask=ac.causal,
        normalizer=lambda score, kv_idx, row: (
            (score - row.min(score)) / row.count() + row.mean(score) + row.max(kv_idx)
        ),
        reduction=lambda weight, v_vec, kv_idx, row: row.sum(weight * (kv_idx + 1) * v_vec),
    )
    q, k, v = (torch.randn(1, 1, 5, 3, dtype=torch.float64) for _ in range(3))
    out = ac.reference(variant, q, k, v, scale=1.0)
    for i in range(5):
        s = (k[0, 0, : i + 1] @ q[0, 0, i]).tolist()
        weights = [(x - min(s)) / len(s) + sum(s) / len(s) + i for x in s]
        expected = sum(w * (j + 1) * v[0, 0, j] for j, w in enumerate(weights))
        torch.testing.assert_close(out[0, 0, i], expected)


@pytest.mark.parametrize(("b", "m", "n"), [(0, 3, 4), (1, 0, 4), (1, 3, 0)])
def test_empty_sizes(b, m, n):
    q, k, v = (torch.randn(b, 2, length, 4, requires_grad=True) for length in (m, n, n))
    out, lse = ac.reference(ac.variants.get("sink"), q, k, v, outputs=("out", "lse"), sink=torch.zeros(2))
    assert out.shape == (b, 2, m, 4)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_any_float_dtype_is_computed_in_float64():
    q, k, v = (torch.randn(1, 1, 4, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = ac.reference(ac.Variant(), q, k, v)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q.double(), k.double(), v.double()))
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.bfloat16


def test_names_and_files_are_variants_too(tmp_path):
    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    (tmp_path / "mine.toml").write_text("[stages]\nmask = 'causal'\n")
    expected = ac.reference(ac.Variant(mask=ac.causal), q, k, v)
    for variant in ("causal", tmp_path / "mine.toml", str(tmp_path / "mine.toml"), ac.Variant(mask=ac.causal).graph):
        assert torch.equal(ac.reference(variant, q, k, v), expected)
    with pytest.raises(InputError, match="function is no variant"):
        ac.reference(lambda q_idx: q_idx, q, k, v)


def test_lse_of_other_denominators():
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    s = q @ k.mT
    square = ac.Variant(normalizer=lambda score, row: ac.exp(score) / row.sum(ac.exp(2 * score)) ** 0.5)
    lse = ac.reference(square, q, k, v, scale=1.0, outputs="lse")
    torch.testing.assert_close(lse, (2 * s).logsumexp(-1) / 2)
    halved = ac.Variant(normalizer=lambda score, row: ac.softmax(score / 2, row) * 3)
    torch.testing.assert_close(
        ac.reference(halved, q, k, v, scale=1.0, outputs=["lse"]), (s / 2).logsumexp(-1) - math.log(3)
    )


@pytest.mark.parametrize(
    "normalizer",
    ["sigmoid", lambda score, row: ac.where(score > 0, ac.exp(score - row.max(score)), 0) / row.sum(1)],
    ids=["no denominator", "a maximum inside a choice"],
)
def test_a_normalizer_without_a_row_statistic_has_no_lse(normalizer):
    q = torch.ones(1, 1, 2, 2)
    with pytest.raises(UnsupportedError, match="no row statistic"):
        ac.reference(ac.Variant(normalizer=normalizer), q, q, q, outputs=("out", "lse"))


def test_unknown_outputs():
    q = torch.ones(1, 1, 2, 2)
    with pytest.raises(InputError, match="no output 'weights'"):
        ac.reference(ac.Variant(), q, q, q, outputs=("out", "weights"))
    with pytest.raises(InputError, match="no output is asked for"):
        ac.reference(ac.Variant(), q, q, q, outputs=())
