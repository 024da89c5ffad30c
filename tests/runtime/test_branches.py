"""Several branches in one op, against plain PyTorch: the reference, the kernels, and every gradient."""

from __future__ import annotations

import pytest
import torch

import attncc as ac
from attncc.codegen.hopper_backward import no_backward
from attncc.codegen.plan import Plan
from attncc.errors import InputError, UnsupportedError
from tests.variants.by_hand import draw, score


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


def agree(variant, arguments, oracle, dtype=torch.float32, tolerance=2e-5, **inputs):
    """The op's result and every gradient against a function of plain PyTorch in float64."""
    names = [n for n, x in inputs.items() if x.is_floating_point()]
    leaves = [x.detach().to(dtype).requires_grad_() for x in arguments]
    own = {n: x.detach().float().requires_grad_() if n in names else x for n, x in inputs.items()}
    exact = [x.detach().double().requires_grad_() for x in leaves]
    exact_own = {n: x.detach().double().requires_grad_() if n in names else x for n, x in own.items()}
    got = ac.compile(variant)(*leaves, **own)
    want = oracle(*exact, **exact_own)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    cotangent = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad(got, (*leaves, *(own[n] for n in names)), cotangent)
    wanted = torch.autograd.grad(want, (*exact, *(exact_own[n] for n in names)), cotangent.double())
    for name, a, b in zip(("q", "k", "v", *names), found, wanted, strict=True):
        scale = b.abs().max().clamp_min(1)
        torch.testing.assert_close(
            a.double() / scale, b / scale, rtol=0, atol=5 * tolerance, msg=lambda m, n=name: f"d{n}: {m}"
        )


@pytest.mark.parametrize(
    ("shape", "shared_key", "dtype", "tolerance"),
    [
        ((4, 2, 37, 53, 16, 24), False, torch.float32, 2e-5),
        ((4, 4, 53, 37, 24, 16), False, torch.float32, 2e-5),  # rows that see no key; a padded chunk in every branch
        ((4, 1, 40, 40, 16, 32), True, torch.float32, 2e-5),
        ((2, 1, 45, 45, 32, 64), False, torch.float16, 2e-3),
    ],
)
def test_kernels_of_a_difference(shape, shared_key, dtype, tolerance):
    *arguments, lam = tensors(*shape, shared_key=shared_key)
    agree(DIFFERENTIAL, arguments, by_hand, dtype, tolerance, lam=lam)


def test_the_interleaved_layout_is_a_view():
    """(B, L, H, 2, d), as a projection leaves it."""
    q, k = (torch.randn(1, 20, 2, 2, 8).flatten(3).transpose(1, 2) for _ in range(2))
    v, lam = torch.randn(1, 2, 20, 16), torch.randn(2)
    assert not q.is_contiguous()
    torch.testing.assert_close(ac.compile(DIFFERENTIAL)(q, k, v, lam=lam), by_hand(q, k, v, lam), rtol=2e-5, atol=2e-5)


