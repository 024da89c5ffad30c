"""What a token has of itself beside a state of what is before it, and late reads: against all pairs and by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import attncc as ac
from attncc.codegen.crosscompile_linear import cross_compile_linear
from attncc.codegen.linear import render_linear
from attncc.codegen.module import load_source
from attncc.passes.linearize import linearize
from attncc.schedule.device import device_for
from attncc.schedule.linear import LinearSizes, linear_schedule
from tests.passes.test_linearize import before, half, past, read_late, with_bonus
from tests.runtime.linear_cases import agree, drawn, with_gradients
from tests.runtime.sequences import by_sequence

GATE = {"g": ac.Input("b", "h", "kv_idx", grad=True)}
RATE = {"rate": ac.Input("h", grad=True)}


def sharp(score, q_idx, kv_idx):
    """Degree 2 of what is before a token, and the sigmoid of itself."""
    return ac.where(kv_idx == q_idx, ac.sigmoid(score), 1 + score**2)


def fading(q_vec, k_vec, b, h, q_idx, kv_idx, q_len, kv_len, g, w):
    """A bonus of each token and channel, and one of its place."""
    i = q_idx + kv_len - q_len
    own = ac.sum_d(q_vec * k_vec * w[b, kv_idx])
    past = ac.sum_d(q_vec * k_vec * ac.exp(ac.cumsum(g[b, h, i]) - g[b, h, i] - ac.cumsum(g[b, h, kv_idx])))
    return ac.where(kv_idx == i, own / (i + 1), past)


VARIANTS = {
    "fading": ac.Variant(
        name="fading",
        mask=ac.causal,
        normalizer="identity",
        similarity=fading,
        inputs={"g": ac.Input("b", "h", "kv_idx", "d", grad=True), "w": ac.Input("b", "kv_idx", "d", grad=True)},
    ),
    "rwkv6": ac.variants.get("rwkv6"),
    "bonus": ac.Variant(name="bonus", mask=ac.causal, normalizer="identity", score=with_bonus, inputs={**GATE, **RATE}),
    "half": ac.Variant(name="half", mask=ac.causal, normalizer="identity", score=half, inputs=RATE),
    "before": ac.Variant(
        name="before",
        mask=before,
        normalizer="identity",
        similarity=lambda q_vec, k_vec: ac.dot(ac.softplus(q_vec), ac.sigmoid(k_vec)),
        score=past,
        inputs=GATE,
    ),
    "late": ac.Variant(name="late", mask=before, normalizer="identity", score=read_late, inputs=RATE),
    "sharp": ac.Variant(name="sharp", mask=ac.causal(align="start"), normalizer=sharp),
}


def inputs_of(name, length):
    generator = torch.Generator().manual_seed(3)
    g, rate = -0.5 * torch.rand(1, 2, length, 16, generator=generator), torch.tensor([-0.4, -0.05])
    return {
        "rwkv6": {"g": g, "u": torch.randn(2, 16, generator=generator)},
        "fading": {"g": g, "w": torch.randn(1, length, 16, generator=generator)},
        "bonus": {"g": g[..., 0].clone(), "rate": rate},
        "before": {"g": g[..., 0].clone()},
        "half": {"rate": rate},
        "late": {"rate": rate},
    }.get(name, {})


def exactly(name, tensors, inputs, cotangent):
    double = [x.double() for x in tensors], {n: x.double() for n, x in inputs.items()}
    return with_gradients(lambda *a, **i: ac.reference(VARIANTS[name], *a, **i), *double, cotangent.double())


@pytest.mark.parametrize("name", VARIANTS)
def test_plans_are_the_quadratic_reference(name, many_segments):
    tensors, inputs = drawn(name, length=35)[0], inputs_of(name, 35)
    cotangent = torch.randn(1, 2, 35, 24, generator=torch.Generator().manual_seed(2))
    op = ac.compile(VARIANTS[name])
    got = with_gradients(op, tensors, inputs, cotangent, plan="chunk", chunk_size=16)
    exact = exactly(name, tensors, inputs, cotangent)
    agree((got[0], *got[1]), (exact[0], *exact[1]), 3e-6)
    agree([op(*tensors, **inputs, plan="recurrent")], [exact[0]], 3e-6)


@pytest.mark.parametrize("name", ["rwkv6", "bonus"])
def test_sixteen_bits(name):
    tensors, inputs = drawn(name, kv_heads=2, dtype=torch.float16, length=33)[0], inputs_of(name, 33)
    cotangent = torch.randn(1, 2, 33, 24, generator=torch.Generator().manual_seed(2)).half()
    got = with_gradients(ac.compile(VARIANTS[name], plan="chunk"), tensors, inputs, cotangent)
    exact = exactly(name, tensors, inputs, cotangent)
    for ours, theirs in zip((got[0], *got[1]), (exact[0], *exact[1]), strict=True):
        assert (ours.double() - theirs).square().mean().sqrt() <= 5e-3 * theirs.square().mean().sqrt()


def recurrence(name, q, k, v, inputs, state):
    """One sequence by hand, float64: out, and the state behind it."""
    outs = []
    for t in range(q.shape[2]):
        query, key, value = q[:, :, t, :, None], k[:, :, t, :, None], v[:, :, t, None]
        g = inputs["g"][:, :, t]
        if name == "rwkv6":
            outs.append((query * (state + inputs["u"][:, :, None] * key * value)).sum(-2))
            state = g.exp()[..., None] * state + key * value
        else:
            bonus = inputs["rate"][:, None, None]
            outs.append((query * (state + bonus * key * value)).sum(-2) / 4)
            state = g.exp()[..., None, None] * state + key * value
    return torch.stack(outs, 2), state


@pytest.mark.parametrize("ends", [(0, 33), (0, 17, 17, 33, 33)], ids=["one sequence", "packed"])
@pytest.mark.parametrize("name", ["rwkv6", "bonus"])
def test_states_in_and_out_and_packed_sequences(name, ends, many_segments):
    """Against the recurrence by hand, with gradients through both states; empty sequences are among them."""
    length, sequences = ends[-1], len(ends) - 1
    tensors, inputs = drawn(name, length=length)[0], inputs_of(name, length)
    generator = torch.Generator().manual_seed(4)
    shape = (sequences, 2, 16, 24)
    initial = torch.randn(shape, generator=generator)
    cotangents = torch.randn(1, 2, length, 24, generator=generator), torch.randn(shape, generator=generator)
    leaves = [x.detach().requires_grad_() for x in (*tensors, initial, *inputs.values())]
    named = dict(zip(inputs, leaves[4:], strict=True))
    options = {"cu_seqlens": torch.tensor(ends) if sequences > 1 else None, "output_final_state": True}
    results = ac.compile(VARIANTS[name], plan="chunk")(*leaves[:3], **named, initial_state=leaves[3], **options)
    got = (*results, *torch.autograd.grad(results, leaves, cotangents))

    exact = by_sequence(partial(recurrence, name), tensors, inputs, initial, ends, cotangents)
    agree(got, exact, 5e-6)


def test_decoding_goes_on_where_the_prompt_ended():
    tensors, inputs = drawn("rwkv6", length=20)[0], inputs_of("rwkv6", 20)
    op = ac.compile("rwkv6")
    whole, last = op(*tensors, **inputs, plan="chunk", output_final_state=True)
    state = None
    for lo, hi in ((0, 18), (18, 19), (19, 20)):
        own = {**inputs, "g": inputs["g"][:, :, lo:hi]}
        out, state = op(*(x[:, :, lo:hi] for x in tensors), **own, initial_state=state, output_final_state=True)
        torch.testing.assert_close(out, whole[:, :, lo:hi], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


def test_torch_compile_sees_one_graph():
    """With packed sequences and states, whose formulas are looked at beforehand."""
    tensors, inputs = drawn("rwkv6", length=20)[0], inputs_of("rwkv6", 20)
    op, packed = ac.compile("rwkv6", plan="chunk"), torch.tensor([0, 7, 20])
    state = torch.ones(2, 2, 16, 24)

    def call(*x, **named):
        return op(*x, **named, initial_state=state, cu_seqlens=packed)

    cotangent = torch.randn(1, 2, 20, 24, generator=torch.Generator().manual_seed(3))
    eager = with_gradients(call, tensors, inputs, cotangent)
    compiled = with_gradients(torch.compile(call, fullgraph=True, backend="aot_eager"), tensors, inputs, cotangent)
    for ours, theirs in zip((compiled[0], *compiled[1]), (eager[0], *eager[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_strong_decay_does_not_overflow():
    """Each token reads the one before it, undecayed, and itself: older ones are gone."""
    q, k, v = drawn("rwkv6", kv_heads=2, length=35)[0]
    g, u = torch.full((1, 2, 35, 16), -1000.0), torch.randn(2, 16)
    out = ac.compile("rwkv6")(q, k, v, g=g, u=u)
    own = (q * k * u[:, None]).sum(-1, keepdim=True) * v
    own[:, :, 1:] += (q[:, :, 1:] * k[:, :, :-1]).sum(-1, keepdim=True) * v[:, :, :-1]
    torch.testing.assert_close(out, own, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_the_kernels_of_a_token_itself_compile_and_fit(target):
    graph, device = VARIANTS["bonus"].graph, device_for(target)
    module = load_source(render_linear(graph, linearize(graph), 128, 128), f"own_{target}")
    schedule = linear_schedule(LinearSizes("bf16", 2, 16, 8192, 128, 128), device)
    found = cross_compile_linear(module, schedule, device, "bf16", only=("own_kernel", "own_backward_kernel"))
    assert set(found) == {"own_kernel", "own_backward_kernel"}
    assert not any(kernel.spills for kernel in found.values())
