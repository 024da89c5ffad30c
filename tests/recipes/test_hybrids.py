"""Softmax beside a state: recipes of two kernels against formulas by hand in float64, gradients and states, too."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from attncc import recipes
from attncc.errors import InputError
from tests.recipes.test_recipes import DTYPES, agree
from tests.variants.by_hand import draw, rep

N = 37


def places():
    return torch.arange(N)[:, None], torch.arange(N)


def lizard_by_hand(q, k, v, g, maps, alpha, meta, window):
    k, v = rep(k, 2), rep(v, 2)
    i, j = places()

    def features(x):
        y = torch.einsum("bhnd,hdf->bhnf", x, maps)
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)

    time = g.cumsum(-1)
    kept = (time[..., :, None] - time[..., None, :]).masked_fill(j > i, -torch.inf).exp()
    p = features(q) @ features(k).mT * kept
    linear = p / p.sum(-1, keepdim=True) @ v
    s = (q @ k.mT * 8**-0.5).masked_fill((j > i) | (i - j >= window), -torch.inf)
    both = torch.cat([s, torch.einsum("bhnd,hdm->bhnm", q, meta) * 8**-0.5], -1).softmax(-1)
    return linear + alpha * (both[..., :N] @ v)


def of_lizard():
    gate = F.logsigmoid(draw(1, 1, N, seed=3))
    tensors = [draw(1, 2, N, 8), draw(1, 1, N, 8, seed=1), draw(1, 1, N, 12, seed=2), gate]
    return [*tensors, draw(2, 8, 5, seed=4), draw(2, 1, 1, seed=5), draw(2, 8, 4, seed=6)]


@DTYPES
def test_lizard(dtype, tolerance):
    agree(
        lambda *x: recipes.lizard(*x, window=9),
        lambda *x: lizard_by_hand(*x, 9),
        of_lizard(),
        dtype,
        2 * tolerance,
    )


def test_lizard_goes_on():
    """In three calls, with gradients through both halves' states."""

    def in_parts(q, k, v, g, *learned):
        parts, state = [], None
        for lo, hi in ((0, 20), (20, 36), (36, N)):
            cut = [x[:, :, lo:hi] for x in (q, k, v, g)]
            out, state = recipes.lizard(*cut, *learned, window=9, initial_state=state, output_final_state=True)
            parts.append(out)
        assert state[1].shape[2] == 8
        return torch.cat(parts, 2)

    agree(in_parts, lambda *x: lizard_by_hand(*x, 9), of_lizard(), tolerance=2e-5)


#: of packed sequences
ENDS = (0, 5, 22, N)


def packed_agrees(recipe, tensors, learned):
    """Each sequence by itself, with gradients."""
    leaves = [x.float().requires_grad_() for x in (*tensors, *learned)]
    cut, rest = leaves[: len(tensors)], leaves[len(tensors) :]
    exact = torch.cat([recipe(*(x[:, :, lo:hi] for x in cut), *rest) for lo, hi in pairwise(ENDS)], 2)
    out = recipe(*leaves, cu_seqlens=torch.tensor(ENDS))
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(x, leaves, cotangent) for x in (out, exact)]
    torch.testing.assert_close(*grads, rtol=2e-4, atol=2e-4)


def test_packed_lizard():
    tensors = of_lizard()
    packed_agrees(lambda *x, **more: recipes.lizard(*x, window=9, **more), tensors[:4], tensors[4:])
    with pytest.raises(InputError, match="packed sequences have no state here"):
        recipes.lizard(*tensors, output_final_state=True, cu_seqlens=torch.tensor(ENDS))


def test_packed_infini():
    tensors = [draw(1, 2, N, 8), draw(1, 1, N, 8, seed=1), draw(1, 1, N, 12, seed=2)]
    packed_agrees(lambda *x, **more: recipes.infini(*x, segment=8, **more), tensors, [draw(2, seed=3)])
    given = [*(x.float() for x in tensors), draw(2, seed=3).float()]
    _, state = recipes.infini(*given, segment=8, cu_seqlens=torch.tensor(ENDS), output_final_state=True)
    last = [x[:, :, ENDS[-2] :] for x in given[:3]]
    _, alone = recipes.infini(*last, given[3], segment=8, output_final_state=True)
    torch.testing.assert_close([x[-1:] for x in state], list(alone))


