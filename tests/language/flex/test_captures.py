"""Captured tensors: bound to the op, followed through training, overridden, longer than the sequence, hiding pairs."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import and_masks, create_block_mask, or_masks

import attncc as ac
from attncc.ir.text import formula
from attncc.runtime.reference import reference
from tests.language.flex import oracle

M, N = 11, 13


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def qkv(heads=2, m=M, n=N, batch=1):
    q = torch.randn(batch, heads, m, 16, requires_grad=True)
    return q, *(torch.randn(batch, heads, n, 16, requires_grad=True) for _ in range(2))


def agree(score_mod=None, mask_mod=None, learned=(), shape=(), **inputs):
    """The op against FlexAttention: `out`, and the gradients of q, k, v and of what was captured."""
    q, k, v = qkv(**dict(shape))
    op = ac.compile(ac.from_flex(score_mod, mask_mod))
    leaves = (q, k, v, *learned)
    out = op(q, k, v, **inputs)
    want = oracle.differentiable(q, k, v, score_mod, mask_mod)
    torch.testing.assert_close(out, want, rtol=2e-5, atol=2e-6)
    cotangent = torch.randn(out.shape)
    pairs = zip(*(torch.autograd.grad(x, leaves, cotangent) for x in (out, want)), strict=True)
    for got, exact in pairs:
        torch.testing.assert_close(got, exact, rtol=2e-5, atol=5e-6)
    return op


def names(variant):
    return {d.name: (d.pattern, d.dtype, d.grad) for d in variant.graph.inputs}


def test_a_parameter_learns():
    slopes = nn.Parameter(torch.randn(2))

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (kv_idx - q_idx)

    op = agree(score_mod, learned=[slopes])
    assert names(op) == {"slopes": (("heads",), "float", True)}
    q, k, v = qkv()
    optimizer = torch.optim.SGD([slopes], lr=0.1)
    before = slopes.detach().clone()
    op(q, k, v).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, slopes)
    torch.testing.assert_close(op(q, k, v), oracle.values(q, k, v, score_mod)[0], rtol=2e-5, atol=2e-6)


def test_what_is_computed_from_a_parameter_follows_it():
    weight = nn.Parameter(torch.randn(N))

    def score_mod(score, b, h, q_idx, kv_idx):
        falling = torch.cumsum(torch.sigmoid(weight), 0)
        return score - falling[kv_idx] * torch.tensor(0.5)

    op = agree(score_mod, learned=[weight])
    assert list(names(op)) == ["falling"]
    with torch.no_grad():
        weight.add_(1.0)
    q, k, v = qkv()
    torch.testing.assert_close(op(q, k, v), oracle.values(q, k, v, score_mod)[0], rtol=2e-5, atol=2e-6)


def test_a_module_and_a_partial():
    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(2, M + N))
            self.register_buffer("ids", torch.arange(M + N) // 4)

        def forward(self, score, b, h, q_idx, kv_idx):
            return score + self.table[h, q_idx - kv_idx + N] * (self.ids[q_idx] == self.ids[kv_idx])

    module = Bias()
    op = agree(module, learned=[module.table])
    assert set(names(op)) == {"table", "ids"}

    def score_mod(score, b, h, q_idx, kv_idx, *, strength):
        return score * strength[h]

    strength = torch.randn(2, requires_grad=True)
    op = agree(functools.partial(score_mod, strength=strength), learned=[strength])
    assert list(names(op)) == ["strength"]


def test_another_tensor_may_be_passed():
    bias = torch.randn(2)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score * bias[h]

    q, k, v = qkv()
    op = ac.compile(ac.from_flex(score_mod))
    other = torch.randn(2)
    plain = (q @ k.mT / 4 * other[:, None, None]).softmax(-1) @ v
    torch.testing.assert_close(op(q, k, v, bias=other), plain, rtol=2e-5, atol=2e-6)
    with pytest.raises(ac.InputError, match="declared without one"):
        op(q, k, v, bias=other.requires_grad_())


def test_the_reference_and_the_eager_form_take_captured_tensors():
    table = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + table[h, (q_idx + kv_idx) % 4]

    q, k, v = (x.double() for x in qkv())
    out = reference(ac.from_flex(score_mod), q, k, v)
    want = oracle.differentiable(q, k, v, score_mod)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(x.sum(), table)[0] for x in (out, want)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_every_way_to_index():
    learned = torch.randn(1, 2, M, N, requires_grad=True)
    agree(lambda s, b, h, q, k: s + learned[b, h, q, k], learned=[learned])
    agree(lambda s, b, h, q, k: s + learned[-1, h, q, k - N], learned=[learned])
    agree(lambda s, b, h, q, k: s + learned[0][:, 2:][h, q - 2, k], learned=[learned])
    # FlexAttention itself has gradients only for one index of all dimensions
    bias = learned.detach()
    agree(lambda s, b, h, q, k: s + bias[b][h][q][k])
    agree(lambda s, b, h, q, k: s + bias[0, h][q, k])
    agree(lambda s, b, h, q, k: s + bias[..., k][b, h, q])
    agree(lambda s, b, h, q, k: s + bias[b, h, :, 1:][q, k - 1])


def test_elements_of_a_row_are_written_out():
    heads = torch.randn(2, 3, requires_grad=True)
    basis = torch.randn(3, N, requires_grad=True)
    agree(lambda s, b, h, q, k: s + (heads.detach()[h] * basis.detach()[:, k]).sum())
    op = ac.compile(ac.from_flex(lambda s, b, h, q, k: s + torch.dot(heads[h], basis[:, k])))
    q, k, v = qkv()
    out = op(q, k, v)
    want = (q @ k.mT / 4 + (heads @ basis)[:, None]).softmax(-1) @ v
    torch.testing.assert_close(out, want, rtol=2e-5, atol=2e-6)
    pairs = zip(*(torch.autograd.grad(x.square().sum(), (heads, basis)) for x in (out, want)), strict=True)
    for got, exact in pairs:
        torch.testing.assert_close(got, exact, rtol=2e-5, atol=2e-5)


def test_a_condition_within_a_number_beside_a_learned_table():
    """What is read by conditions is no function of a distance, which the gradient of a table asks about."""
    table, tokens = torch.randn(2, 6, requires_grad=True), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 0, 1]).bool()

    def clamped(s, b, h, q, k):
        inside = (q - 2 >= 0) & (k - 1 >= 0) & (k - 1 < 6)
        return s + torch.where(inside, table[h, (k - 1).clamp(0, 5)], torch.zeros_like(s))

    def chosen(s, b, h, q, k):
        return s + table[h, torch.where(tokens[q] & tokens[k], 4, torch.where(tokens[q] & ~tokens[k], 5, q % 4))]

    def counted(s, b, h, q, k):
        return s + table[h, q % 6] * (~(tokens[q] & tokens[k])).to(s.dtype)

    for score_mod in (clamped, chosen, counted):
        agree(score_mod, learned=[table])


def test_a_negative_index_counts_from_the_end():
    table = torch.randn(N, requires_grad=True)
    agree(lambda s, b, h, q, k: s + table[q - k], shape={"m": N}, learned=[table])


def test_data_of_other_inputs_as_an_index():
    groups = torch.tensor([0, 2, 1, 1, 0, 2, 2, 1, 0, 1, 2, 0, 1])
    table = torch.randn(2, 3, 3, requires_grad=True)
    agree(lambda s, b, h, q, k: s + table[h, groups[q], groups[k]], learned=[table])


def test_numbers_and_odd_dtypes():
    scale = torch.tensor(0.3, requires_grad=True)
    agree(lambda s, b, h, q, k: s * scale, learned=[scale])
    half = torch.randn(N).half()
    agree(lambda s, b, h, q, k: s + half[k])
    double = torch.randn(N, dtype=torch.float64)
    agree(lambda s, b, h, q, k: s + double[k])
    bytes_ = torch.arange(N, dtype=torch.uint8) * 19
    agree(lambda s, b, h, q, k: s + bytes_[k] * 0.01)
    keep = torch.rand(N) < 0.7
    agree(mask_mod=lambda b, h, q, k: keep[k] | (q == k))


def test_a_table_may_be_longer_than_the_sequence_but_not_shorter():
    long = torch.randn(2 * N, requires_grad=True)
    op = agree(lambda s, b, h, q, k: s + long[k], learned=[long])
    with pytest.raises(ac.InputError, match="has size 26, but is read at every kv_idx, of which there are 30"):
        op(*qkv(n=30))


def test_minus_infinity_hides():
    ids = torch.arange(N) // 5

    def score_mod(score, b, h, q_idx, kv_idx):
        score = torch.where(q_idx >= kv_idx, score * 2, -float("inf"))
        return (score + 0.1 * kv_idx).masked_fill(ids[q_idx] != ids[kv_idx], -torch.inf) * 0.5

    op = agree(score_mod, shape={"m": N})
    assert formula(op.graph["mask"].expr) == "ids[q_idx] == ids[kv_idx] and q_idx >= kv_idx"
    assert formula(op.graph["score"].expr) == "0.05*kv_idx + 1.0*raw_score"


def test_a_bias_of_minus_infinity_hides():
    bias = torch.randn(M, N)
    bias[torch.rand(M, N) < 0.4] = -torch.inf
    bias[3] = -torch.inf  # a row that sees nothing
    op = ac.compile(ac.from_flex(lambda s, b, h, q, k: s + bias[q, k]))
    q, k, v = qkv()
    out, lse = op(q, k, v, outputs=("out", "lse"))
    want, want_lse = oracle.values(q, k, v, lambda s, b, h, q, k: s + bias[q, k])
    torch.testing.assert_close(out, want, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(lse, want_lse, rtol=2e-5, atol=2e-6)
    assert not out[:, :, 3].any()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert gradient.isfinite().all()


def test_pytorchs_own_combinators():
    def window(b, h, q_idx, kv_idx):
        return q_idx - kv_idx < 4

    def causal(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    agree(mask_mod=or_masks(and_masks(window, causal), lambda b, h, q, k: k < 2))


def test_a_block_mask_that_its_mask_mod_implies_adds_nothing():
    def causal(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    blocks = create_block_mask(causal, None, None, 40, 50, device="cpu", BLOCK_SIZE=16)
    assert ac.from_flex(mask_mod=blocks).graph.digest == ac.from_flex(mask_mod=causal).graph.digest


def test_a_block_mask_whose_table_hides_more():
    attn_gym = pytest.importorskip("attn_gym")
    topk = torch.tensor([[[[0, 2], [1, 2], [0, 1]], [[0, 1], [0, 1], [1, 2]]]])
    for sizes in (None, torch.tensor([8, 3, 8])):
        blocks = attn_gym.masks.create_vsa_block_mask(topk, 8, 3, sizes)
        mask_mod = attn_gym.masks.generate_vsa_mask_mod(topk, 8, sizes)
        op = ac.compile(ac.from_flex(mask_mod=blocks))
        assert "blocks" in names(op)
        q, k, v = qkv(m=24, n=24)
        torch.testing.assert_close(op(q, k, v), oracle.values(q, k, v, None, mask_mod)[0], rtol=2e-5, atol=2e-6)
        with pytest.raises(ac.InputError, match="'blocks' was made for 24 entries of q_idx, and is called with 25"):
            op(*qkv(m=25, n=24))


def test_a_mask_that_is_added_in_a_score_mod():
    shown = torch.tensor([[1.0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0]])
    lowest = torch.finfo(torch.float32).min
    agree(lambda s, b, h, q, k: s + (1.0 - shown[0, k]) * -10000.0)
    agree(lambda s, b, h, q, k: s + (1.0 - (q >= k).to(s.dtype)) * lowest)


def test_any_normalizer():
    def causal(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    variant = ac.from_flex(lambda s, b, h, q, k: s + 0.1 * (k - q), causal, normalizer="sigmoid", name="mine")
    same = ac.Variant(
        score=lambda score, q_idx, kv_idx: score + 0.1 * (kv_idx - q_idx),
        mask=lambda q_idx, kv_idx: q_idx >= kv_idx,
        normalizer="sigmoid",
    )
    assert (variant.name, variant.graph.digest) == ("mine", same.graph.digest)


def test_torch_compile_follows_a_captured_parameter():
    weight = nn.Parameter(torch.randn(2))
    op = ac.compile(ac.from_flex(lambda s, b, h, q, k: s + (2 * weight)[h] * k))
    q, k, v = qkv()
    compiled = torch.compile(lambda q, k, v: op(q, k, v), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        got, want = (torch.autograd.grad(f(q, k, v).square().sum(), (q, k, v, weight)) for f in (compiled, op))
        # the same kernels, launched alike, though a compiled graph brings zeros where autograd brings no cotangent
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
        with torch.no_grad():
            weight.add_(0.5)


def test_nothing_keeps_a_captured_tensor():
    def make():
        bias = torch.randn(2, requires_grad=True)
        op = ac.compile(ac.from_flex(lambda s, b, h, q, k: s + bias[h] * k))
        op(*qkv()).sum().backward()
        return weakref.ref(bias)

    gone = make()
    gc.collect()
    assert gone() is None
