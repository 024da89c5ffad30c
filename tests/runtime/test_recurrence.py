"""Recurrences: their plans against each other, against the token loop of the reference, and one by hand in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import attncc as ac
from attncc.codegen.crosscompile_linear import cross_compile_linear
from attncc.codegen.delta import render_delta
from attncc.codegen.module import load_source
from attncc.errors import InputError, UnsupportedError
from attncc.passes.recur import recur
from attncc.runtime import delta_engine
from attncc.runtime.samples import sample_inputs
from attncc.runtime.verify import Shape, verify_variant
from attncc.schedule.delta import delta_schedule
from attncc.schedule.device import device_for
from attncc.schedule.linear import LinearSizes


def own_factors(state, k_vec, v_vec, b, h, kv_idx, alpha, eta, theta):
    """What is erased and what is written have factors of their own, and what is kept is no exponential."""
    kept = (1 - alpha[b, h, kv_idx]) * state
    return kept - eta[h] * k_vec * ac.dot(k_vec, kept) + theta[b, kv_idx] * k_vec * v_vec


TOKEN = ("b", "h", "kv_idx")
VARIANTS = {
    "delta_net": ac.variants.get("delta_net"),
    "gated_delta_net": ac.variants.get("gated_delta_net"),
    "own factors": ac.Variant(
        name="own_factors",
        recurrence=ac.recurrence(
            own_factors, out=lambda q_vec, state, b, kv_idx, tau: tau[b, kv_idx] * ac.dot(q_vec, state) / 2
        ),
        inputs={
            "alpha": ac.Input(*TOKEN, grad=True),
            "eta": ac.Input("h", grad=True),
            "tau": ac.Input("b", "kv_idx", grad=True),
            "theta": ac.Input("b", "kv_idx", grad=True),
        },
    ),
    "diagonal": ac.Variant(
        name="diagonal",
        recurrence=ac.recurrence(
            lambda state, k_vec, v_vec, b, h, kv_idx, g, beta: (
                ac.exp(g[b, h, kv_idx]) * state + beta[b, h, kv_idx] * k_vec * v_vec
            )
        ),
        inputs={"beta": ac.Input(*TOKEN, grad=True), "g": ac.Input(*TOKEN, grad=True)},
    ),
}
HARD = ("delta_net", "gated_delta_net")


def inputs_of(name, batch, heads, length):
    generator = torch.Generator().manual_seed(3)

    def rand(*size):
        return torch.rand(size, generator=generator)

    beta, g = rand(batch, heads, length), -rand(batch, heads, length)
    return {
        "delta_net": {"beta": beta},
        "gated_delta_net": {"beta": beta, "g": g},
        "own factors": {
            "alpha": 0.5 * beta,
            "eta": 0.5 + rand(heads),
            "tau": 0.5 + rand(batch, length),
            "theta": rand(batch, length),
        },
        "diagonal": {"beta": beta, "g": g},
    }[name]


def drawn(name, batch=1, heads=2, kv_heads=1, length=37, d_qk=16, d_v=24, dtype=torch.float32, strided=False):
    generator = torch.Generator().manual_seed(1)

    def tensor(h, d):
        shape = (batch, length, h, d) if strided else (batch, h, length, d)
        x = torch.randn(shape, generator=generator)
        return x.transpose(1, 2) if strided else x

    q, k, v = tensor(heads, d_qk), F.normalize(tensor(kv_heads, d_qk), dim=-1), tensor(kv_heads, d_v)
    return [x.to(dtype) for x in (q, k, v)], inputs_of(name, batch, heads, length)


def by_hand(name, q, k, v, inputs, state=None):
    """One sequence, token after token, with the matrix that the state is multiplied by."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    batch, heads, length, dim = q.shape
    state = q.new_zeros(batch, heads, dim, v.shape[3]) if state is None else state
    one = torch.ones(batch, heads, length, dtype=q.dtype)
    read = one * dim**-0.5
    kept, erase, write = one, one * 0, one
    if name == "own factors":
        kept, erase = 1 - inputs["alpha"], one * inputs["eta"][:, None]
        write, read = one * inputs["theta"][:, None], one * inputs["tau"][:, None] / 2
    else:
        kept = inputs["g"].exp() if "g" in inputs else one
        write = inputs["beta"]
        erase = one * 0 if name == "diagonal" else write
    outs = []
    for t in range(length):
        query, key, value = q[:, :, t], k[:, :, t], v[:, :, t]
        transition = torch.eye(dim, dtype=q.dtype) - erase[:, :, t, None, None] * key[..., :, None] * key[..., None, :]
        state = kept[:, :, t, None, None] * (transition @ state)
        state = state + write[:, :, t, None, None] * key[..., :, None] * value[..., None, :]
        outs.append(read[:, :, t, None] * (query[..., None, :] @ state)[..., 0, :])
    return torch.stack(outs, 2), state