def infini_by_hand(q, k, v, beta, segment, delta):
    """The published recurrence, segment by segment, head by head."""
    k, v = rep(k, 2), rep(v, 2)
    memory, norm = q.new_zeros(1, 2, 8, 12), q.new_zeros(1, 2, 8, 1)
    gate, outs = torch.sigmoid(beta)[:, None, None], []
    for lo in range(0, N, segment):
        query, key, value = (x[:, :, lo : lo + segment] for x in (q, k, v))
        size = query.shape[2]
        hidden = torch.ones(size, size, dtype=torch.bool).triu(1)
        local = (query @ key.mT * 8**-0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ value
        asked, written = F.elu(query) + 1, F.elu(key) + 1
        outs.append(local if lo == 0 else gate * (asked @ memory) / (asked @ norm) + (1 - gate) * local)
        found = (written @ memory) / (written @ norm).clamp(min=1e-10) if delta else 0
        memory, norm = memory + written.mT @ (value - found), norm + written.sum(2)[..., None]
    return torch.cat(outs, 2)


@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
def test_infini(delta):
    arguments = [draw(1, 2, N, 8), draw(1, 1, N, 8, seed=1), draw(1, 1, N, 12, seed=2), draw(2, seed=3)]
    oracle = lambda *x: infini_by_hand(*x, 16, delta)
    agree(lambda *x: recipes.infini(*x, segment=16, delta=delta), oracle, arguments, tolerance=2e-5)

    def in_parts(q, k, v, beta):
        first, state = recipes.infini(
            *(x[:, :, :32] for x in (q, k, v)), beta, segment=16, delta=delta, output_final_state=True
        )
        rest = [x[:, :, 32:] for x in (q, k, v)]
        return torch.cat([first, recipes.infini(*rest, beta, segment=16, delta=delta, initial_state=state)], 2)

    agree(in_parts, oracle, arguments, tolerance=2e-5)


def test_infini_turns_the_local_part_alone():
    shapes = (1, 2, N, 8), (1, 2, N, 8), (1, 2, N, 12), (2,)
    arguments = [draw(*s, seed=i).float() for i, s in enumerate(shapes)]
    whole = recipes.infini(*arguments, segment=64)
    turned = recipes.infini(*arguments, segment=64, rotate=lambda x: x.flip(-1))
    torch.testing.assert_close(turned, whole)  # q.k is the same; with segments of all tokens there is no memory


def test_hymba():
    i, j = places()
    gates = F.softplus(draw(1, 2, N, seed=6)), -draw(2, seed=7).exp()
    qkv = [draw(1, 2, N, 8), draw(1, 1, N, 8, seed=1), draw(1, 1, N, 12, seed=2)]
    inner = [draw(1, 2, N, 5, seed=3), draw(1, 2, N, 5, seed=4), draw(1, 2, N, 12, seed=5), *gates]

    def recipe(*x):
        return recipes.hymba(*x[:3], x[3:8], x[8:], reach=6, tokens=3)

    def oracle(q, k, v, c, b, x, dt, rate, *gains):
        s = (q @ rep(k, 2).mT * 8**-0.5).masked_fill((j > i) | ((i - j > 6) & (j >= 3)), -torch.inf)
        time = rate[:, None] * dt.cumsum(-1)
        kept = (time[..., :, None] - time[..., None, :]).masked_fill(j > i, -torch.inf).exp()
        outs = []
        for branch, gain in zip(
            (s.softmax(-1) @ rep(v, 2), (c @ b.mT * kept * dt[..., None, :]) @ x), gains, strict=True
        ):
            y = branch.transpose(1, 2).flatten(2)
            outs.append(y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * gain)
        return (outs[0] + outs[1]) / 2

    agree(recipe, oracle, [*qkv, *inner, draw(24, seed=8), draw(24, seed=9)], tolerance=2e-5)