def test_branches_with_masks_normalizers_and_scores_of_their_own():
    def score(score, branch, h, q_idx, kv_idx, slopes):
        return 2 * score + slopes[h] * (kv_idx - q_idx) if branch == 1 else score

    def mask(q_idx, kv_idx, branch):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < 5) if branch == 0 else kv_idx != q_idx

    def normalizer(score, row, branch):
        p = ac.exp(score - row.max(score))
        return ac.sigmoid(score) if branch == 2 else p / row.sum(p)

    def reduction(weight, gate, b, q_idx, kv_idx, tilt, row, v_vec):
        mixed = gate[b, q_idx] * weight[0] + weight[1] * tilt[kv_idx] - 0.5 * weight[2]
        return row.sum(mixed * v_vec)

    variant = ac.Variant(
        branches=3,
        score=score,
        mask=mask,
        normalizer=normalizer,
        reduction=reduction,
        inputs={
            "slopes": ac.Input("h", grad=True),
            "gate": ac.Input("b", "q_idx", grad=True),
            "tilt": ac.Input("kv_idx", grad=True),
        },
    )

    def oracle(q, k, v, slopes, gate, tilt):
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        s = torch.stack([x @ y.mT / 8**0.5 for x, y in zip(q.split(8, -1), k.split(8, -1), strict=True)])
        near, other = (j <= i) & (i - j < 5), j != i
        hidden = float("-inf")
        first = s[0].masked_fill(~near, hidden).softmax(-1).nan_to_num(0.0)
        second = (2 * s[1] + slopes[:, None, None] * (j - i)).masked_fill(~other, hidden).softmax(-1)
        third = s[2].sigmoid() * other
        return (gate[:, None, :, None] * first + second * tilt - 0.5 * third) @ v

    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 2, n, d, generator=g) for n, d in ((41, 24), (29, 24), (29, 16)))
    inputs = {"slopes": torch.randn(2, generator=g), "gate": torch.randn(2, 41, generator=g)}
    agree(variant, (q, k, v), oracle, **inputs, tilt=torch.randn(29, generator=g))


def test_inside_pytorch():
    q, k, v, lam = (x.detach().requires_grad_() for x in tensors(2, 1, 20, 20, 8, 16, dtype=torch.float32))
    op = ac.compile(DIFFERENTIAL)
    torch.library.opcheck(op.torch_op(), op.torch_args(q, k, v, lam=lam))
    with pytest.raises(UnsupportedError, match="2 branches, each with an lse of its own"):
        op(q, k, v, lam=lam, outputs=("out", "lse"))
    assert "share_1" in op.source(16)
    text = op.explain(q_len=64, heads=2, d_qk=16)
    assert "branch 1" in text


def test_a_branch_of_positions_alone():
    """Its weights are no matter of q and k, of which it leaves no cotangent: a matmul of zeros is nobody's."""
    variant = ac.Variant(
        branches=2,
        score=lambda score, branch, h, q_idx, kv_idx, near: score if branch == 0 else -near[h] * (q_idx - kv_idx) ** 2,
        reduction=lambda weight, v_vec, row: row.sum((weight[0] + weight[1]) * v_vec),
        inputs={"near": ac.Input("h", grad=True)},
    )
    plan = Plan(variant.graph)
    assert [part.backward.dqk == 0 for part in plan.parts] == [False, True]
    assert "q and k have no gradient" in no_backward(plan)
    q, k = draw(1, 2, 19, 32), draw(1, 2, 23, 32, seed=1)

    def oracle(q, k, v, near):
        apart = torch.arange(19)[:, None] - torch.arange(23)
        by_place = (-near[:, None, None] * apart**2).softmax(-1)
        return (score(q[..., :16], k[..., :16]).softmax(-1) + by_place) @ v

    agree(variant, (q, k, draw(1, 2, 23, 8, seed=2)), oracle, near=draw(2, seed=3).abs() / 9)


def test_exponents_in_the_thousands_leave_the_gradient_of_what_makes_them():
    """Weights that are computed again are a part in a thousand off there, all of a row alike: their sum tells by how
    much. What is left of delta else meets a distance squared."""
    variant = ac.Variant(
        branches=2,
        score=lambda score, branch, h, q_idx, kv_idx, near: score if branch == 0 else -near[h] * (q_idx - kv_idx) ** 2,
        reduction=lambda weight, v_vec, row: row.sum((weight[0] + weight[1]) * v_vec),
        inputs={"near": ac.Input("h", grad=True)},
    )
    q, k, v = (draw(1, 2, n, d, seed=i).half() for i, (n, d) in enumerate(((190, 32), (40, 32), (40, 16))))
    near = torch.tensor([0.93, 0.057])
    exact = near.double().requires_grad_()
    apart = torch.arange(190)[:, None] - torch.arange(40)
    by_place = (-exact[:, None, None] * apart**2).softmax(-1)
    cotangent = draw(1, 2, 190, 16, seed=3)
    (want,) = torch.autograd.grad(by_place @ v.double(), exact, cotangent)
    own = near.clone().requires_grad_()
    (found,) = torch.autograd.grad(ac.compile(variant)(q, k, v, near=own), own, cotangent.half())
    torch.testing.assert_close(found.double(), want, rtol=5e-3, atol=0.05)


