"""Hybrids: against formulas by hand in float64, and calls that go on against one that has all tokens."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import pytest
import torch

import attncc as ac
from attncc.errors import InputError, UnsupportedError
from attncc.runtime.hybrid import Seen
from attncc.runtime.verify import Shape, verify_variant

TOKEN = ("b", "h", "kv_idx")
WINDOW = ac.Variant(name="window", mask=ac.causal & ac.sliding_window("size"), score=ac.softcap(8.0))
DOCUMENTS = ac.Variant(name="documents", mask=ac.causal & ac.window(9, 0) & ac.document(), score=ac.alibi())
EVERYTHING = ac.Variant(
    name="everything",
    mask=ac.causal,
    score=lambda score, kv_idx, t: score + t[kv_idx % 4],
    inputs={"t": ac.Input("phase", grad=True)},
)
GATE = {"gate": ac.Input("b", "h", "q_idx", grad=True)}


def gated(near, far, b, h, q_idx, gate):
    return far + ac.sigmoid(gate[b, h, q_idx]) * near


HYBRIDS = {
    "window and gated": ac.Hybrid(
        name="window_gated", parts={"near": WINDOW, "far": ac.variants.get("simple_gla")}, inputs=GATE, combine=gated
    ),
    "documents and delta": ac.Hybrid(
        name="documents_delta",
        parts={"near": DOCUMENTS, "far": ac.variants.get("gated_delta_net")},
        inputs={"mix": ac.Input("h_kv", grad=True), "least": ac.Scalar(0.25)},
        combine=lambda near, far, h_kv, mix, least: ac.maximum(mix[h_kv], least) * near - far,
    ),
    "all keys and retention": ac.Hybrid(
        name="all_retention",
        parts={"near": EVERYTHING, "far": ac.variants.get("retention")},
        inputs=GATE,
        combine=gated,
    ),
}
#: one of a token at a time, as in decoding, and some at the ends of chunks
CUT = (0, 1, 2, 16, 32, 37)


def sizes(x, h=4, hk=2, n=37, b=2):
    return [{"b": b, "h": h, "h_kv": hk, "q_idx": n, "kv_idx": n, "phase": 4}[dim] for dim in x]


def call(hybrid, dtype=torch.float32, b=2, n=37, seed=0):
    """q, k, v and inputs of a hybrid, with grouped heads, Dqk != Dv, and k, v as views."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    q, k, v = normal(b, 4, n, 16), normal(b, n, 2, 16).transpose(1, 2), normal(b, n, 2, 24).transpose(1, 2)
    k = torch.nn.functional.normalize(k, dim=-1)
    inputs = {}
    for decl in hybrid.graph.inputs:
        size = sizes(decl.pattern, n=n, b=b)
        if decl.dtype == "int":
            inputs[decl.name] = torch.randint(0, 3, size, generator=generator).sort(-1).values
        elif decl.name == "beta":
            inputs[decl.name] = torch.rand(size, generator=generator)
        elif decl.name in ("g", "rates"):
            inputs[decl.name] = -0.2 * torch.rand(size, generator=generator)
        else:
            inputs[decl.name] = normal(*size)
    scalars = {"size": 5} if any(s.name == "size" for s in hybrid.graph.scalars) else {}
    return [x.to(dtype) for x in (q, k, v)], inputs, scalars


def of(op, inputs, lo, hi):
    """The inputs of some tokens."""
    return {name: x.narrow(op.along[name], lo, hi - lo) if name in op.along else x for name, x in inputs.items()}


def test_a_hybrid_is_its_formula_by_hand():
    hybrid = HYBRIDS["window and gated"]
    (q, k, v), inputs, scalars = call(hybrid)
    leaves = {"q": q, "k": k, "v": v, **inputs}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    out = ac.compile(hybrid)(**leaves, **scalars)
    q, k, v, g, gate = (leaves[name].double() for name in ("q", "k", "v", "g", "gate"))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    score = q @ k.mT / 4
    i, j = torch.arange(37)[:, None], torch.arange(37)
    near = (8 * (score / 8).tanh()).masked_fill((j > i) | (i - j >= 5), -torch.inf).softmax(-1) @ v
    total = g.cumsum(-1)
    decay = torch.exp((total[..., :, None] - total[..., None, :]).clamp(max=0))
    far = torch.where(j <= i, score * decay, 0.0) @ v
    exact = far + gate.sigmoid()[..., None] * near
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, tuple(leaves.values()), cotangent)
    wanted = torch.autograd.grad(exact, tuple(leaves.values()), cotangent.double())
    for name, a, b in zip(leaves, found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", HYBRIDS)
def test_every_hybrid_is_right_by_the_rules_of_verify(name):
    rows = verify_variant(HYBRIDS[name], shapes=[Shape(1, 4, 2, 40, 53, 16, 24, strided=True)])
    checked = {row.check.name for row in rows}
    assert {"out", "dq", "dk", "dv", "out (in two calls)"} <= checked
    assert all(row.ok for row in rows), rows


def test_verify_sees_a_wrong_state(monkeypatch):
    op = ac.compile(HYBRIDS["window and gated"])
    pairs = op._pairs["near"]
    monkeypatch.setattr(pairs, "_reach", lambda env: env["size"] - 2)  # one key less than a query sees
    rows = verify_variant(HYBRIDS["window and gated"], shapes=[Shape(1, 2, 2, 48, 48, 16, 16)], op=op)
    assert [row.check.name for row in rows if not row.ok] == ["out (in two calls)"]


@pytest.mark.parametrize("name", HYBRIDS)
def test_calls_that_go_on_give_what_one_call_gives(name):
    op = ac.compile(HYBRIDS[name])
    tensors, inputs, scalars = call(HYBRIDS[name])
    with torch.no_grad():
        whole = op(*tensors, **inputs, **scalars)
        state, parts = None, []
        for lo, hi in pairwise(CUT):
            tokens = [x[:, :, lo:hi] for x in tensors]
            own = of(op, inputs, lo, hi)
            out, state = op(*tokens, initial_state=state, output_final_state=True, **own, **scalars)
            parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=2e-6, rtol=1e-5)


