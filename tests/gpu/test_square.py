"""Weights of degree 2 in linear time on a GPU: against float64, gradients and states among it."""

import pytest
import torch

import attncc as ac
from attncc.runtime.verify import Shape, verify_variant

SHAPES = (Shape(2, 4, 2, 300, 300, 64, 64), Shape(1, 2, 1, 777, 777, 40, 72, strided=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["taylor_causal", "taylorshift"])
def test_every_plan_is_the_reference(name, dtype):
    rows = verify_variant(ac.variants.get(name), "cuda", dtype, SHAPES)
    assert not [f"{r.shape} {r.check} repeatable={r.repeatable}" for r in rows if not r.ok]


@pytest.mark.parametrize("chunk", [16, 64, 128])
@pytest.mark.parametrize(("name", "dim"), [("taylor_causal", 32), ("taylor_causal", 64), ("taylor", 32)])
def test_many_segments(name, dim, chunk):
    length = 5000 if dim == 64 else 1700
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, dim, generator=generator, device="cuda").bfloat16() for _ in range(3))
    op = ac.compile(name, plan="chunk")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = op(*leaves, chunk_size=chunk)
    grad = torch.randn(out.shape, generator=generator, device="cuda").to(out.dtype)
    got = torch.autograd.grad(out, leaves, grad)
    again = torch.autograd.grad(op(*leaves, chunk_size=chunk), leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    double = [x.detach().double().requires_grad_() for x in leaves]
    exact = ac.reference(name, *double)
    wanted = torch.autograd.grad(exact, double, grad.double())
    for ours, theirs in zip((out, *got), (exact, *wanted), strict=True):
        assert (ours.double() - theirs).square().mean().sqrt() <= 1e-2 * theirs.square().mean().sqrt()


def test_a_state_carries_a_sequence_on():
    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v = (torch.randn(1, 4, 1700, 32, generator=generator, device="cuda") for _ in range(3))
    op = ac.compile("taylor_causal")
    whole = op(q, k, v, plan="chunk")
    state, parts = None, []
    for lo, hi, plan in ((0, 333, "chunk"), (333, 1690, "chunk"), (1690, 1700, "recurrent")):
        cut = [x[:, :, lo:hi] for x in (q, k, v)]
        out, state = op(*cut, plan=plan, initial_state=state, output_final_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["taylor_causal", "taylorshift"])
def test_a_replay_is_the_call(name):
    """The third call of a kind is the first that is replayed; other tensors each time, beside a first call."""
    op = ac.compile(name, plan="chunk")
    for seed in range(4):
        found = []
        for way in (op, ac.compile(name, plan="chunk")):
            generator = torch.Generator("cuda").manual_seed(seed)
            x = [torch.randn(1, 2, 1700, 32, generator=generator, device="cuda").bfloat16() for _ in range(4)]
            inputs = {"tau": torch.ones(2, device="cuda")} if name == "taylorshift" else {}
            leaves = [each.requires_grad_() for each in x[:3]]
            out = way(*leaves, **inputs)
            found.append([out, *torch.autograd.grad(out, leaves, x[3])])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len(op._calls._forwards) == len(op._calls._backwards) == 1