def two(m, n, d=8):
    return draw(1, 2, m, 2 * d), draw(1, 2, n, 2 * d, seed=1), draw(1, 2, n, 8, seed=2)


def half(x, branch):
    return x.split(x.shape[-1] // 2, -1)[branch]


def test_a_value_of_the_row_in_both_branches():
    """The first branch's gradient reads it, as does the second's weight, which the kernel of dK and dV has first."""
    variant = ac.loads_toml(
        """
        branches = 2
        [stages]
        normalizer = "p = exp(score - row.max(score))\\np * (1 + 0.3 * gate[h, q_idx]) / row.sum(p)"
        reduction = "row.sum((weight[0] - gate[h, q_idx] * weight[1]) * v_vec)"
        [inputs]
        gate = { index = ["h", "q_idx"], grad = true }
        """
    )

    def oracle(q, k, v, gate):
        first, second = (score(half(q, i), half(k, i)).softmax(-1) for i in (0, 1))
        return (1 + 0.3 * gate)[..., None] * (first - gate[..., None] * second) @ v

    agree(variant, two(9, 13), oracle, gate=draw(2, 9, seed=3))


def test_branches_of_two_passes():
    """Each pass has the product of its own branch, and counts keys, which are all alike."""

    def above_the_mean(score, row):
        return ac.where(score > row.mean(score), score, 0.1 * score) / row.count()

    def heads(score, h):
        return score / (1 + h)

    def oracle(q, k, v):
        weights = []
        for i in (0, 1):
            s = score(half(q, i), half(k, i)) / torch.tensor([1.0, 2.0])[:, None, None]
            weights.append(torch.where(s > s.mean(-1, keepdim=True), s, 0.1 * s) / s.shape[-1])
        return (weights[0] - weights[1]) @ v

    def reduction(weight, row, v_vec):
        return row.sum((weight[0] - weight[1]) * v_vec)

    agree(ac.Variant(branches=2, score=heads, normalizer=above_the_mean, reduction=reduction), two(9, 13), oracle)


def test_a_branch_whose_weights_are_all_alike():
    def means(score, row, branch):
        p = ac.exp(score - row.max(score))
        return p / row.sum(p) if branch == 0 else 1 / row.count()

    def reduction(weight, row, v_vec):
        return row.sum((weight[0] - weight[1]) * v_vec)

    variant = ac.Variant(branches=2, normalizer=means, reduction=reduction)
    agree(variant, two(9, 13), lambda q, k, v: score(half(q, 0), half(k, 0)).softmax(-1) @ v - v.mean(2, keepdim=True))
    assert "zeros_like(qk_1)" in ac.compile(variant, backend="gluon").source(d_qk=64)


def test_magnitudes_beside_an_exact_delta():
    """The slope of a score's magnitude is its sign; both weights have their scores inlined."""
    variant = ac.loads_toml(
        """
        branches = 2
        [stages]
        score = "score - rate[h] ** 2 + 0.3"
        normalizer = "cog"
        reduction = "row.sum((weight[0] - rate[h] * weight[1]) * v_vec)"
        [inputs]
        rate = { index = ["h"], grad = true }
        """
    )

    def cog(s):
        return s.sign() * s.abs().softmax(-1)

    def oracle(q, k, v, rate):
        first, second = (cog(score(half(q, i), half(k, i)) - rate[:, None, None] ** 2 + 0.3) for i in (0, 1))
        return (first - rate[:, None, None] * second) @ v

    agree(variant, two(9, 13), oracle, rate=torch.tensor([0.7, -0.4], dtype=torch.float64))