def test_a_window_keeps_no_more_keys_than_a_later_token_sees():
    op = ac.compile(HYBRIDS["window and gated"])
    tensors, inputs, scalars = call(HYBRIDS["window and gated"])
    _, state = op(*tensors, output_final_state=True, **inputs, **scalars)
    near = state["near"]
    assert near.k.shape == (2, 2, 4, 16)
    assert near.v.shape == (2, 2, 4, 24)
    assert near.k.untyped_storage().nbytes() == near.k.numel() * 4, "a view would hold on to all keys"
    assert state["far"].shape == (2, 4, 16, 24)


def test_the_widest_of_several_windows_is_kept():
    mask = ac.causal & ac.sliding_window("size") | ac.causal & ac.window("left", 0) & ac.dilated(3)
    wide = ac.Variant(name="wide", mask=mask)
    op = ac.compile(ac.Hybrid(parts={"near": wide, "far": EVERYTHING}, combine=lambda near, far: near + far))
    (q, k, v), inputs, _ = call(HYBRIDS["all keys and retention"])
    for size, left in ((5, 9), (8, 3)):
        _, state = op(q, k, v, size=size, left=left, t=inputs["t"], output_final_state=True)
        assert (state["near"].k.shape[2], state["far"].k.shape[2]) == (max(size - 1, left), 37)


def test_explain_says_how_much_is_kept():
    parts = {"near": WINDOW, "far": ac.variants.get("linear_attention"), "all": EVERYTHING}
    op = ac.compile(ac.Hybrid(parts=parts, combine=lambda near, far, all: near + far + all))
    text = op.explain(q_len=512, d_qk=64, d_v=32, size=5, target="h100")
    kept = text.partition("kept from call to call\n")[2].splitlines()[:3]
    assert kept == [
        "  near: k and v of the last size - 1 tokens",
        "  far: a state of 64 x 33 float32 a head",  # a column more, for the row totals
        "  all: k and v of all tokens",
    ]
    q, k, v = call(HYBRIDS["window and gated"])[0]
    _, state = op(q, k, v, size=5, t=torch.zeros(4), output_final_state=True)
    assert state["far"].shape == (2, 4, 16, 25)


def test_gradients_flow_to_the_state():
    hybrid = HYBRIDS["documents and delta"]
    op = ac.compile(hybrid)
    tensors, inputs, scalars = call(hybrid, b=1)
    leaves = [x.detach().requires_grad_() for x in tensors]

    def split(q, k, v):
        state, parts = None, []
        for lo, hi in ((0, 20), (20, 37)):
            tokens = [x[:, :, lo:hi] for x in (q, k, v)]
            own = of(op, inputs, lo, hi)
            out, state = op(*tokens, initial_state=state, output_final_state=True, **own, **scalars)
            parts.append(out)
        return torch.cat(parts, 2)

    def gradients(run):
        out = run(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    whole = gradients(lambda q, k, v: op(q, k, v, **inputs, **scalars))
    for a, b in zip(gradients(split), whole, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["window and gated", "documents and delta"])
def test_packed_sequences_see_nothing_of_each_other(name):
    op = ac.compile(HYBRIDS[name])
    tensors, inputs, scalars = call(HYBRIDS[name], b=1)
    ends = (0, 11, 11, 12, 37)
    with torch.no_grad():
        packed = op(*tensors, cu_seqlens=torch.tensor(ends), **inputs, **scalars)
        alone = [
            op(*(x[:, :, lo:hi] for x in tensors), **of(op, inputs, lo, hi), **scalars)
            for lo, hi in pairwise(ends)
            if lo < hi
        ]
    torch.testing.assert_close(packed, torch.cat(alone, 2), atol=2e-6, rtol=1e-5)


def test_parts_are_outputs_too():
    hybrid = HYBRIDS["window and gated"]
    op = ac.compile(hybrid)
    tensors, inputs, scalars = call(hybrid)
    out, near = op(*tensors, outputs=("out", "near"), **inputs, **scalars)
    assert torch.equal(near, op.parts["near"](*tensors, **scalars))
    assert torch.equal(out, op(*tensors, **inputs, **scalars))
    exact = ac.reference(hybrid, *tensors, outputs="near", **inputs, **scalars)
    torch.testing.assert_close(near.double(), exact, atol=1e-5, rtol=1e-5)


def test_half_precision_is_combined_in_float32():
    hybrid = HYBRIDS["window and gated"]
    tensors, inputs, scalars = call(hybrid, torch.float16)
    out = ac.compile(hybrid)(*tensors, **inputs, **scalars)
    exact = ac.reference(hybrid, *tensors, **inputs, **scalars)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), exact, atol=4e-3, rtol=4e-3)


