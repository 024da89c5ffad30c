"""Weights of degree 2 in linear time: features on the fly against all pairs, and against states by hand in float64."""

from __future__ import annotations

import ast
from itertools import pairwise

import pytest
import torch

import attncc as ac
from attncc.codegen.crosscompile_linear import cross_compile_linear
from attncc.codegen.module import load_source
from attncc.codegen.square import render_square
from attncc.errors import UnsupportedError
from attncc.passes.linearize import linearize
from attncc.schedule import square as schedule_square
from attncc.schedule.device import device_for
from attncc.schedule.linear import LinearSizes
from attncc.schedule.square import LARGEST, choose_square, square_crossover, square_schedule
from tests.runtime.linear_cases import agree, with_gradients


def squared(score, row, b, h, kv_idx, beta, tau):
    """No part of degree 0: factors of both sides, and a denominator that is no sum alone."""
    s = tau[h] * score * beta[b, h, kv_idx]
    p = 0.5 * s + 2 * s**2
    return p / (row.sum(p) + 3)


VARIANTS = {
    **{name: ac.variants.get(name) for name in ("taylor", "taylor_causal", "taylorshift")},
    "even": ac.Variant(name="even", mask=ac.causal, normalizer=lambda score: 1 + score**2),
    "squared": ac.Variant(
        name="squared",
        mask=ac.causal,
        normalizer=squared,
        similarity=lambda q_vec, k_vec: ac.dot(ac.softplus(q_vec), ac.sigmoid(k_vec)),
        inputs={"beta": ac.Input("b", "h", "kv_idx", grad=True), "tau": ac.Input("h", grad=True)},
    ),
}


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    """Segments of one tile, as a head dimension of 5 asks for."""
    monkeypatch.setattr(schedule_square, "SEGMENT", 1)


def drawn(name, batch=1, heads=2, kv_heads=1, length=37, d_qk=5, d_v=12, dtype=torch.float32, strided=False, keys=None):
    generator = torch.Generator().manual_seed(1)

    def tensor(h, n, d):
        shape = (batch, n, h, d) if strided else (batch, h, n, d)
        x = torch.randn(shape, generator=generator).to(dtype)
        return x.transpose(1, 2) if strided else x

    keys = length if keys is None else keys
    tensors = [tensor(heads, length, d_qk), tensor(kv_heads, keys, d_qk), tensor(kv_heads, keys, d_v)]
    beta = 0.5 + torch.rand(batch, heads, length, generator=generator)
    tau = torch.tensor([1.5, 0.7])
    inputs = {"taylorshift": {"tau": tau}, "squared": {"beta": beta, "tau": tau}}
    return tensors, inputs.get(name, {})


def exactly(name, tensors, inputs, cotangent):
    double = [x.double() for x in tensors], {n: x.double() for n, x in inputs.items()}
    return with_gradients(lambda *a, **i: ac.reference(VARIANTS[name], *a, **i), *double, cotangent.double())


@pytest.mark.parametrize(("length", "chunk"), [(37, 16), (29, 64)])
@pytest.mark.parametrize("name", VARIANTS)
def test_features_are_all_pairs(name, length, chunk):
    """Segments of 16 tokens, or one of one tile."""
    tensors, inputs = drawn(name, length=length)
    cotangent = torch.randn(1, 2, length, 12, generator=torch.Generator().manual_seed(2))
    got = with_gradients(ac.compile(VARIANTS[name], plan="chunk"), tensors, inputs, cotangent, chunk_size=chunk)
    exact = exactly(name, tensors, inputs, cotangent)
    agree((got[0], *got[1]), (exact[0], *exact[1]), 3e-6)