def agree(got, exact, tolerance):
    for ours, theirs in zip(got, exact, strict=True):
        assert (ours.double() - theirs).abs().max() <= tolerance * max(theirs.abs().max().item(), 1.0)


def with_gradients(function, tensors, inputs, initial, cotangents):
    """out, the last state, and the gradients of tensors, initial and inputs."""
    leaves = [x.detach().requires_grad_() for x in (*tensors, initial, *inputs.values())]
    results = function(*leaves[:4], dict(zip(inputs, leaves[4:], strict=True)))
    cots = [c.to(r.dtype) for c, r in zip(cotangents, results, strict=True)]
    return (*(r.detach() for r in results), *torch.autograd.grad(results, leaves, cots))


def drawn_state(sequences, shape, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequences, *shape, generator=generator), torch.randn(sequences, *shape, generator=generator)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_reference_is_the_formula_by_hand(name):
    tensors, inputs = drawn(name, length=7)
    tensors, inputs = [x.double() for x in tensors], {n: x.double() for n, x in inputs.items()}
    initial, dlast = (x.double() for x in drawn_state(1, (2, 16, 24)))
    cotangents = torch.randn(1, 2, 7, 24, dtype=torch.float64), dlast

    def reference(q, k, v, state, named):
        return ac.reference(VARIANTS[name], q, k, v, initial_state=state, output_final_state=True, **named)

    got = with_gradients(reference, tensors, inputs, initial, cotangents)
    exact = with_gradients(lambda q, k, v, s, i: by_hand(name, q, k, v, i, s), tensors, inputs, initial, cotangents)
    agree(got, exact, 1e-12)


@pytest.mark.parametrize(
    ("name", "length", "chunk"),
    [*((name, 35, 16) for name in VARIANTS), ("gated_delta_net", 40, 32), ("delta_net", 66, 64)],
)
def test_chunks_are_the_recurrence(name, length, chunk):
    """Out, the last state, and the gradients of everything, the state before the first token among them."""
    tensors, inputs = drawn(name, length=length)
    initial, dlast = drawn_state(1, (2, 16, 24))
    cotangents = torch.randn(1, 2, length, 24, generator=torch.Generator().manual_seed(2)), dlast
    op = ac.compile(VARIANTS[name], plan="chunk")

    def ours(q, k, v, state, named):
        options = {"initial_state": state, "output_final_state": True, "chunk_size": chunk}
        return op(q, k, v, **named, **options)

    got = with_gradients(ours, tensors, inputs, initial, cotangents)
    double = [x.double() for x in tensors], {n: x.double() for n, x in inputs.items()}
    exact = with_gradients(lambda q, k, v, s, i: by_hand(name, q, k, v, i, s), *double, initial.double(), cotangents)
    agree(got, exact, 4e-6)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "diagonal"])