def test_torch_compile_sees_no_break_with_a_state_or_without():
    hybrid = HYBRIDS["documents and delta"]
    op = ac.compile(hybrid)
    tensors, inputs, scalars = call(hybrid, b=1)
    whole = torch.compile(lambda q, k, v: op(q, k, v, **inputs, **scalars), fullgraph=True, backend="eager")
    assert torch.equal(whole(*tensors), op(*tensors, **inputs, **scalars))
    own = of(op, inputs, 0, 20)
    step = torch.compile(
        lambda q, k, v: op(q, k, v, output_final_state=True, **own, **scalars), fullgraph=True, backend="eager"
    )
    first = [x[:, :, :20] for x in tensors]
    out, state = step(*first)
    assert torch.equal(out, op(*first, **own, **scalars))
    assert isinstance(state["near"], Seen)


def test_an_op_is_saved_and_copied():
    hybrid = HYBRIDS["window and gated"]
    op = ac.compile(hybrid, plan="recurrent")
    tensors, inputs, scalars = call(hybrid, n=5, b=1)
    for other in (pickle.loads(pickle.dumps(op)), copy.deepcopy(op)):
        assert torch.equal(other(*tensors, **inputs, **scalars), op(*tensors, **inputs, **scalars))


@pytest.mark.parametrize(
    ("name", "changes", "error", "reason"),
    [
        ("window and gated", {"nothing": 1}, InputError, "has no input 'nothing'"),
        ("window and gated", {"outputs": "lse"}, InputError, "there is no output 'lse'"),
        ("window and gated", {"initial_state": {"near": None}}, InputError, "not a state of near, far"),
        ("window and gated", {"initial_state": {"near": 1, "far": 1}}, InputError, "initial_state['near'] is of type"),
        ("window and gated", {"gate": None}, InputError, "needs the input 'gate'"),
        ("documents and delta", {"doc": None, "output_final_state": True}, InputError, "goes with the keys"),
        ("documents and delta", {"plan": "parallel"}, UnsupportedError, "there are no pairs"),
    ],
)
def test_what_does_not_fit_is_said(name, changes, error, reason):
    tensors, inputs, scalars = call(HYBRIDS[name])
    with pytest.raises(error) as caught:
        ac.compile(HYBRIDS[name])(*tensors, **{**inputs, **scalars, **changes})
    assert reason in str(caught.value)


def test_a_state_of_other_tensors_is_refused():
    hybrid = HYBRIDS["window and gated"]
    op = ac.compile(hybrid)
    tensors, inputs, scalars = call(hybrid)
    _, state = op(*tensors, output_final_state=True, **inputs, **scalars)
    near = state["near"]._replace(v=state["near"].v[..., :8])
    with pytest.raises(InputError, match=r"initial_state\['near'\].v is"):
        op(*tensors, initial_state={**state, "near": near}, **inputs, **scalars)


def test_a_part_that_cannot_go_on_says_so_only_where_it_must():
    both = ac.Variant(name="both", mask=ac.window(3, 3))
    op = ac.compile(ac.Hybrid(parts={"one": both, "two": WINDOW}, combine=lambda one, two: one - two))
    (q, k, v), _, _ = call(HYBRIDS["window and gated"])
    assert op(q[:, :, :20], k, v).shape == (2, 4, 20, 24), "no part has a state: keys need not be the queries' tokens"
    assert op.cannot_go_on() == "one: no call can go on from another: a query may see keys of later tokens"
    assert ac.compile(HYBRIDS["window and gated"]).cannot_go_on() is None
    with pytest.raises(UnsupportedError, match="the part 'one' has no form for a state: .* keys of later tokens"):
        op(q, k, v, output_final_state=True)
    with pytest.raises(InputError, match="chunk_size is for parts in linear time"):
        op(q, k, v, chunk_size=32)