@pytest.mark.parametrize("name", ["taylor", "taylorshift"])
def test_other_tokens(name):
    tensors, inputs = drawn(name, batch=2, length=19, keys=34, strided=True)
    cotangent = torch.randn(2, 2, 19, 12, generator=torch.Generator().manual_seed(2))
    got = with_gradients(ac.compile(name, plan="chunk"), tensors, inputs, cotangent, chunk_size=16)
    exact = exactly(name, tensors, inputs, cotangent)
    agree((got[0], *got[1]), (exact[0], *exact[1]), 3e-6)
    assert got[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", ["taylor_causal", "taylorshift"])
def test_sixteen_bits(name):
    tensors, inputs = drawn(name, heads=2, kv_heads=2, dtype=torch.float16)
    cotangent = torch.randn(1, 2, 37, 12, generator=torch.Generator().manual_seed(2)).half()
    got = with_gradients(ac.compile(name, plan="chunk"), tensors, inputs, cotangent, chunk_size=16)
    exact = exactly(name, tensors, inputs, cotangent)
    for ours, theirs in zip((got[0], *got[1]), (exact[0], *exact[1]), strict=True):
        assert (ours.double() - theirs).square().mean().sqrt() <= 5e-3 * theirs.square().mean().sqrt()


def features(x):
    return torch.cat([(x[..., :, None] * x[..., None, :]).flatten(-2), x, torch.ones_like(x[..., :1])], -1)


@pytest.mark.parametrize("plan", ["chunk", "recurrent"])
@pytest.mark.parametrize("ends", [(0, 35), (0, 17, 17, 35)], ids=["one sequence", "packed"])
def test_states_in_and_out_and_packed_sequences(ends, plan):
    """The recurrence by hand, with gradients through both states; one of the sequences is empty."""
    length, sequences = ends[-1], len(ends) - 1
    (q, k, v), _ = drawn("taylor_causal", length=length)
    op = ac.compile("taylor_causal")
    generator = torch.Generator().manual_seed(4)
    shape = (sequences, 2, *op.engine.state_shape(5, 12))
    assert shape[2:] == (31, 13)
    initial = torch.randn(shape, generator=generator)
    initial[:, :, :, -1] = features(torch.randn(sequences, 2, 9, 5, generator=generator)).sum(2)  # totals above 0
    cotangents = torch.randn(1, 2, length, 12, generator=generator), torch.randn(shape, generator=generator)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, initial)]
    packed = torch.tensor(ends) if sequences > 1 else None
    options = {"cu_seqlens": packed, "output_final_state": True, "plan": plan, "chunk_size": 16}
    results = op(*leaves[:3], initial_state=leaves[3], **options)
    got = (*results, *torch.autograd.grad(results, leaves, cotangents))

    leaves = [x.detach().double().requires_grad_() for x in (q, k, v, initial)]
    q, k, v = (x.repeat_interleave(2 // x.shape[1], 1) for x in leaves[:3])
    scale = torch.cat([torch.full((25,), 0.1), torch.full((5,), 5**-0.5), torch.ones(1)]).double()
    outs, states = [], []
    for i, (lo, hi) in enumerate(pairwise(ends)):
        state = leaves[3][i : i + 1]
        for t in range(lo, hi):
            value = torch.cat([v[:, :, t], torch.ones(1, 2, 1).double()], -1)
            state = state + features(k[:, :, t])[..., None] * value[..., None, :]
            read = ((scale * features(q[:, :, t]))[..., None] * state).sum(-2)
            outs.append(read[..., :-1] / read[..., -1:])
        states.append(state)
    results = torch.stack(outs, 2), torch.cat(states)
    exact = (*results, *torch.autograd.grad(results, leaves, [c.double() for c in cotangents]))
    agree(got, exact, 5e-6)


def test_decoding_goes_on_where_the_prompt_ended():
    tensors, _ = drawn("taylor_causal", length=36)
    op = ac.compile("taylor_causal")
    whole, last = op(*tensors, plan="chunk", output_final_state=True)
    _, state = op(*(x[:, :, :34] for x in tensors), output_final_state=True)
    for t in (34, 35):
        out, state = op(*(x[:, :, t : t + 1] for x in tensors), initial_state=state, output_final_state=True)
        torch.testing.assert_close(out, whole[:, :, t : t + 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


def test_torch_compile_sees_one_graph():
    tensors, inputs = drawn("taylorshift", length=20)
    op = ac.compile("taylorshift", plan="chunk")
    run = torch.compile(op, fullgraph=True, backend="aot_eager")
    cotangent = torch.randn(1, 2, 20, 12, generator=torch.Generator().manual_seed(3))
    eager, compiled = (with_gradients(f, tensors, inputs, cotangent) for f in (op, run))
    agree((compiled[0], *compiled[1]), [x.double() for x in (eager[0], *eager[1])], 1e-6)


def test_what_is_too_large_is_said():
    q = torch.randn(1, 1, 4, LARGEST + 16)
    with pytest.raises(UnsupportedError, match=f"for heads larger than {LARGEST} is too large"):
        ac.compile("taylor_causal")(q, q, q, plan="chunk")
    assert ac.compile("taylor_causal")(q, q, q).shape == q.shape


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda v: v.name)
def test_the_text_is_tidy_python(variant):
    source = render_square(variant.graph, linearize(variant.graph), 48, 80)
    ast.parse(source)
    assert "{{" not in source
    assert not any(line != line.rstrip() for line in source.splitlines())


@pytest.mark.parametrize(
    ("target", "dim", "dtype"), [("sm_90", 64, "bf16"), ("sm_80", 32, "fp16"), ("gfx942", 64, "bf16")]
)
def test_every_kernel_compiles_and_fits(target, dim, dtype):
    graph, device = VARIANTS["taylor_causal"].graph, device_for(target)
    module = load_source(render_square(graph, linearize(graph), dim, dim), f"square_{target}")
    schedule = square_schedule(LinearSizes(dtype, 2, 16, 16384, dim, dim), device)
    found = cross_compile_linear(module, schedule, device, dtype)
    assert set(found) >= {"slices_kernel", "lines_kernel", "apply_kernel", "slope_kernel", "step_kernel", "link_kernel"}
    for kernel in found.values():
        assert kernel.shared <= device.smem_per_block
        assert kernel.spills <= 256, kernel
        assert not kernel.faults


@pytest.mark.parametrize("dim", [16, 32, 64])
def test_the_model_crosses_over_near_the_square_of_the_dimension(dim, monkeypatch):
    """TaylorShift's own count, every key: Dqk^2 + Dqk + 1 tokens, where launches are small beside the work."""
    monkeypatch.undo()
    device = device_for("h100")
    many = LinearSizes("bf16", 64, 32, 1, dim, dim)
    published = dim * dim + dim + 1
    assert published / 2 <= square_crossover(many, device, False) <= 3 * max(published, 256)
    short, long = (LinearSizes("bf16", 2, 16, n, dim, dim) for n in (64, 1 << 17))
    assert choose_square(short, device, True) == "parallel"
    assert choose_square(long, device, True) == "chunk"
