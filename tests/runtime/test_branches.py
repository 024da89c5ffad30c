"""Several branches in one op, against plain PyTorch: the reference, the kernels, and every gradient."""

from __future__ import annotations

import pytest
import torch

import attncc as ac
from attncc.errors import InputError, UnsupportedError


def difference(weight, lam, h, row, v_vec):
    return row.sum((weight[0] - lam[h] * weight[1]) * v_vec)


DIFFERENTIAL = ac.Variant(
    name="differential", branches=2, mask=ac.causal, reduction=difference, inputs={"lam": ac.Input("h", grad=True)}
)


def maps(q, k, branches, scale=None):
    """softmax over the visible keys of each branch: (branches, B, H, M, N)."""
    h, m, n = q.shape[1], q.shape[2], k.shape[2]
    k = k.repeat_interleave(h // k.shape[1], 1)
    dim = q.shape[3] // branches
    keys = k.split(dim, -1) if k.shape[3] > dim else (k,) * branches
    scores = torch.stack([x @ y.mT for x, y in zip(q.split(dim, -1), keys, strict=True)])
    hidden = torch.ones(m, n, dtype=torch.bool).triu(1 + n - m)
    scores = (scores * (dim**-0.5 if scale is None else scale)).masked_fill(hidden, float("-inf"))
    return scores.softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0.0)


def by_hand(q, k, v, lam, scale=None):
    first, second = maps(q, k, 2, scale)
    return (first - lam[:, None, None] * second) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def tensors(heads, kv_heads, m, n, d, d_v, shared_key=False, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, m, 2 * d), (2, kv_heads, n, d if shared_key else 2 * d), (2, kv_heads, n, d_v), (heads,)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("shape", [(2, 2, 9, 9, 4, 8), (4, 2, 7, 13, 4, 6), (4, 1, 13, 7, 6, 4)])
@pytest.mark.parametrize("shared_key", [False, True])
def test_the_reference_is_the_difference_of_two_maps(shape, shared_key):
    q, k, v, lam = tensors(*shape, shared_key=shared_key)
    got, want = ac.reference(DIFFERENTIAL, q, k, v, lam=lam), by_hand(q, k, v, lam)
    torch.testing.assert_close(got, want)
    cotangent = torch.randn_like(want)
    gradients = [torch.autograd.grad(x, (q, k, v, lam), cotangent, retain_graph=True) for x in (got, want)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_scale_is_that_of_one_branch():
    q, k, v, lam = tensors(2, 2, 5, 5, 4, 4)
    torch.testing.assert_close(ac.reference(DIFFERENTIAL, q, k, v, lam=lam, scale=0.5), by_hand(q, k, v, lam))
    torch.testing.assert_close(
        ac.reference(DIFFERENTIAL, q, k, v, lam=lam, scale=2.0), by_hand(q, k, v, lam, scale=2.0)
    )


def test_sizes_are_checked():
    q, k, v, lam = tensors(2, 2, 5, 5, 4, 4)
    with pytest.raises(InputError, match="head dim of k is 3, expected 8, or 4 for one that all 2 branches share"):
        ac.reference(DIFFERENTIAL, q, k[..., :3], v, lam=lam)
    with pytest.raises(InputError, match="head dim of q, 7, does not divide among 2 branches"):
        ac.reference(DIFFERENTIAL, q[..., :7], k, v, lam=lam)
    with pytest.raises(UnsupportedError, match="2 branches, each with an lse of its own"):
        ac.reference(DIFFERENTIAL, q, k, v, lam=lam, outputs="lse")


GATES = {
    "row": (ac.Input("b", "h", "q_idx", grad=True), lambda g: g[..., None]),
    "head": (ac.Input("h", grad=True), lambda g: g[:, None, None]),
}


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "taylor"])
@pytest.mark.parametrize("kind", GATES)
def test_a_factor_of_the_row(kind, normalizer):
    """Gates, as of a mixture of heads: kernel and gradients against plain PyTorch, M > N and grouped heads."""
    declared, spread = GATES[kind]
    index = ", ".join(declared.pattern)
    variant = ac.loads_toml(
        f'[stages]\nmask = "causal"\nnormalizer = "{normalizer}"\n'
        f'reduction = "gate[{index}] * row.sum(weight * v_vec)"\n'
        f"[inputs]\ngate = {{ index = {list(declared.pattern)}, grad = true }}"
    )
    q, k, v, _ = tensors(4, 2, 21, 17, 8, 16, dtype=torch.float32)
    gate = torch.randn((2, 4, 21) if kind == "row" else (4,), requires_grad=True)
    plain = ac.loads_toml(f'[stages]\nmask = "causal"\nnormalizer = "{normalizer}"')
    got = ac.compile(variant)(q, k, v, gate=gate)
    want = spread(gate) * ac.reference(plain, q, k, v)
    cotangent = torch.randn_like(got)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)
    found = torch.autograd.grad(got, (q, k, v, gate), cotangent)
    wanted = torch.autograd.grad(want, (q, k, v, gate), cotangent.double())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
