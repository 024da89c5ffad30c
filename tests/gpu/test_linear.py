"""Chunk kernels on a GPU: every kind of decay and every chunk size against float64, gradients among them.

Triton 3.4 to 3.7.0 is known to miscompile some gated chunk backwards on Hopper: what is checked here is values.
"""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import attncc as ac
from attncc.runtime.verify import Shape, verify_variant

SHAPES = (
    Shape(2, 4, 4, 512, 512, 64, 64),
    Shape(1, 4, 2, 777, 777, 128, 128, strided=True),
    Shape(1, 2, 2, 300, 300, 96, 80),
    Shape(1, 2, 1, 1000, 1000, 256, 128),
)
NAMES = ("linear_attention", "retention", "lightning", "simple_gla", "ssd", "gla", "rwkv6")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_every_plan_is_the_reference(name, dtype):
    rows = verify_variant(ac.variants.get(name), "cuda", dtype, SHAPES)
    assert not [f"{r.shape} {r.check} repeatable={r.repeatable}" for r in rows if not r.ok]


def gate_of(name, length, generator, dim=64):
    if name in ("gla", "rwkv6"):  # the reference has all pairs of a sequence, and e^709 is its limit, too
        g = F.logsigmoid(torch.randn(1, 4, length, dim, generator=generator, device="cuda")) / 16
        return {"g": g} if name == "gla" else {"g": g, "u": torch.randn(4, dim, generator=generator, device="cuda")}
    if name == "simple_gla":
        return {"g": F.logsigmoid(torch.randn(1, 4, length, generator=generator, device="cuda")) / 4}
    if name == "ssd":
        rate = torch.tensor([-1.0, -0.3, -0.1, -0.01], device="cuda")
        return {"dt": F.softplus(torch.randn(1, 4, length, generator=generator, device="cuda") - 3), "rate": rate}
    return {} if name == "linear_attention" else {"rates": torch.tensor([-0.3, -0.1, -0.03, -0.001], device="cuda")}


@pytest.mark.parametrize("chunk", [16, 32, 64, 128])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_at_every_chunk_size(name, dim, chunk):
    """Long enough for many segments, with a state in and out and packed sequences."""
    generator = torch.Generator("cuda").manual_seed(0)
    ends = [0, 1000, 1001, 2047, 3000]
    q, k, v = (torch.randn(1, 4, 3000, dim, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    k = F.normalize(k.float(), dim=-1).bfloat16()
    if name in ("gla", "rwkv6") and chunk != 16:
        pytest.skip("with a decay a channel there is one chunk size")
    inputs = gate_of(name, 3000, generator, dim)
    op = ac.compile(name, plan="chunk")
    for packed in (None, torch.tensor(ends, device="cuda")):
        leaves = [x.detach().requires_grad_() for x in (q, k, v, *inputs.values())]
        named = dict(zip(inputs, leaves[3:], strict=True))
        out = op(*leaves[:3], **named, chunk_size=chunk, cu_seqlens=packed)
        grad = torch.randn(out.shape, generator=generator, device="cuda").to(out.dtype)
        got = torch.autograd.grad(out, leaves, grad)
        again = torch.autograd.grad(op(*leaves[:3], **named, chunk_size=chunk, cu_seqlens=packed), leaves, grad)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
        double = [x.detach().double().requires_grad_() for x in leaves]
        parts = []
        for lo, hi in [(0, 3000)] if packed is None else pairwise(ends):
            own = {n: x[:, :, lo:hi] if x.dim() > 2 else x for n, x in zip(inputs, double[3:], strict=True)}
            parts.append(ac.reference(name, *(x[:, :, lo:hi] for x in double[:3]), **own))
        exact = torch.cat(parts, 2)
        wanted = torch.autograd.grad(exact, double, grad.double())
        for ours, theirs in zip((out, *got), (exact, *wanted), strict=True):
            error = (ours.double() - theirs).square().mean().sqrt()
            assert error <= 1e-2 * theirs.square().mean().sqrt()


@pytest.mark.parametrize("name", NAMES)
def test_a_state_carries_a_sequence_on(name):
    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v = (torch.randn(1, 4, 700, 64, generator=generator, device="cuda") for _ in range(3))
    inputs = gate_of(name, 700, generator)
    op = ac.compile(name)
    whole = op(q, k, v, **inputs, plan="chunk")
    state, parts = None, []
    for lo, hi, plan in ((0, 333, "chunk"), (333, 690, "chunk"), (690, 700, "recurrent")):
        own = {n: x[:, :, lo:hi] if x.dim() > 2 else x for n, x in inputs.items()}
        cut = [x[:, :, lo:hi] for x in (q, k, v)]
        out, state = op(*cut, **own, plan=plan, initial_state=state, output_final_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-3, atol=1e-3)


def test_a_long_sequence():
    op = ac.compile("simple_gla", plan="chunk")
    q, k, v = (torch.randn(1, 2, 100_000, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    g = F.logsigmoid(torch.randn(1, 2, 100_000, device="cuda"))
    out = op(q, k, v, g=g)
    assert out.isfinite().all()
    tail = ac.reference("simple_gla", q[:, :, -1000:], k[:, :, -1000:], v[:, :, -1000:], g=g[:, :, -1000:])
    error = (out[:, :, -1:].double() - tail[:, :, -1:]).abs().max()
    assert error <= 2e-2 * tail[:, :, -1:].abs().max()  # what is older than 1000 tokens has decayed


def test_every_key_and_other_tokens():
    variant = ac.Variant(
        name="cross_linear",
        similarity=lambda q_vec, k_vec: ac.dot(ac.relu(q_vec) + ac.sigmoid(q_vec), ac.softplus(k_vec)),
        normalizer="by_sum",
    )
    rows = verify_variant(variant, "cuda", torch.bfloat16)
    assert not [f"{r.shape} {r.check} repeatable={r.repeatable}" for r in rows if not r.ok]