def test_out_is_made_on_the_way_from_chunk_to_chunk(name, monkeypatch):
    """As it is on Hopper where programs fill it; a state goes through packed sequences, one of them empty."""

    def chosen(*args):
        schedule = delta_schedule(*args)
        return replace(schedule, kernels={n: tiles for n, tiles in schedule.kernels.items() if n != "forward"})

    monkeypatch.setattr(delta_engine, "delta_schedule", chosen)
    ends = [0, 35, 36, 36]
    tensors, inputs = drawn(name, length=36)
    initial, dlast = drawn_state(3, (2, 16, 24))
    cotangents = torch.randn(1, 2, 36, 24, generator=torch.Generator().manual_seed(2)), dlast
    packed = {"cu_seqlens": torch.tensor(ends), "output_final_state": True, "chunk_size": 16}
    op = ac.compile(VARIANTS[name], plan="chunk")

    def ours(q, k, v, state, named):
        return op(q, k, v, **named, initial_state=state, **packed)

    def each(q, k, v, state, named):
        found = []
        for i, (lo, hi) in enumerate(pairwise(ends)):
            own = {n: x if x.dim() == 1 else x[..., lo:hi] for n, x in named.items()}
            if hi > lo:
                found.append(by_hand(name, *(x[:, :, lo:hi] for x in (q, k, v)), own, state[i : i + 1]))
            else:
                found.append((q[:, :, :0] @ state[i : i + 1], state[i : i + 1]))
        return torch.cat([out for out, _ in found], 2), torch.cat([last for _, last in found])

    got = with_gradients(ours, tensors, inputs, initial, cotangents)
    double = [x.double() for x in tensors], {n: x.double() for n, x in inputs.items()}
    agree(got, with_gradients(each, *double, initial.double(), cotangents), 4e-6)


