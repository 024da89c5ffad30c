"""Attention in linear time: its plans against each other and against recurrences by hand in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import attncc as ac
from attncc.schedule import linear as schedule_linear
from tests.runtime.linear_cases import (
    FULL,
    VARIANTS,
    agree,
    drawn,
    inputs_of,
    with_gradients,
)
from tests.runtime.sequences import by_sequence


@pytest.mark.parametrize(("length", "chunk"), [(37, 16), (40, 32), (5, 64)])
@pytest.mark.parametrize("name", VARIANTS)
def test_chunks_are_the_quadratic_reference(name, length, chunk, many_segments):
    """A share of out is in the cotangent: without it the gradient of a slope, a sum over all pairs, may cancel to next
    to nothing, and be rounding."""
    tensors, inputs = drawn(name, length=length)
    op = ac.compile(VARIANTS[name], plan="chunk")
    out = ac.reference(VARIANTS[name], *tensors, **inputs).float()
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    cotangent = noise + 0.1 * out / out.square().mean().sqrt()
    got = with_gradients(op, tensors, inputs, cotangent, chunk_size=chunk)
    double = [x.double() for x in tensors], {n: x.double() for n, x in inputs.items()}
    exact = with_gradients(lambda *a, **i: ac.reference(VARIANTS[name], *a, **i), *double, cotangent)
    agree((got[0], *got[1]), (exact[0], *exact[1]), 3e-6)


@pytest.mark.parametrize("name", ["linear_attention", "gated"])
def test_row_totals_where_no_program_has_all_features(name, monkeypatch):
    monkeypatch.setattr(schedule_linear, "_rule", lambda sizes, device: schedule_linear.Rule(16, 256, 256, 128, 2))
    tensors, inputs = drawn(name, d_qk=32, d_v=16)
    op = ac.compile(VARIANTS[name], plan="chunk")
    cotangent = torch.randn(1, 2, 37, 16, generator=torch.Generator().manual_seed(2))
    got = with_gradients(op, tensors, inputs, cotangent)
    double = [x.double() for x in tensors], {n: x.double() for n, x in inputs.items()}
    exact = with_gradients(lambda *a, **i: ac.reference(VARIANTS[name], *a, **i), *double, cotangent)
    agree((got[0], *got[1]), (exact[0], *exact[1]), 5e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_recurrence_is_the_same(name):
    tensors, inputs = drawn(name, batch=2, strided=True, length=19)
    op = ac.compile(VARIANTS[name])
    got = [op(*tensors, **inputs, plan=plan) for plan in ("parallel", "chunk", "recurrent")]
    exact = ac.reference(VARIANTS[name], *tensors, **inputs)
    for out in got:
        agree([out], [exact], 2e-6)
        assert out.transpose(1, 2).is_contiguous()  # laid out as q is


@pytest.mark.parametrize(("q_len", "kv_len"), [(19, 34), (20, 3)])
@pytest.mark.parametrize("name", FULL)
def test_every_key_is_a_sum_and_crosses_to_other_tokens(name, q_len, kv_len, many_segments):
    generator = torch.Generator().manual_seed(6)
    sizes = ((2, q_len, 16), (1, kv_len, 16), (1, kv_len, 24))
    tensors = [torch.randn(2, *size, generator=generator) * (0.3 if name == "polynomial" else 1) for size in sizes]
    inputs = {}
    if name == "weighted":
        sizes = {"beta": (2, 2, kv_len), "tau": (2, q_len), "kappa": (2,)}
        inputs = {n: 0.5 + torch.rand(size, generator=generator) for n, size in sizes.items()}
    op = ac.compile(FULL[name], plan="chunk")
    cotangent = torch.randn(2, 2, q_len, 24, generator=generator)
    got = with_gradients(op, tensors, inputs, cotangent, chunk_size=16)
    double = [x.double() for x in tensors], {n: x.double() for n, x in inputs.items()}
    exact = with_gradients(lambda *a, **i: ac.reference(FULL[name], *a, **i), *double, cotangent)
    agree((got[0], *got[1]), (exact[0], *exact[1]), 3e-6)


@pytest.mark.parametrize("name", ["simple_gla", "linear_attention", "gla"])
def test_sixteen_bits(name):
    tensors, inputs = drawn(name, heads=2, kv_heads=2, dtype=torch.float16, length=33)
    op = ac.compile(VARIANTS[name], plan="chunk")
    cotangent = torch.randn(1, 2, 33, 24, generator=torch.Generator().manual_seed(2))
    got = with_gradients(op, tensors, inputs, cotangent.half(), chunk_size=16)
    double = [x.double() for x in tensors], {n: x.double() for n, x in inputs.items()}
    exact = with_gradients(lambda *a, **i: ac.reference(VARIANTS[name], *a, **i), *double, cotangent.half().double())
    for ours, theirs in zip((got[0], *got[1]), (exact[0], *exact[1]), strict=True):
        error, size = (ours.double() - theirs).square().mean().sqrt(), theirs.square().mean().sqrt()
        assert error <= 5e-3 * size


def recurrence(name, q, k, v, inputs, state):
    """One sequence by hand, float64: out, and the state behind it."""
    ones = lambda x: torch.cat([x, torch.ones_like(x[..., :1])], -1)
    elu = lambda x: F.elu(x) + 1
    step = {
        "simple_gla": lambda t: inputs["g"][:, :, t],
        "retention": lambda t: inputs["rates"][None],
        "ssd": lambda t: inputs["rate"] * inputs["dt"][:, :, t],
        "gla": lambda t: inputs["g"][:, :, t],
    }.get(name, lambda t: q.new_zeros(()))
    scale = 1.0 if name in ("linear_attention", "ssd") else q.shape[-1] ** -0.5
    outs = []
    for t in range(q.shape[2]):
        query, key, value = q[:, :, t], k[:, :, t], v[:, :, t]
        if name == "linear_attention":
            query, key, value = elu(query), elu(key), ones(value)
        query = query * scale
        if name == "ssd":
            key = key * inputs["dt"][:, :, t, None]
        if name == "polynomial":
            query, key, value = ones(query), ones(key), ones(value)
        kept = step(t).exp()[..., None] if name == "gla" else step(t).exp()[..., None, None]
        state = state * kept + key[..., None] * value[..., None, :]
        out = (query[..., None] * state).sum(-2)
        outs.append(out[..., :-1] / out[..., -1:] if name in ("linear_attention", "polynomial") else out)
    return torch.stack(outs, 2), state


@pytest.mark.parametrize("ends", [(0, 33), (0, 17, 17, 30, 33)], ids=["one sequence", "packed"])
@pytest.mark.parametrize("name", ["simple_gla", "ssd", "retention", "linear_attention", "polynomial", "gla"])
def test_states_in_and_out_and_packed_sequences(name, ends, many_segments):
    """Against the recurrence by hand, with gradients through both states; one of the sequences is empty."""
    length, sequences = ends[-1], len(ends) - 1
    tensors, inputs = drawn(name, length=length)
    op = ac.compile(VARIANTS[name], plan="chunk")
    generator = torch.Generator().manual_seed(4)
    shape = (sequences, 2, *op.engine.state_shape(16, 24))
    initial = torch.rand(shape, generator=generator)
    cotangents = torch.randn(1, 2, length, 24, generator=generator), torch.randn(shape, generator=generator)
    packed = torch.tensor(ends) if sequences > 1 else None
    leaves = [x.detach().requires_grad_() for x in (*tensors, initial, *inputs.values())]
    named = dict(zip(inputs, leaves[4:], strict=True))
    options = {"cu_seqlens": packed, "chunk_size": 16, "output_final_state": True}
    results = op(*leaves[:3], **named, initial_state=leaves[3], **options)
    got = (*results, *torch.autograd.grad(results, leaves, cotangents))

    exact = by_sequence(partial(recurrence, name), tensors, inputs, initial, ends, cotangents)
    agree(got, exact, 5e-6)


@pytest.mark.parametrize("name", ["simple_gla", "polynomial", "gla"])
def test_decoding_goes_on_where_the_prompt_ended(name):
    tensors, inputs = drawn(name, length=20)
    op = ac.compile(VARIANTS[name])
    whole = op(*tensors, **inputs, plan="chunk")

    def tokens(lo, hi):
        cut = {n: x[:, :, lo:hi] for n, x in inputs.items()}
        return [x[:, :, lo:hi] for x in tensors], cut

    (prompt, own), parts = tokens(0, 17), []
    out, state = op(*prompt, **own, output_final_state=True)
    parts.append(out)
    for t in range(17, 20):
        token, own = tokens(t, t + 1)
        out, state = op(*token, **own, initial_state=state, output_final_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)
    last = op(*tensors, **inputs, plan="recurrent", output_final_state=True)[1]
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", ["auto", "chunk", "recurrent"])
def test_no_tokens_leave_the_state_as_it_was(plan):
    q, g = torch.randn(1, 2, 0, 16), torch.zeros(1, 2, 0)
    initial = torch.randn(1, 2, 16, 16, requires_grad=True)
    out, last = ac.compile("simple_gla", plan=plan)(q, q, q, g=g, initial_state=initial, output_final_state=True)
    assert out.shape == q.shape
    torch.testing.assert_close(last, initial, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(last.sum(), initial)
    assert bool((gradient == 1).all())


def test_broadcast_gates_and_shared_gates():
    """A gate that all heads or all tokens share is a tensor of size 1 there, and gets its gradient in that shape."""
    (q, k, v), _ = drawn("simple_gla", length=19)
    op = ac.compile(VARIANTS["simple_gla"])
    for shape in ((1, 1, 19), (1, 2, 1), (1, 1, 1)):
        g = (-0.3 * torch.rand(shape, generator=torch.Generator().manual_seed(7))).requires_grad_()
        grads = []
        for plan in ("parallel", "chunk"):
            out = op(q, k, v, g=g, plan=plan)
            grads.append((out.detach(), *torch.autograd.grad(out.square().sum(), g)))
        assert grads[0][1].shape == shape
        agree(grads[1], [x.double() for x in grads[0]], 5e-6)


def test_strong_decay_neither_overflows_nor_loses_a_token():
    (q, k, v), _ = drawn("simple_gla", length=37)
    g = torch.full((1, 2, 37), -200.0)
    out = ac.compile("simple_gla")(q, k, v, g=g, plan="chunk", chunk_size=16)
    own = (q * k).sum(-1, keepdim=True) / 4 * v
    torch.testing.assert_close(out, own.expand_as(out), rtol=1e-5, atol=1e-5)
    # one channel forgets at once, the others not at all
    g = torch.zeros(1, 2, 37, 16)
    g[..., 0] = -1000.0
    out = ac.compile("gla")(q, k, v, g=g)
    pairs = (q[..., 1:] @ k[..., 1:].mT).tril() + torch.diag_embed(q[..., 0] * k[..., 0])
    torch.testing.assert_close(out, pairs / 4 @ v.expand(-1, 2, -1, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", ["parallel", "chunk", "recurrent"])
def test_a_head_that_keeps_nothing(plan):
    """A rate of -inf beside one of 0: steps that are alike are multiplied by how many there are, 0 among them."""
    (q, k, v), _ = drawn("retention", length=37)
    out = ac.compile("retention")(q, k, v, rates=torch.tensor([-torch.inf, 0.0]), plan=plan, chunk_size=16)
    pairs = q.double() @ k.mT.double() / 4
    exact = torch.stack((pairs[:, 0].diagonal(0, 1, 2).diag_embed(), pairs[:, 1].tril()), 1) @ v.double()
    agree([out], [exact], 2e-6)


@pytest.mark.parametrize(("factor", "shape"), [(ac.gate, (1, 2, 37)), (ac.decay, (2,))])
def test_what_nobody_reads_of_a_last_segment_is_not_summed(factor, shape, many_segments):
    (q, k, v), _ = drawn("", length=37)
    # an engine of its own, which no other test has made: the module is its
    variant = ac.Variant(name="unread", score=factor("unread"), mask=ac.causal, normalizer=ac.identity)
    op, inputs = ac.compile(variant, plan="chunk"), {"unread": torch.full(shape, -0.1)}
    module = op.engine.module(16, 24, True)
    launch, programs = module._launch, {}

    def counted(kernel, grid, *rest):
        programs.setdefault(kernel.__name__, []).append(grid)
        launch(kernel, grid, *rest)

    module._launch = counted
    first = torch.zeros(1, 2, 16, 24, requires_grad=True)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, last = op(*leaves, **inputs, chunk_size=16, initial_state=first, output_final_state=True)
    torch.autograd.grad([out, last], [*leaves, first], [out.detach(), last.detach()])
    whole, programs = programs, {}
    out = op(*leaves, **inputs, chunk_size=16)
    torch.autograd.grad(out, leaves, out.detach())
    blocks = whole["states_kernel"][0] // (2 * 3)
    assert whole == {**whole, "states_kernel": [6 * blocks, 4 * blocks], "dstates_kernel": [6 * blocks]}
    assert programs == {**programs, "states_kernel": [4 * blocks] * 2, "dstates_kernel": [4 * blocks]}


def test_a_factor_of_the_key_has_a_gradient_beside_no_other():
    only = ac.Variant(
        name="only",
        score=lambda score, h, kv_idx, beta: score * ac.sigmoid(beta[h, kv_idx]),
        normalizer=ac.identity,
        mask=ac.causal,
        inputs={"beta": ac.Input("h", "kv_idx", grad=True)},
    )
    tensors, _ = drawn("only", length=20)
    beta, cotangent = torch.randn(2, 20), torch.randn(1, 2, 20, 24)
    out, gradients = with_gradients(partial(ac.compile(only), plan="chunk"), tensors, {"beta": beta}, cotangent)

    def by_hand(q, k, v, beta):
        return (q @ k.mT / 4 * beta.sigmoid()[:, None]).tril() @ v

    exact, exactly = with_gradients(by_hand, [x.double() for x in tensors], {"beta": beta.double()}, cotangent)
    agree((out, *gradients), (exact, *exactly), 2e-5)


def test_all_plans_take_the_default_of_a_gate():
    (q, k, v), _ = drawn("simple_gla", length=8)
    default = [[[-0.25] * 8] * 2]
    gated = ac.Variant(
        name="gated",
        score=ac.gate(),
        mask=ac.causal,
        normalizer=ac.identity,
        inputs={"g": ac.Input("b", "h", "kv_idx", default=lambda sizes: default)},
    )
    outs = [ac.compile(gated, plan=plan)(q, k, v) for plan in ("parallel", "chunk", "recurrent")]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=1e-5, rtol=1e-5)


def test_autograd_reaches_a_learned_gate():
    """g is a function of a weight: the op is one link of a chain."""
    (q, k, v), _ = drawn("simple_gla", length=12)
    weight = torch.zeros(2, requires_grad=True)
    out = ac.compile("simple_gla", plan="chunk")(q, k, v, g=F.logsigmoid(weight)[None, :, None])
    (gradient,) = torch.autograd.grad(out.square().sum(), weight)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("name", ["simple_gla", "weighted"])
def test_torch_compile_sees_one_graph(name):
    tensors, inputs = drawn(name, length=20)
    op = ac.compile(VARIANTS[name], plan="chunk")
    run = torch.compile(op, fullgraph=True, backend="aot_eager")
    cotangent = torch.randn(1, 2, 20, 24)
    eager, compiled = (with_gradients(f, tensors, inputs, cotangent) for f in (op, run))
    for ours, theirs in zip((compiled[0], *compiled[1]), (eager[0], *eager[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["gla", "simple_gla", "gated_delta_net"])
def test_what_forgets_all_costs_other_tokens_nothing(name, dtype, many_segments):
    """Steps of -1e9 and of -inf in the midst of a chunk, as of a new document, beside steps of a few percent."""
    (q, k, v), _ = drawn("gla", length=70)
    generator = torch.Generator().manual_seed(4)
    g = 0.1 * (inputs_of("gla", 1, 2, 70)["g"] if name == "gla" else -torch.rand(1, 2, 70, generator=generator))
    g[:, :, [9, 33]] = -1e4 if dtype == torch.float16 else -1e9
    g[:, :, 34] = -torch.inf
    beta = {"beta": torch.rand(1, 2, 70, generator=generator)} if name == "gated_delta_net" else {}
    k = F.normalize(k, dim=-1)
    q, k, v, g = (x.to(dtype) for x in (q, k, v, g))
    op = ac.compile(name)
    got, gradients = with_gradients(partial(op, plan="chunk", **beta), (q, k, v), {"g": g}, v.expand(1, 2, -1, -1))
    by_token = op(q, k, v, g=g, **beta, plan="recurrent")
    of_pairs = []
    if name == "simple_gla":  # all pairs subtract sums of gates
        out, found = with_gradients(partial(op, plan="parallel"), (q, k, v), {"g": g}, v.expand(1, 2, -1, -1))
        of_pairs = [out, *found]

    def formula(q, k, v, g):
        state, outs, kept = torch.zeros(1, 2, 16, 24, dtype=torch.float64), [], g.exp().reshape(1, 2, 70, -1, 1)
        for t in range(70):
            state = kept[:, :, t] * state
            old = (k[:, :, t, None] @ state)[:, :, 0] if beta else 0.0
            gain = beta["beta"][:, :, t, None].double() if beta else 1.0
            state = state + k[:, :, t, :, None] * (gain * (v[:, :, t] - old))[:, :, None]
            outs.append((q[:, :, t, None] @ state)[:, :, 0] / 4)
        return torch.stack(outs, 2)

    double = [x.double() for x in (q, k, v)]
    exact, of_formula = with_gradients(formula, double, {"g": g.double()}, v.expand(1, 2, -1, -1))
    limit = 2e-3 if dtype == torch.float16 else 3e-5
    ours_and_theirs = zip((got, by_token, *gradients), (exact, exact, *of_formula), strict=True)
    for ours, theirs in (*ours_and_theirs, *zip(of_pairs, (exact, *of_formula), strict=False)):
        error = (ours.double() - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
        assert error <= limit
