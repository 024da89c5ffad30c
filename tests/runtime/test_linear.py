"""Attention in linear time: its plans against each other and against recurrences by hand in float64."""

from __future__ import annotations

import ast
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import attncc as ac
from attncc.codegen.crosscompile_linear import cross_compile_linear
from attncc.codegen.linear import render_linear
from attncc.codegen.module import load_source
from attncc.errors import InputError, UnsupportedError
from attncc.passes.linearize import linearize
from attncc.schedule import linear as schedule_linear
from attncc.schedule.device import device_for
from attncc.schedule.linear import LinearSizes, linear_schedule, shared_bytes
from attncc.schedule.linear_cost import choose_plan, crossover
from tests.runtime.sequences import by_sequence


def polynomial(score, row):
    return (1 + score) / row.sum(1 + score)


def weighted(score, row, b, h, q_idx, kv_idx, beta, tau, kappa):
    p = score * beta[b, h, kv_idx] * tau[b, q_idx]
    return kappa[h] * p / ac.maximum(ac.abs(row.sum(p)), 0.5)


#: features on both sides, factors of tokens and heads, and a denominator
OF_FACTORS = {
    "normalizer": weighted,
    "similarity": lambda q_vec, k_vec: ac.dot(ac.softplus(q_vec), ac.sigmoid(k_vec)),
    "inputs": {
        "beta": ac.Input("b", "h", "kv_idx", grad=True),
        "tau": ac.Input("b", "q_idx", grad=True),
        "kappa": ac.Input("h", grad=True),
    },
}
SCANS = ("forward_kernel", "dq_kernel", "dk_kernel", "dv_kernel")
SHIPPED = ("linear_attention", "retention", "lightning", "simple_gla", "ssd", "gla")
VARIANTS = {
    **{name: ac.variants.get(name) for name in SHIPPED},
    "unit": ac.Variant(
        name="unit",
        mask=ac.causal,
        normalizer="identity",
        similarity=lambda q_vec, k_vec: ac.dot(q_vec, k_vec) / ac.norm(q_vec) / ac.norm(k_vec),
    ),
    "polynomial": ac.Variant(name="polynomial", mask=ac.causal, normalizer=polynomial),
    "weighted": ac.Variant(
        name="weighted",
        mask=ac.causal,
        **OF_FACTORS,
    ),
    "gated": ac.Variant(  # a decay beside features, factors of tokens and a denominator
        name="gated",
        mask=ac.causal,
        score=ac.gate("g"),
        **OF_FACTORS,
    ),
}


FULL = {
    "linear": ac.Variant(
        name="full_linear",
        similarity=lambda q_vec, k_vec: ac.dot(ac.relu(q_vec) + ac.sigmoid(q_vec), ac.softplus(k_vec)),
        normalizer="by_sum",
    ),
    "identity": ac.Variant(name="full_identity", normalizer="identity"),
    "polynomial": ac.Variant(name="full_polynomial", normalizer=polynomial),
    "weighted": ac.Variant(
        name="full_weighted",
        **OF_FACTORS,
    ),
}


@pytest.fixture
def many_segments(monkeypatch):
    """Segments of one chunk each, as on a GPU with room for all of them."""
    monkeypatch.setattr(schedule_linear, "SEGMENT", 1)
    monkeypatch.setattr(schedule_linear, "WAVES", 1000)


def inputs_of(name, batch, heads, length, d_qk=16):
    generator = torch.Generator().manual_seed(3)
    positive = 0.5 + torch.rand(batch, heads, length, generator=generator)
    return {
        "simple_gla": {"g": -0.3 * positive},
        "ssd": {"dt": 0.3 * positive, "rate": torch.linspace(-1.5, -0.1, heads)},
        "gla": {"g": -0.5 * torch.rand(batch, heads, length, d_qk, generator=generator)},
        "retention": {"rates": torch.linspace(-0.3, -0.02, heads)},
        "lightning": {"rates": torch.linspace(-0.5, -0.01, heads)},
        "weighted": {"beta": positive, "tau": positive[:, 0].clone(), "kappa": positive[0, :, 0].clone()},
        "gated": {
            "g": -0.3 * positive,
            "beta": positive,
            "tau": positive[:, 0].clone(),
            "kappa": positive[0, :, 0].clone(),
        },
    }.get(name, {})