def test_kernels_have_blocks_of_their_own_widths(monkeypatch):
    """As they have on a GPU: a gradient is summed over blocks of the values' columns."""
    blocks = {"gradients": 16, "prepare_back": 32, "forward": 16}

    def chosen(*args):
        schedule = delta_schedule(*args)
        tiles = schedule.kernels
        return replace(
            schedule, kernels=tiles | {name: tiles[name] | {"BLOCK": block} for name, block in blocks.items()}
        )

    monkeypatch.setattr(delta_engine, "delta_schedule", chosen)
    tensors, inputs = drawn("gated_delta_net", length=20, d_qk=32)
    initial, dlast = drawn_state(1, (2, 32, 24))
    cotangents = torch.randn(1, 2, 20, 24, generator=torch.Generator().manual_seed(2)), dlast
    op = ac.compile("gated_delta_net", plan="chunk")

    def ours(q, k, v, state, named):
        return op(q, k, v, **named, initial_state=state, output_final_state=True, chunk_size=16)

    got = with_gradients(ours, tensors, inputs, initial, cotangents)
    double = [x.double() for x in tensors], {n: x.double() for n, x in inputs.items()}
    exact = with_gradients(
        lambda q, k, v, s, i: by_hand("gated_delta_net", q, k, v, i, s), *double, initial.double(), cotangents
    )
    agree(got, exact, 4e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_token_after_token_is_the_same(name):
    tensors, inputs = drawn(name, batch=2, strided=True, length=19)
    op = ac.compile(VARIANTS[name])
    exact = ac.reference(VARIANTS[name], *tensors, **inputs)
    for plan in ("chunk", "recurrent"):
        out = op(*tensors, **inputs, plan=plan)
        agree([out], [exact], 2e-6)
        assert out.transpose(1, 2).is_contiguous()  # laid out as q is


@pytest.mark.parametrize(
    ("name", "dtype", "limit"),
    [*((name, torch.float16, 5e-3) for name in HARD), ("gated_delta_net", torch.bfloat16, 1.5e-2)],
    ids=str,
)
def test_sixteen_bits(name, dtype, limit):
    """bfloat16 has 8 of float16's 11 bits."""
    tensors, inputs = drawn(name, kv_heads=2, dtype=dtype, length=33)
    initial, dlast = drawn_state(1, (2, 16, 24))
    cotangents = torch.randn(1, 2, 33, 24, generator=torch.Generator().manual_seed(2)).to(dtype), dlast
    op = ac.compile(VARIANTS[name], plan="chunk")

    def ours(q, k, v, state, named):
        return op(q, k, v, **named, initial_state=state, output_final_state=True, chunk_size=16)

    got = with_gradients(ours, tensors, inputs, initial, cotangents)
    double = [x.double() for x in tensors], {n: x.double() for n, x in inputs.items()}
    exact = with_gradients(lambda q, k, v, s, i: by_hand(name, q, k, v, i, s), *double, initial.double(), cotangents)
    for ours, theirs in zip(got, exact, strict=True):
        error, size = (ours.double() - theirs).square().mean().sqrt(), theirs.square().mean().sqrt()
        assert error <= limit * size


def test_rounding_hardly_reaches_the_gradient_of_a_step():
    """It is a sum over the state times its own gradient, of numbers that have either sign: what rounds the one or the
    other counts in full. Of eight heads it was off by 5.7e-4 with what tokens write and add, and queries ask, rounded
    once more on the way to the state."""
    shape = Shape(1, 8, 8, 256, 256, 32, 32)
    sample = sample_inputs(VARIANTS["gated_delta_net"].graph, shape, torch.float16)
    tensors = [sample.q, sample.k, sample.v, *sample.inputs.values()]
    cotangent = torch.randn(1, 8, 256, 32, generator=torch.Generator().manual_seed(1)).half()
    op = ac.compile("gated_delta_net", plan="chunk")

    def gradients(function, tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = function(*leaves[:3], **dict(zip(sample.inputs, leaves[3:], strict=True)))
        return torch.autograd.grad(out, leaves, cotangent.to(out.dtype))

    got = gradients(partial(op, chunk_size=64), tensors)
    exact = gradients(partial(ac.reference, VARIANTS["gated_delta_net"]), [x.double() for x in tensors])
    limits = (4.6e-4, 5e-4, 4.7e-4, *(4.6e-4 if name == "g" else 4.4e-4 for name in sample.inputs))
    for ours, theirs, limit in zip(got, exact, limits, strict=True):
        assert (ours - theirs).square().mean().sqrt() <= limit * theirs.square().mean().sqrt()


@pytest.mark.parametrize("plan", ["chunk", "recurrent"])
@pytest.mark.parametrize(("batch", "length"), [(1, 0), (0, 5)])
def test_no_tokens_leave_the_state_as_it_was(batch, length, plan):
    tensors, inputs = drawn("gated_delta_net", batch=batch, length=length)
    initial, _ = drawn_state(batch, (2, 16, 24))
    leaves = [x.requires_grad_() for x in (*tensors, initial)]
    op = ac.compile("gated_delta_net", plan=plan)
    out, state = op(*leaves[:3], **inputs, initial_state=leaves[3], output_final_state=True)
    assert out.shape == (batch, 2, length, 24)
    assert torch.equal(state, initial)
    *_, dinitial = torch.autograd.grad((out, state), leaves, (torch.zeros_like(out), torch.ones_like(state)))
    assert torch.equal(dinitial, torch.ones_like(initial))


def test_each_channel_may_decay_on_its_own_where_nothing_is_erased():
    variant = ac.Variant(
        name="channels",
        recurrence=ac.recurrence(
            lambda state, k_vec, v_vec, b, h, kv_idx, g: ac.exp(g[b, h, kv_idx]) * state + k_vec * v_vec
        ),
        inputs={"g": ac.Input("b", "h", "kv_idx", "d", grad=True)},
    )
    tensors, _ = drawn("diagonal", length=21)
    g = -torch.rand(1, 2, 21, 16, generator=torch.Generator().manual_seed(5))
    exact = ac.reference(variant, *tensors, g=g)
    agree([ac.compile(variant)(*tensors, g=g, plan=plan) for plan in ("chunk", "recurrent")], [exact] * 2, 2e-6)


def test_packed_sequences_have_states_of_their_own():
    """One of them is empty; a state goes into each, and comes out, with its gradient."""
    name, ends = "gated_delta_net", (0, 17, 17, 30, 33)
    tensors, inputs = drawn(name, length=33)
    initial, dlast = drawn_state(4, (2, 16, 24))
    cotangents = torch.randn(1, 2, 33, 24, generator=torch.Generator().manual_seed(2)), dlast
    op = ac.compile(VARIANTS[name], plan="chunk")
    packed = {"cu_seqlens": torch.tensor(ends), "output_final_state": True}

    def parts(q, k, v, state, named):
        found = []
        for i, (lo, hi) in enumerate(pairwise(ends)):
            own = {n: x[:, :, lo:hi] for n, x in named.items()}
            if lo == hi:
                found.append((q[:, :, :0, :1].expand(-1, -1, -1, 24), state[i : i + 1]))
            else:
                found.append(by_hand(name, *(x[:, :, lo:hi] for x in (q, k, v)), own, state[i : i + 1]))
        return torch.cat([o for o, _ in found], 2), torch.cat([s for _, s in found])

    def ours(q, k, v, state, named):
        return op(q, k, v, **named, **packed, initial_state=state, chunk_size=16)

    got = with_gradients(ours, tensors, inputs, initial, cotangents)
    double = [x.double() for x in tensors], {n: x.double() for n, x in inputs.items()}
    exact = with_gradients(parts, *double, initial.double(), cotangents)
    agree(got, exact, 4e-6)
    reference = ac.reference(VARIANTS[name], *tensors, **inputs, **packed, initial_state=initial)
    agree(reference, exact[:2], 1e-12)
    steps = op(*tensors, **inputs, **packed, initial_state=initial, plan="recurrent")
    agree(steps, exact[:2], 2e-6)


def test_a_state_carries_a_sequence_on():
    tensors, inputs = drawn("gated_delta_net", length=40)
    op = ac.compile("gated_delta_net")
    whole = op(*tensors, **inputs, plan="chunk")
    state, parts = None, []
    for lo, hi in ((0, 20), (20, 39), (39, 40)):
        own = {n: x[:, :, lo:hi] for n, x in inputs.items()}
        cut = [x[:, :, lo:hi] for x in tensors]
        out, state = op(*cut, **own, initial_state=state, output_final_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=2e-6, rtol=2e-6)


def test_strong_decay_and_keys_alike_stay_finite():
    """exp(-run) would overflow, and so would powers of what all keys, being one, have in common."""
    tensors, inputs = drawn("gated_delta_net", length=48)
    tensors[1] = tensors[1][:, :, :1].expand(-1, -1, 48, -1).contiguous()
    op = ac.compile("gated_delta_net", plan="chunk")
    for g in (-60.0, -1e4, 0.0):
        given = {"beta": torch.ones_like(inputs["beta"]), "g": torch.full_like(inputs["g"], g)}
        out = op(*tensors, **given, chunk_size=64)
        exact = by_hand("gated_delta_net", *(x.double() for x in tensors), {n: x.double() for n, x in given.items()})
        agree([out], exact[:1], 3e-6)


@pytest.mark.parametrize("name", HARD)
def test_verified_as_any_variant_is(name):
    shapes = [Shape(1, 2, 1, 21, 30, 16, 24, strided=True)]
    rows = verify_variant(ac.variants.get(name), shapes=shapes)
    assert [r for r in rows if not r.ok] == []
    names = {r.check.name for r in rows}
    assert {"out (chunk)", "out (recurrent)", "dq (chunk)", "dbeta (chunk)"} <= names


def test_under_torch_compile_and_the_rules_of_operators():
    tensors, inputs = drawn("gated_delta_net", length=20)
    op = ac.compile("gated_delta_net", plan="chunk")
    rows = list(inputs.values())
    call = (*tensors, [rows[1], rows[0], rows[0]], 0.25, None, None, False, 16, True, False, [], op._key)
    torch.library.opcheck(torch.ops.attncc.linear_forward.default, call, test_utils=("test_schema", "test_faketensor"))
    graph = torch.compile(lambda q, k, v, beta, g: op(q, k, v, beta=beta, g=g) * 2, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(graph(*tensors, **inputs), 2 * op(*tensors, **inputs))


def test_under_torch_compile_where_all_sizes_are_symbols():
    tensors, inputs = drawn("gated_delta_net", length=20)
    op, lengths = ac.compile("gated_delta_net"), torch.tensor([0, 7, 7, 20])
    run = partial(op, cu_seqlens=lengths, output_final_state=True)
    found = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)):
        q = tensors[0].clone().requires_grad_()
        out, state = function(q, *tensors[1:], **inputs)
        found.append((out, state, *torch.autograd.grad(out.sum() + state.sum(), q)))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_what_a_call_cannot_have():
    tensors, inputs = drawn("delta_net", length=8)
    op = ac.compile("delta_net")
    for options, error, said in (
        ({"plan": "parallel"}, UnsupportedError, "there are no pairs"),
        ({"outputs": ("out", "lse")}, UnsupportedError, "'lse' is one of pairs"),
        ({"chunk_size": 128}, InputError, "one of 16, 32, 64"),
        ({"initial_state": torch.zeros(1, 2, 24, 16)}, InputError, "initial_state is"),
    ):
        with pytest.raises(error) as caught:
            op(*tensors, **inputs, **{"plan": "chunk", **options})
        assert said in str(caught.value)
    with pytest.raises(UnsupportedError, match="not the same tokens"):
        op(tensors[0][:, :, :4], *tensors[1:], **inputs)
    with pytest.raises(UnsupportedError, match=r"1 heads of k meet 2 of v(.|\n)*k and v of as many heads"):
        op(*tensors[:2], tensors[2].expand(-1, 2, -1, -1), **inputs)
    with pytest.raises(UnsupportedError, match="no pairs"):
        ac.compile("delta_net", plan="parallel")
    with pytest.raises(UnsupportedError, match="backend='gluon' is of pairs"):
        ac.compile("delta_net", backend="gluon")
    with pytest.raises(UnsupportedError, match="whose one output is 'out'"):
        ac.reference("delta_net", *tensors, outputs="lse", **inputs)


def test_explain_says_what_was_proved():
    said = ac.compile("gated_delta_net").explain(target="h100", q_len=2048)
    assert "rank one" in said
    assert "(I - (beta[b, h, kv_idx]) * k k') state_(t-1)" in said
    assert "chunks of 64 tokens" in said


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("name", HARD)
def test_every_kernel_compiles_for_a_gpu(name, target):
    variant, device = ac.variants.get(name).graph, device_for(target)
    module = load_source(render_delta(variant, recur(variant), 128, 128), name)
    schedule = delta_schedule(LinearSizes("bf16", 2, 16, 8192, 128, 128), device)
    found = cross_compile_linear(module, schedule, device, "bf16", states="bf16")
    names = {"prepare", "carry", "forward", "prepare_back", "carry_back", "gradients", "step"}
    assert set(found) == {f"{kernel}_kernel" for kernel in names if kernel != "forward" or kernel in schedule.kernels}
    assert ("forward" in schedule.kernels) == (target != "sm_90")
    for kernel in found.values():
        assert kernel.shared <= device.smem_per_block
        # Spills and all one kernel takes 384 us of an H200 with a gate for what took three of them 533. Of prepare_back
        # three programs share a multiprocessor: 117 us for 141 without.
        gradients = 288 if name == "gated_delta_net" else 0
        allowed = {"gradients_kernel": gradients, "prepare_back_kernel": 64}.get(kernel.name, 0)
        assert kernel.spills <= allowed or target != "sm_90"
        assert not kernel.faults
