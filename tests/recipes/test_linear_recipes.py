"""Recipes in linear time against formulas by hand in float64: results, gradients, states."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from attncc import recipes
from attncc.errors import InputError
from tests.recipes.test_recipes import DTYPES, agree, close
from tests.variants.by_hand import causal, draw, rep, softmax

N = 37
SHAPES = (1, 2, N, 8), (1, 1, N, 8), (1, 1, N, 12)


def drawn(count=3, length=N):
    return [draw(*s[:2], length, s[3], seed=i) for i, s in enumerate(SHAPES[:count])]


def over_sum(p, v):
    return p / p.sum(-1, keepdim=True) @ v


@DTYPES
def test_fast_weights(dtype, tolerance):
    def features(x):
        r = torch.cat([x.relu(), (-x).relu()], -1)
        y = torch.cat([r * r.roll(1, -1), r * r.roll(2, -1)], -1)
        return y / (y.sum(-1, keepdim=True) + 1e-5)

    def oracle(q, k, v):
        return ((features(q) @ features(k).mT).tril() @ v) * 12**-0.5

    assert recipes.dpfp(draw(2, 5), 3).shape == (2, 30)
    agree(lambda *x: recipes.fast_weights(*x, nu=2), oracle, drawn(), dtype, tolerance)


def test_fast_weights_by_the_delta_rule():
    def features(x):
        r = torch.cat([x.relu(), (-x).relu()], -1)
        y = r * r.roll(1, -1)
        return y / (y.sum(-1, keepdim=True) + 1e-5)

    def oracle(q, k, v, beta):
        query, key, value = features(q), features(rep(k, 2)), rep(v, 2)
        state, outs = q.new_zeros(1, 2, 16, 12), []
        for t in range(N):
            at = key[:, :, t, :, None]
            found = (at * state).sum(-2)
            state = state + beta[:, :, t, None, None] * at * (value[:, :, t] - found)[..., None, :]
            outs.append((query[:, :, t, :, None] * state).sum(-2))
        return torch.stack(outs, 2) * 12**-0.5

    beta = torch.sigmoid(draw(1, 2, N, seed=5))
    agree(recipes.fast_weights, oracle, [*drawn(), beta])


def moments(q, k):
    of_q, of_k = q.detach().std(), k.detach().std()
    both = (((of_q * of_k) ** 2 + 0.35487039130661086) / (2 * 0.14855178144710912)).sqrt()
    return (q * both / of_q).exp(), (k * both / of_k).exp()


@DTYPES
@pytest.mark.parametrize("masked", [False, True])
def test_log_normal(masked, dtype, tolerance):
    def oracle(q, k, v):
        query, key = moments(q, k)
        p = query @ key.mT
        return over_sum(p.tril() if masked else p, v)

    agree(lambda *x: recipes.lln(*x, causal=masked), oracle, drawn(), dtype, 3 * tolerance)


def test_log_normal_beside_blocks():
    def oracle(q, k, v):
        query, key = moments(q, k)
        block = torch.arange(N) // 8
        near = softmax(q @ rep(k, 2).mT * 8**-0.5, block[:, None] == block)
        return (over_sum(query @ key.mT, v) + near @ rep(v, 2)) / 2

    agree(recipes.lln_diag, oracle, drawn())


@DTYPES
def test_mala(dtype, tolerance):
    def oracle(q, k, v):
        s = (F.elu(q) + 1) @ (F.elu(k) + 1).mT * 8**-0.5
        total = s.sum(-1, keepdim=True)
        weight = (1 + 1 / (total / N + 1e-6)) * s / N - total / N / N
        assert torch.allclose(weight.sum(-1), torch.ones(()).double(), atol=1e-5)
        return weight @ v

    agree(recipes.mala, oracle, drawn(), dtype, 3 * tolerance)


def test_mala_turned():
    """Features are rotated, the sums are not."""
    angle = torch.arange(N) * 0.3

    def turn(x):
        a, b = x.chunk(2, -1)
        c, s = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
        return torch.cat([a * c - b * s, a * s + b * c], -1)

    def oracle(q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        z = (q @ k.mean(2, keepdim=True).mT) * 8**-0.5
        return (turn(q) @ turn(k).mT * (8**-0.5 / N)) @ v * (1 + 1 / (z + 1e-6)) - z * v.mean(2, keepdim=True)

    agree(lambda *x: recipes.mala(*x, rotate=turn), oracle, drawn())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("p", [1, 2])
def test_fastmax(p, masked):
    def oracle(q, k, v):
        q, k = (0.9 * x / x.norm(dim=-1).amax(-1)[..., None, None] for x in (q, k))
        s = q @ k.mT
        weight = 1 + s + (s * s / 2 if p == 2 else 0)
        return over_sum(weight.tril() if masked else weight, v)

    agree(lambda *x: recipes.fastmax(*x, p=p, limit=0.9, causal=masked), oracle, drawn())


@DTYPES
def test_lightnet(dtype, tolerance):
    def oracle(q, k, v):
        out = [q[:, :, t : t + 1] @ (rep(k, 2)[:, :, : t + 1].softmax(2).mT @ v[:, :, : t + 1]) for t in range(N)]
        return torch.cat(out, 2)

    q, k, v = (draw(1, 2, N, d, seed=i) for i, d in enumerate((16, 16, 24)))
    agree(recipes.lightnet, oracle, [q, 3 * k, v], dtype, tolerance)
    whole = lambda q, k, v: q @ (k.softmax(2).mT @ v)
    agree(lambda *x: recipes.lightnet(*x, causal=False), whole, [q, k, v], dtype, tolerance)


def test_lightnet_goes_on():
    q, k, v = (draw(1, 2, N, d, seed=i).float() for i, d in enumerate((16, 16, 24)))
    k = k - 40  # every sum so far is far below 1
    whole, last = recipes.lightnet(q, k, v, output_final_state=True)
    state, parts = None, []
    for lo, hi in ((0, 20), (20, 36), (36, 37)):
        cut = [x[:, :, lo:hi] for x in (q, k, v)]
        out, state = recipes.lightnet(*cut, initial_state=state, output_final_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


#: of packed sequences: one is empty, one is a single token
ENDS = (0, 20, 20, 21, N)


def alone(recipe, tensors, dim, states=None):
    """Each packed sequence by itself: the results behind one another, and the states."""
    found = []
    for i, (lo, hi) in enumerate(pairwise(ENDS)):
        state = None if states is None else tuple(x[i : i + 1] for x in states)
        found.append(recipe(*(x.narrow(dim, lo, hi - lo) for x in tensors), initial_state=state))
    return torch.cat([out for out, _ in found], dim), tuple(map(torch.cat, zip(*(s for _, s in found), strict=True)))


def packed_agrees(recipe, tensors, dim):
    """From no state, then from the states of the first call; with gradients."""
    tensors = [x.requires_grad_() for x in tensors]
    states = None
    for _ in range(2):
        exact, left = alone(recipe, tensors, dim, states)
        out, state = recipe(*tensors, initial_state=states, cu_seqlens=torch.tensor(ENDS))
        torch.testing.assert_close((out, state), (exact, left), rtol=1e-5, atol=1e-5)
        cotangent = torch.randn_like(out)
        grads = [torch.autograd.grad(x, tensors, cotangent) for x in (out, exact)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
        states = tuple(x.detach() for x in state)


def test_packed_lightnet():
    q, k, v = (draw(1, 2, N, d, seed=i).float() for i, d in enumerate((16, 16, 24)))
    recipe = lambda *x, **more: recipes.lightnet(*x, output_final_state=True, **more)
    packed_agrees(recipe, [q, 3 * k, v], 2)
    with pytest.raises(InputError, match="packed sequences are causal"):
        recipes.lightnet(q, k, v, causal=False, cu_seqlens=torch.tensor(ENDS))


def test_packed_scans():
    s, v, rate = draw(1, 2, N, 1).float(), draw(1, 2, N, 6, seed=1).float(), -draw(1, seed=2).abs().float()
    packed_agrees(lambda s, v, **more: recipes.prefix_softmax(s, v, rate, **more), [5 * s, v], 2)
    k, v = draw(1, N, 5).float(), draw(1, N, 5, seed=1).float()
    w, u = -draw(5, seed=2).exp().float(), draw(5, seed=3).float()
    packed_agrees(lambda k, v, **more: recipes.rwkv4(k, v, w, u, **more), [3 * k, v], 1)


def test_attention_as_an_rnn():
    """A prefix softmax with one score a token, with a decay, and a state from token to token."""
    s, v, rate = draw(2, N, 1), draw(2, N, 6, seed=1), -draw(1, seed=2).abs()
    age = (torch.arange(N)[:, None] - torch.arange(N)).double()

    def oracle(s, v, rate):
        scores = s.mT + age * rate
        return softmax(scores, causal(N, N)) @ v

    def stepwise(s, v, rate):
        state, parts = None, []
        for t in range(N):
            out, state = recipes.prefix_softmax(s[:, t : t + 1], v[:, t : t + 1], rate, state)
            parts.append(out)
        return torch.cat(parts, 1)

    for recipe in (lambda *x: recipes.prefix_softmax(*x)[0], stepwise):
        agree(recipe, oracle, [20 * s, v, rate])


def test_rwkv4():
    k, v, w, u = draw(2, N, 5), draw(2, N, 5, seed=1), -draw(5, seed=2).exp(), draw(5, seed=3)

    def oracle(k, v, w, u):
        outs = []
        for t in range(N):
            age = (t - 1 - torch.arange(t)).double()[:, None]
            weight = torch.cat([(k[:, :t] + age * w).exp(), (k[:, t : t + 1] + u).exp()], 1)
            outs.append((weight * v[:, : t + 1]).sum(1) / weight.sum(1))
        return torch.stack(outs, 1)

    agree(lambda *x: recipes.rwkv4(*x)[0], oracle, [3 * k, v, w, u])

    def in_parts(k, v, w, u):
        first, state = recipes.rwkv4(k[:, :20], v[:, :20], w, u)
        return torch.cat([first, recipes.rwkv4(k[:, 20:], v[:, 20:], w, u, state)[0]], 1)

    agree(in_parts, oracle, [3 * k, v, w, u])


def test_moving_average():
    x, p, alpha = draw(2, N, 3), torch.sigmoid(draw(3, 4, seed=1)), torch.sigmoid(draw(3, 4, seed=2))

    def oracle(x, p, alpha, beta, gamma):
        h, outs = 0.0, []
        for t in range(N):
            h = (1 - p * alpha) * h + p * beta * x[:, t, :, None]
            outs.append((h * gamma).sum(-1) / 2)
        return torch.stack(outs, 1)

    agree(recipes.moving_average, oracle, [x, p, alpha, draw(3, 4, seed=3), draw(3, 4, seed=4)], torch.float32, 3e-6)


@pytest.mark.parametrize("chunk", [1, 16])
def test_neural_memory(chunk):
    """Token by token, the gradient at the memory that the chunk began with."""
    k = F.normalize(draw(1, 2, N, 6, seed=1), dim=-1)
    gates = [torch.sigmoid(draw(1, 2, N, seed=i)) for i in (3, 4, 5)]

    def oracle(q, k, v, theta, eta, alpha):
        memory = momentum = frozen = k.new_zeros(1, 2, 6, 4)
        outs = []
        for t in range(N):
            frozen = memory if t % chunk == 0 else frozen
            key, value = k[:, :, t, :, None], v[:, :, t, None]
            gradient = 2 * key * ((key * frozen).sum(-2, keepdim=True) - value)
            momentum = eta[:, :, t, None, None] * momentum - theta[:, :, t, None, None] * gradient
            memory = (1 - alpha[:, :, t, None, None]) * memory + momentum
            outs.append((q[:, :, t, :, None] * memory).sum(-2))
        return torch.stack(outs, 2)

    arguments = [draw(1, 2, N, 6), k, draw(1, 2, N, 4, seed=2), *gates]
    agree(lambda *x: recipes.neural_memory(*x, chunk=chunk)[0], oracle, arguments)

    def in_parts(*x):
        first, state = recipes.neural_memory(*(y[:, :, :32] for y in x), chunk=chunk)
        second, _ = recipes.neural_memory(*(y[:, :, 32:] for y in x), chunk=chunk, initial_state=state)
        return torch.cat([first, second], 2)

    agree(in_parts, oracle, arguments)


def test_a_memory_without_momentum_and_forgetting_is_the_delta_rule():
    q, v = draw(1, 1, 9, 6), draw(1, 1, 9, 4, seed=2)
    k = F.normalize(draw(1, 1, 9, 6, seed=1), dim=-1)
    beta = torch.sigmoid(draw(1, 1, 9, seed=3))
    none = torch.zeros_like(beta)
    state, outs = k.new_zeros(6, 4), []
    for t in range(9):
        key = k[0, 0, t]
        state = state + beta[0, 0, t] * torch.outer(key, v[0, 0, t] - key @ state)
        outs.append(q[0, 0, t] @ state)
    got, _ = recipes.neural_memory(q, k, v, beta / 2, none, none, chunk=1)
    close(got[0, 0], torch.stack(outs), 1e-5)
