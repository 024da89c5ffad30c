"""Recipes in linear time and hybrids on a GPU, in bfloat16 against float64: results and gradients."""

import pytest
import torch
import torch.nn.functional as F

from attncc import recipes

N, HEADS, DIM = 700, 4, 64


def drawn(*shapes):
    torch.manual_seed(0)
    return [torch.randn(s, device="cuda").bfloat16().requires_grad_() for s in shapes]


def near(program, oracle, tensors):
    exact = [x.detach().double().requires_grad_() for x in tensors]
    got, want = program(*tensors), oracle(*exact)
    cotangent = torch.randn_like(got)
    found = torch.autograd.grad(got, tensors, cotangent)
    wanted = torch.autograd.grad(want, exact, cotangent.double())
    for a, b in zip((got, *found), (want, *wanted), strict=True):
        assert (a.double() - b).norm() <= 2e-2 * b.norm()


def qkv(*more):
    return drawn(*(3 * [(1, HEADS, N, DIM)]), *more)


def positions():
    return torch.arange(N, device="cuda")[:, None], torch.arange(N, device="cuda")


def test_lightnet():
    def oracle(q, k, v):
        i, j = positions()
        weight = torch.einsum("bhid,bhjd->bhij", q * (-k.logcumsumexp(2)).exp(), k.exp())
        return (weight * (j <= i)) @ v

    near(recipes.lightnet, oracle, qkv())


@pytest.mark.parametrize("delta", [False, True])
def test_infini(delta):
    def oracle(q, k, v, beta):
        memory = norm = 0
        gate, outs = torch.sigmoid(beta)[:, None, None], []
        for lo in range(0, N, 256):
            query, key, value = (x[:, :, lo : lo + 256] for x in (q, k, v))
            hidden = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device="cuda").triu(1)
            local = (query @ key.mT * DIM**-0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ value
            asked, written = F.elu(query) + 1, F.elu(key) + 1
            outs.append(gate * (asked @ memory) / (asked @ norm) + (1 - gate) * local if lo else local)
            found = (written @ memory) / (written @ norm) if delta and lo else 0
            memory, norm = memory + written.mT @ (value - found), norm + written.sum(2)[..., None]
        return torch.cat(outs, 2)

    near(lambda *x: recipes.infini(*x, segment=256, delta=delta), oracle, qkv((HEADS,)))


def test_lizard():
    gate = F.logsigmoid(torch.randn(1, 1, N, device="cuda") + 3).double()

    def features(x, maps):
        y = torch.einsum("bhnd,hdf->bhnf", x, maps)
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)

    def oracle(q, k, v, maps, meta):
        i, j = positions()
        time = gate.cumsum(-1)
        kept = (time[..., :, None] - time[..., None, :]).masked_fill(j > i, -torch.inf).exp()
        p = features(q, maps) @ features(k, maps).mT * kept
        s = (q @ k.mT * DIM**-0.5).masked_fill((j > i) | (i - j >= 128), -torch.inf)
        both = torch.cat([s, torch.einsum("bhnd,hdm->bhnm", q, meta) * DIM**-0.5], -1).softmax(-1)
        return p / p.sum(-1, keepdim=True) @ v + 0.5 * (both[..., :N] @ v)

    def recipe(q, k, v, maps, meta):
        return recipes.lizard(q, k, v, gate.float(), maps, torch.tensor(0.5, device="cuda"), meta)

    near(recipe, oracle, qkv((HEADS, DIM, 32), (HEADS, DIM, 4)))
