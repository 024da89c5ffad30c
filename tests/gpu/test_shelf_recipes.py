"""Recipes on a GPU at size, against plain PyTorch on the same GPU in float64."""

import pytest
import torch
import torch.nn.functional as F

from attncc import recipes

M, N, HEADS, KV_HEADS, DIM = 777, 901, 8, 2, 64


def tensors(dtype):
    torch.manual_seed(0)
    shapes = ((1, HEADS, M, DIM), (1, KV_HEADS, N, DIM), (1, KV_HEADS, N, DIM))
    return [torch.randn(s, device="cuda").to(dtype).requires_grad_() for s in shapes]


def near(program, oracle, tensors):
    """Outputs and gradients within a few roundings of their own size."""
    exact = [x.detach().double().requires_grad_() for x in tensors]
    got, want = program(*tensors), oracle(*exact)
    eps = 4 * torch.finfo(tensors[0].dtype).eps
    assert (got.double() - want).norm() <= eps * want.norm()
    cotangent = torch.randn_like(got)
    found = torch.autograd.grad(got, tensors, cotangent)
    wanted = torch.autograd.grad(want, exact, cotangent.double())
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).norm() <= 4 * eps * b.norm()


def scores(q, k):
    return q @ k.repeat_interleave(HEADS // KV_HEADS, 1).mT * DIM**-0.5


def weighed(s, v):
    shown = torch.ones(M, N, dtype=torch.bool, device="cuda").tril(N - M)
    return s.masked_fill(~shown, -torch.inf).softmax(-1) @ v.repeat_interleave(HEADS // KV_HEADS, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_selective(dtype):
    def oracle(q, k, v):
        s = scores(q, k)
        i, j = torch.arange(M, device="cuda")[:, None] + N - M, torch.arange(N, device="cuda")
        asked = s[:, :1].relu() * ((j < i) & (j > 0))
        return weighed(s - (asked.cumsum(2) - asked), v)

    near(recipes.selective, oracle, tensors(dtype))


def test_multi_token():
    kernel = torch.randn(HEADS, 1, 6, 11, device="cuda") / 8

    def oracle(q, k, v):
        shown = torch.ones(M, N, dtype=torch.bool, device="cuda").tril(N - M)
        padded = F.pad(scores(q, k) * shown, (5, 5, 5, 0))
        return weighed(F.conv2d(padded, kernel.double(), groups=HEADS), v)

    near(lambda q, k, v: recipes.multi_token(q, k, v, kernel), oracle, tensors(torch.bfloat16))


def test_agents():
    q, k, v = tensors(torch.bfloat16)
    agents = torch.randn(1, HEADS, 49, DIM, device="cuda", dtype=torch.bfloat16)
    none = [torch.zeros(1, 1, 1, 1, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

    def oracle(q, k, v):
        gathered = scores(agents.double(), k).softmax(-1) @ v.repeat_interleave(HEADS // KV_HEADS, 1)
        return (q @ agents.double().mT * DIM**-0.5).softmax(-1) @ gathered

    near(lambda q, k, v: recipes.agents(q, k, v, agents, *none), oracle, [q, k, v])