def drawn(name, batch=1, heads=2, kv_heads=1, length=37, d_qk=16, d_v=24, dtype=torch.float32, strided=False):
    generator = torch.Generator().manual_seed(1)

    def tensor(h, d):
        shape = (batch, length, h, d) if strided else (batch, h, length, d)
        x = torch.randn(shape, generator=generator).to(dtype)
        return x.transpose(1, 2) if strided else x

    q, k, v = tensor(heads, d_qk), tensor(kv_heads, d_qk), tensor(kv_heads, d_v)
    if name == "polynomial":  # its weights are 1 + score: kept above 0
        q = q * 0.2
    return [q, k, v], inputs_of(name, batch, heads, length)


def with_gradients(op, tensors, inputs, cotangent, **options):
    leaves = [x.detach().requires_grad_() for x in (*tensors, *inputs.values())]
    out = op(*leaves[:3], **dict(zip(inputs, leaves[3:], strict=True)), **options)
    return out, torch.autograd.grad(out, leaves, cotangent.to(out.dtype))


def agree(got, exact, tolerance):
    for ours, theirs in zip(got, exact, strict=True):
        assert (ours.double() - theirs).abs().max() <= tolerance * max(theirs.abs().max().item(), 1.0)


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


def test_what_a_plan_cannot_do_is_said():
    (q, k, v), _ = drawn("linear_attention", length=8)
    op = ac.compile("linear_attention")
    state = torch.zeros(1, 2, 16, 25)
    assert op(q[:, :, :5], k, v).shape == (1, 2, 5, 24)  # other tokens: every pair
    with pytest.raises(UnsupportedError, match="5 queries and 8 keys are not the same tokens"):
        op(q[:, :, :5], k, v, plan="chunk")
    with pytest.raises(UnsupportedError, match="use plan='chunk'"):
        op(q, k, v, plan="parallel", output_final_state=True)
    with pytest.raises(UnsupportedError, match=r"'lse' is one of pairs(.|\n)*leave out what is of a state"):
        op(q, k, v, outputs=("out", "lse"), initial_state=state)
    with pytest.raises(UnsupportedError, match=r"not the same tokens\n *leave out what is of a state"):
        op(q[:, :, :5], k, v, output_final_state=True)
    assert len(op(q, k, v, outputs=("out", "lse"))) == 2
    with pytest.raises(InputError, match=r"pass torch.float32 \(1, 2, 16, 25\)"):
        op(q, k, v, initial_state=state[..., :24])
    with pytest.raises(InputError, match="one of 16, 32, 64$"):
        ac.compile("gla")(q, k, v, g=torch.zeros(1, 2, 8, 16), chunk_size=128)
    with pytest.raises(InputError, match="one of 16, 32, 64, 128"):
        op(q, k, v, chunk_size=48)
    for options, said in (
        ({"chunk_size": "64"}, "chunk_size is '64', not a whole number"),
        ({"cu_seqlens": [0, 8]}, "cu_seqlens is of type list, not a tensor"),
        ({"cu_seqlens": torch.tensor([[0, 8]])}, "cu_seqlens is not a tensor of at least 2 integers"),
        ({"initial_state": [state]}, "initial_state is of type list, not a tensor"),
        ({"position": -1}, "position is -1, not a number of tokens"),
        ({"position": 1.5}, "position is 1.5, not a number of tokens"),
    ):
        with pytest.raises(InputError, match=said):
            op(q, k, v, **options)
    every = ac.compile(FULL["linear"])
    for options in ({"output_final_state": True}, {"plan": "recurrent"}, {"cu_seqlens": torch.tensor([0, 8])}):
        with pytest.raises(UnsupportedError, match="no state from token to token"):
            every(q, k, v, **options)
    with pytest.raises(InputError, match="does not rise from 0 to the 8 tokens"):
        op(q, k, v, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(InputError, match="plan is 'fast'"):
        ac.compile("linear_attention", plan="fast")
    with pytest.raises(UnsupportedError, match=r"the factor 'exp\(cap\*tanh\(.*depends on query and key together"):
        ac.compile("softcap", plan="chunk")
    assert type(ac.compile("simple_gla", plan="parallel")) is ac.AttentionOp


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


def test_a_gradient_that_only_all_pairs_have():
    """The part of the weight that is free of the score has a factor whose gradient chunks do not have."""

    def raised(score, b, h, q_idx, kv_idx, g):
        return (score + 1) * ac.exp(ac.cumsum(g[b, h, q_idx]) - ac.cumsum(g[b, h, kv_idx]))

    inputs = {"g": ac.Input("b", "h", "kv_idx", grad=True)}
    op = ac.compile(ac.Variant(name="raised", score=raised, normalizer=ac.identity, mask=ac.causal, inputs=inputs))
    (q, k, v), _ = drawn("raised", length=2100)
    g = torch.full((1, 2, 2100), -0.1)
    assert op._chosen(q, k, v, "auto", ("out",), False, None) == "chunk"
    for plan in ("chunk", "recurrent"):
        with pytest.raises(
            UnsupportedError, match=r"whose gradient to 'g' is not derived yet[^~]*a component of q and k"
        ):
            op(q, k, v, g=g.requires_grad_(), plan=plan)
        op(q[:, :, :9], k[:, :, :9], v[:, :, :9], g=g[:, :, :9].detach(), plan=plan)
    with pytest.raises(UnsupportedError, match="not derived yet"):
        op(q, k, v, g=g, output_final_state=True)
    assert op._with_gradients("chunk", "auto", False, {"g": g}) == "parallel"
    with torch.no_grad():
        assert op._with_gradients("chunk", "auto", False, {"g": g}) == "chunk"


def test_a_gradient_of_a_term_that_only_all_pairs_have():
    """The same where that part is made of a key: (1 + q) . exp(k) + 1 has a sum over k in it."""
    shifted = ac.Variant(
        similarity=lambda q_vec, k_vec: ac.dot(q_vec, ac.exp(k_vec)) + ac.sum_d(ac.exp(k_vec)) ** 2,
        normalizer=ac.identity,
    )
    op = ac.compile(shifted)
    (q, k, v), _ = drawn("shifted", length=9)
    exact = ac.reference(shifted, q.double(), k.double(), v.double())
    agree([op(q.requires_grad_(), k, v, plan="chunk")], [exact], 1e-5)
    with pytest.raises(UnsupportedError, match="whose gradient to 'k' is not derived yet"):
        op(q, k.requires_grad_(), v, plan="chunk")
    op(q, k, v).sum().backward()
    assert k.grad is not None


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


def test_missing_and_misshapen_gates():
    (q, k, v), _ = drawn("simple_gla", length=8)
    op = ac.compile("simple_gla")
    for plan in ("chunk", "parallel"):
        with pytest.raises(InputError, match="needs the input 'g'"):
            op(q, k, v, plan=plan)
        with pytest.raises(InputError, match="has size 7, expected 8"):
            op(q, k, v, g=torch.zeros(1, 2, 7), plan=plan)
        with pytest.raises(InputError, match=r"'g' has shape \(1, 2, 8, 1\), expected 3 dimensions"):
            op(q, k, v, g=torch.zeros(1, 2, 8, 1), plan=plan)
        with pytest.raises(InputError, match="'g'.*is of type float, not a tensor"):
            op(q, k, v, g=-0.5, plan=plan)
        # a name is of the formula, not of the sums that kernels of all pairs are given
        with pytest.raises(InputError, match="no input 'rate'(.|\n)*it takes g$"):
            op(q, k, v, g=torch.zeros(1, 2, 8), rate=0.5, plan=plan)
        with pytest.raises(InputError, match="no input 'cu_seqlen'(.|\n)*did you mean 'cu_seqlens'"):
            op(q, k, v, g=torch.zeros(1, 2, 8), cu_seqlen=torch.tensor([0, 8]), plan=plan)


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


@pytest.mark.parametrize("variant", [*VARIANTS.values(), *FULL.values()], ids=lambda v: v.name)
def test_the_text_is_tidy_python(variant):
    graph = variant.graph
    source = render_linear(graph, linearize(graph), 96, 80)
    ast.parse(source)
    assert "{{" not in source
    assert not any(line != line.rstrip() for line in source.splitlines())
    assert source == render_linear(graph, linearize(graph), 96, 80)


@pytest.mark.parametrize(
    ("name", "target", "dim", "dtype"),
    [
        ("simple_gla", "sm_90", 128, "bf16"),
        ("simple_gla", "sm_90", 64, "bf16"),
        ("lightning", "sm_90", 128, "bf16"),
        ("polynomial", "sm_80", 64, "fp16"),
        ("retention", "gfx942", 64, "bf16"),
        ("gla", "sm_90", 128, "bf16"),
        ("full_weighted", "sm_80", 64, "bf16"),
    ],
)
def test_every_kernel_compiles_and_fits(name, target, dim, dtype):
    variants = {v.name: v for v in (*VARIANTS.values(), *FULL.values())}
    graph, device = variants[name].graph, device_for(target)
    module = load_source(render_linear(graph, linearize(graph), dim, dim), f"linear_{name}_{target}")
    rows = int(name in ("simple_gla", "gla"))
    sizes = LinearSizes(dtype, 2, 16, 8192, dim, dim, name == "gla", rows=rows)
    schedule = linear_schedule(sizes, device)
    for kernel in cross_compile_linear(module, schedule, device, dtype).values():
        meta = schedule.kernels.get(kernel.name.removesuffix("_kernel"), {})
        if "CHUNK" in meta and "BLOCK" in meta:
            model = shared_bytes(dim, meta["BLOCK"], meta["CHUNK"], sizes, meta["num_stages"])
            assert kernel.shared <= model <= device.smem_per_block, kernel
        # on an H100 some spills of the gradients cost less than narrower blocks, which form a chunk's pairs more often
        wide = target != "sm_90" or kernel.name in ("dq_kernel", "dk_kernel", "dv_kernel")
        assert kernel.spills <= (320 if wide else 40), kernel
        if kernel.name in SCANS and meta["num_stages"] == 3:  # then two programs of a multiprocessor have room
            assert 2 * (kernel.shared + device.smem_reserved) <= device.smem_per_sm, kernel
        # where the assembler made one wrong, another makes it again at the first call
        assert not kernel.faults


def test_the_model_crosses_over_once():
    device = device_for("h100")
    short, long = (LinearSizes("bf16", 2, 16, n, 128, 128) for n in (128, 32768))
    length = crossover(short, device)
    assert length == crossover(long, device)
    assert 256 <= length <= 8192
    assert choose_plan(short, device) == "parallel"
    assert choose_plan(long, device) == "chunk"
    assert choose_plan(LinearSizes("bf16", 2, 16, 1, 128, 128), device) == "recurrent"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 512), (96, 80), (16, 16)])
