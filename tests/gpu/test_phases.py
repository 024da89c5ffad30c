"""On a GPU: what is made before the kernels run, normalizers of several passes, and recipes beside plain PyTorch."""

import pytest
import torch

import attncc as ac
from attncc import recipes
from attncc.runtime.verify import verify_variant

from .test_values import SHAPES, failures

#: the only key of a row is at its row's mean: relu must not have its kink there, for kernels that compute the score
#: again may find it on either side
NORMALIZERS = {
    "near_the_mean": lambda score, row: ac.relu(score - row.mean(score) + 0.25),
    "below_the_largest": lambda score, row: ac.relu(score - row.max(score) + 1),
    "detached": lambda score, row: score / ac.detach(ac.maximum(row.sum(ac.abs(score)), 1)),
}


def competing(score, row, col):
    p = ac.exp(score - col.max(score))
    share = p / col.sum(p) + 1e-4
    return share / row.sum(share)


@pytest.mark.parametrize("policy", ["open", "uniform"])
def test_rows_that_see_no_key(policy):
    variant = ac.Variant(mask=ac.causal & ac.document(), dead_rows=policy)
    assert not failures(verify_variant(variant, "cuda", torch.bfloat16, SHAPES[:2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NORMALIZERS)
def test_gradients_through_row_statistics(name, dtype):
    variant = ac.Variant(normalizer=NORMALIZERS[name], mask=ac.causal)
    assert not failures(verify_variant(variant, "cuda", dtype, SHAPES[1:4:2]))


def test_calls_of_a_known_kind_replay_all_their_ops():
    """Three calls with other values: the second and third replay what the first recorded, what is made before, too."""
    op = ac.compile(ac.Variant(normalizer=competing, mask=ac.causal, dead_rows="open"))
    for number in range(3):
        generator = torch.Generator("cuda").manual_seed(number)
        leaves = [
            torch.randn(2, 4, n, 64, device="cuda", generator=generator).requires_grad_() for n in (300, 200, 200)
        ]
        out = op(*leaves)
        exact = [x.detach().double().requires_grad_() for x in leaves]
        want = ac.reference(op.graph, *exact)
        torch.testing.assert_close(out.double(), want, rtol=1e-3, atol=1e-4)
        found = torch.autograd.grad(out.square().sum(), leaves)
        for a, b in zip(found, torch.autograd.grad(want.square().sum(), exact), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_recipes_in_float32_and_16_bits(dtype):
    q, k, v = (torch.randn(2, 4, n, 64, device="cuda").to(dtype) for n in (333, 517, 517))
    s = q.double() @ k.double().mT / 8
    close = {"rtol": 0, "atol": 3e-2 if dtype == torch.bfloat16 else 1e-3}
    turned = s
    for number in range(3):
        turned = turned - turned.logsumexp(-1 if number % 2 == 0 else -2, keepdim=True)
    torch.testing.assert_close(recipes.sinkhorn(q, k, v).double(), turned.exp() @ v.double(), **close)
    full = ac.compile("full")
    parts = [full(q, k[:, :, a:b], v[:, :, a:b], outputs=("out", "lse")) for a, b in ((0, 200), (200, 517))]
    out, lse = recipes.merge(*parts)
    torch.testing.assert_close(out.double(), s.softmax(-1) @ v.double(), **close)
    torch.testing.assert_close(lse.double(), s.logsumexp(-1), rtol=0, atol=1e-2)
