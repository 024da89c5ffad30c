"""Calls that go past the dispatcher give what those through it give; what is replayed is checked on a GPU."""

import pytest
import torch
import torch.nn.functional as F

import attncc as ac
from attncc.runtime.linear_calls import LinearCalls
from attncc.runtime.recordings import Recordings
from tests.passes.test_linearize import with_bonus


@pytest.fixture(autouse=True)
def nothing_is_recorded(monkeypatch):
    """A recording is of launches on a GPU."""
    monkeypatch.setattr(Recordings, "run", lambda self, key, call, tensors, defaults=(): call())


#: a token's own product by a rate, and the state before its own gate
BONUS = ac.Variant(
    name="bonus",
    mask=ac.causal,
    normalizer="identity",
    score=with_bonus,
    inputs={"g": ac.Input("b", "h", "kv_idx", grad=True), "rate": ac.Input("h", grad=True)},
)


def case(name):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))
    inputs = {
        "linear_attention": {},
        "simple_gla": {"g": F.logsigmoid(torch.randn(1, 2, 20))},
        "bonus": {"g": F.logsigmoid(torch.randn(1, 2, 20)), "rate": torch.tensor([-0.4, 0.3])},
        "rwkv6": {"g": F.logsigmoid(torch.randn(1, 2, 20, 16)), "u": torch.randn(2, 16)},
    }
    k = F.normalize(k, dim=-1)
    return (q, k, v), inputs[name]


def results(op, call, tensors, inputs, wanted):
    """out, the last state, and gradients of both by q, k, v, the first state and the inputs if they are wanted."""
    q, k, v = (x.clone().requires_grad_() for x in tensors)
    first = 0.1 * torch.ones(1, 2, *op.engine.state_shape(16, 16))
    first.requires_grad_()
    own = {n: x.clone().requires_grad_(wanted) for n, x in inputs.items()}
    out, last = call(q, k, v, first, own)
    leaves = [q, k, v, first, *(own.values() if wanted else ())]
    grads = torch.autograd.grad((out * torch.linspace(0, 1, 16)).sum() + last.square().sum(), leaves)
    return [out.detach(), last.detach(), *grads]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("linear_attention", False), *((n, wanted) for n in ("simple_gla", "rwkv6", "bonus") for wanted in (False, True))],
)
def test_the_two_ways_agree(name, wanted):
    op = ac.compile(BONUS if name == "bonus" else name, plan="chunk")
    assert isinstance(op._calls, LinearCalls)
    tensors, inputs = case(name)

    def eager(q, k, v, first, own):
        return op._eager(q, k, v, "chunk", "out", None, first, True, 16, own)

    def dispatched(q, k, v, first, own):
        return op(q, k, v, initial_state=first, output_final_state=True, chunk_size=16, **own)

    expected = results(op, dispatched, tensors, inputs, wanted)
    for _ in range(2):  # the second call is of a known kind
        found = results(op, eager, tensors, inputs, wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def scaled(score, row, b, h, q_idx, kv_idx, tau, beta, gate):
    """Factors of both sides, a denominator that is no sum alone, and a gain of each query."""
    s = tau[h] * score * beta[b, h, kv_idx]
    p = 0.5 * s + 2 * s**2
    return gate[b, h, q_idx] * p / (row.sum(p) + 3)


def gated(score, b, h, q_idx, gate):
    """No denominator."""
    return gate[b, h, q_idx] * (1 + score**2)


BY_TOKEN = {"gate": ac.Input("b", "h", "q_idx", grad=True)}
SQUARES = {
    "taylor_causal": ac.variants.get("taylor_causal"),
    "even": ac.Variant(name="even", mask=ac.causal, normalizer=lambda score: 1 + score**2),
    "gated": ac.Variant(name="gated", mask=ac.causal, normalizer=gated, inputs=BY_TOKEN),
    "scaled": ac.Variant(
        name="scaled",
        mask=ac.causal,
        normalizer=scaled,
        similarity=lambda q_vec, k_vec: ac.dot(ac.softplus(q_vec), ac.sigmoid(k_vec)),
        inputs={"tau": ac.Input("h", grad=True), "beta": ac.Input("b", "h", "kv_idx", grad=True), **BY_TOKEN},
    ),
}


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in SQUARES), ("scaled", torch.float16)])
def test_the_two_ways_of_degree_2(name, dtype):
    """Both states and all inputs, with gradients; 16 bits agree to their rounding."""
    op = ac.compile(SQUARES[name], plan="chunk")
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 20, d).to(dtype) for d in (4, 4, 8)]
    known = {"tau": torch.tensor([0.7, 1.1]), "beta": torch.rand(1, 2, 20), "gate": 0.5 + torch.rand(1, 2, 20)}
    leaves = [x.requires_grad_() for x in (*tensors, 0.1 * torch.rand(1, 2, *op.engine.state_shape(4, 8)))]
    own = {x.name: known[x.name].requires_grad_() for x in op.graph.inputs}
    weights = torch.linspace(-1, 1, 8), torch.rand_like(leaves[3])

    def results(out, last):
        total = (out.float() * weights[0]).sum() + (last * weights[1]).sum()
        return [out, last, *torch.autograd.grad(total, [*leaves, *own.values()])]

    options = {"initial_state": leaves[3], "output_final_state": True, "chunk_size": 16}
    expected = results(*op(*leaves[:3], **own, **options))
    for _ in range(2):  # the second call is of a known kind
        found = results(*op._eager(*leaves[:3], "chunk", "out", None, leaves[3], True, 16, own))
        for ours, theirs in zip(found, expected, strict=True):
            allowed = (1e-5 if dtype == torch.float32 else 3e-3) * theirs.float().square().mean().sqrt()
            assert (ours.float() - theirs.float()).square().mean().sqrt() <= allowed


def test_a_call_without_gradients_and_its_errors():
    op = ac.compile("simple_gla")
    (q, k, v), inputs = case("simple_gla")
    for _ in range(2):
        out = op._eager(q, k, v, "recurrent", "out", None, None, False, None, inputs)
        assert torch.equal(out, op(q, k, v, plan="recurrent", **inputs))
    with pytest.raises(ac.InputError, match="initial_state"):
        op._eager(q, k, v, "chunk", "out", None, torch.zeros(1, 2, 3, 16), False, None, inputs)
    with pytest.raises(ac.InputError, match="chunk_size"):
        op._eager(q, k, v, "chunk", "out", None, None, False, 17, inputs)
    quadratic = op._eager(q, k, v, "parallel", "out", None, None, False, None, inputs)
    torch.testing.assert_close(quadratic, out, rtol=1e-4, atol=1e-5)