def test_schedules_cover_the_sequence(dims, dtype):
    for target in ("sm_80", "sm_89", "sm_90", "gfx942"):
        for length in (1, 63, 1000, 8192):
            found = linear_schedule(LinearSizes(dtype, 1, 4, length, *dims), device_for(target))
            assert found.span % found.chunk == 0
            assert found.span >= found.chunk
            assert all(m["BLOCK"] >= 16 for m in found.kernels.values())


REFUSED = {
    "score": ("score * tanh(g[b, h, q_idx] - g[b, h, kv_idx])", "identity", "tanh(g[b, h, q_idx] - g[b, h, kv_idx])"),
    "normalizer": ("score * g[b, h, kv_idx]", "exp(score)", "exp(score)"),
}


@pytest.mark.parametrize("stage", REFUSED)
def test_a_gate_that_does_not_split_is_refused_where_it_is_written(stage):
    score, normalizer, shown = REFUSED[stage]
    variant = ac.loads_toml(
        f'name = "gate"\n[stages]\nscore = "{score}"\nmask = "kv_idx <= q_idx"\nnormalizer = "{normalizer}"\n'
        '[inputs]\ng = { index = ["b", "h", "kv_idx"] }\n'
    )
    with pytest.raises(UnsupportedError, match="depends on query and key together") as refused:
        ac.compile(variant, plan="chunk")
    error = refused.value
    assert error.stage == stage
    assert error.span.text[error.span.col : error.span.end_col].strip('"').endswith(shown)


def test_a_state_of_what_has_none_is_refused_by_name():
    (q, k, v), _ = drawn("simple_gla", length=19)
    with pytest.raises(InputError, match=r"no input 'output_final_state'\n.*which factor does not split"):
        ac.compile("causal")(q, k, v, output_final_state=True)


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
