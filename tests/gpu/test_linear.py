"""Chunk kernels on a GPU: every kind of decay and every chunk size against float64, gradients among them.

Triton 3.4 to 3.7.0 is known to miscompile some gated chunk backwards on Hopper: what is checked here is values. Lengths
are small, and segments short, so that many processes can share a GPU: the reference has all pairs in float64.
"""

import functools
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import attncc as ac
from attncc.runtime.linear_engine import LinearEngine
from attncc.runtime.verify import Exam, Shape, check, eager, verify_variant
from attncc.schedule import linear as schedule_linear
from tests.runtime.test_linear_calls import BONUS

SHAPES = (
    Shape(1, 2, 1, 520, 520, 256, 128),
    Shape(1, 4, 2, 391, 391, 128, 128, strided=True),
    Shape(2, 4, 4, 320, 320, 64, 64),
    Shape(1, 2, 2, 300, 300, 96, 80),
)
#: by type: that of 16 bits is what matters at all of them
TYPES = {torch.bfloat16: SHAPES, torch.float16: SHAPES[:2], torch.float32: SHAPES[:2]}
NAMES = ("linear_attention", "retention", "lightning", "simple_gla", "ssd", "gla", "rwkv6")
#: a decay a channel
BY_CHANNEL = ("gla", "rwkv6")


@pytest.fixture(autouse=True)
def many_short_segments(monkeypatch):
    """As long sequences have; and what a test took is the next one's."""
    monkeypatch.setattr(schedule_linear, "SEGMENT", 128)
    yield
    torch.cuda.empty_cache()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "shape"), [(t, shape) for t, shapes in TYPES.items() for shape in shapes], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_plan_is_the_reference(name, dtype, shape, monkeypatch):
    """The quadratic plan is held against the reference elsewhere."""
    if shape.strided:  # out is, its gradient is not: a backward that is compiled ahead would be another
        monkeypatch.setattr(LinearEngine, "_warm", lambda *call: None)
    variant, op = ac.variants.get(name), ac.compile(name)
    exam = Exam(variant, shape, "cuda", dtype, SHAPES.index(shape), only_out=True)
    rows = [(plan, row) for plan in ("chunk", "recurrent") for row in exam.rows(functools.partial(op, plan=plan))]
    assert not [f"{plan} {r.shape} {r.check} repeatable={r.repeatable}" for plan, r in rows if not r.ok]


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


def by_sequence(run, tensors, inputs, ends):
    """Each sequence by itself, one behind the other."""
    parts = []
    for lo, hi in pairwise(ends):
        own = {n: x[:, :, lo:hi] if x.dim() > 2 else x for n, x in inputs.items()}
        parts.append(run(*(x[:, :, lo:hi] for x in tensors), **own))
    return torch.cat(parts, 2)


#: packed sequences are another cut, of which heads of 64 see all; with a decay a channel chunks have at most 64 tokens
CUTS = [
    *((64, chunk, packed) for chunk in (16, 32, 64, 128) for packed in (False, True)),
    *((128, chunk, False) for chunk in (64, 128)),
]
CUTS_OF_NAMES = [(name, *cut) for name in NAMES for cut in CUTS if name not in BY_CHANNEL or cut[1] <= 64]


@pytest.mark.parametrize(("name", "dim", "chunk", "packed"), CUTS_OF_NAMES)
def test_gradients_at_every_chunk_size(name, dim, chunk, packed):
    """Many segments, with a state from one to the next, held against both rules of `attncc.runtime.verify`.

    The keys have length 1. Features of such keys (1 + elu) are nearly all the same, and what dq of linear_attention is
    made of is their difference: with nothing but `out` rounded to bfloat16, and all else float64, dq is off by 1.4e-2
    of its RMS at D = 64 and by 2.1e-2 at D = 128; with nothing but the features rounded, by 1.5e-2 and 2.1e-2 (plain
    PyTorch's is off by 7.5e-2 and 0.12). A bound that does not ask what rounding costs in 16 bits would be a wrong one.
    Where a decay is a head's, its gradient is a sum over all pairs, which for a random cotangent is as good as 0: by
    luck it has an error of 1e-4 or of 6e-2 in 16 bits. A tenth of out in the cotangent keeps it from that.
    """
    length = 700
    ends = [0, 250, 251, 443, length] if packed else [0, length]
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, 4, length, dim, generator=generator, device="cuda").bfloat16() for _ in range(3))
    k = F.normalize(k.float(), dim=-1).bfloat16()
    inputs = gate_of(name, length, generator, dim)
    noise = torch.randn(1, 4, length, dim, generator=generator, device="cuda")
    out = by_sequence(functools.partial(ac.reference, name), (q, k, v), inputs, ends).float()
    share = 0.1 / out.square().mean().sqrt() if {"rates", "rate"} & set(inputs) else 0.0
    grad = (noise + share * out).bfloat16()

    def results(run, dtype=None):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v, *inputs.values())]
        out = run(leaves[:3], dict(zip(inputs, leaves[3:], strict=True)))
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))

    op = ac.compile(name, plan="chunk")
    options = {"chunk_size": chunk, "cu_seqlens": torch.tensor(ends, device="cuda") if packed else None}
    got, again = (results(lambda x, i: op(*x, **i, **options)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    exact = results(lambda x, i: by_sequence(functools.partial(ac.reference, name), x, i, ends), torch.float64)
    plain = results(lambda x, i: by_sequence(functools.partial(eager, name), x, i, ends))
    names = ("out", "dq", "dk", "dv", *(f"d{n}" for n in inputs))
    kinds = ("forward", *["gradient"] * (len(names) - 1))
    checks = [check(*x, dtype=torch.bfloat16) for x in zip(names, got, exact, plain, kinds, strict=True)]
    assert not [c for c in checks if not c.ok]


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


def test_default_rates_are_replayed():
    op, plain = ac.compile("retention", plan="chunk"), ac.compile("retention", plan="chunk")
    plain._calls = None
    for seed in range(4):
        generator = torch.Generator("cuda").manual_seed(seed)
        q, k, v = (torch.randn(1, 4, 300, 64, generator=generator, device="cuda").bfloat16() for _ in range(3))
        assert torch.equal(op(q, k, v), plain(q, k, v))
    assert any(op._calls._forwards._known.values())  # there is a recording


@pytest.mark.parametrize("learned", [False, True], ids=["constants", "learned"])
@pytest.mark.parametrize("name", ["linear_attention", "simple_gla", "gla", "rwkv6", "bonus", "gated_delta_net"])
def test_a_replay_is_the_call(name, learned):
    """The third call of a kind is the first that is replayed; other tensors each time, beside the dispatcher's way."""
    op, plain = (ac.compile(BONUS if name == "bonus" else name, plan="chunk") for _ in range(2))
    plain._calls = None
    for seed in range(4):
        generator = torch.Generator("cuda").manual_seed(seed)
        size = (1, 4, 300, 64)
        q, k, v, grad = (torch.randn(size, generator=generator, device="cuda").bfloat16() for _ in range(4))
        k = F.normalize(k.float(), dim=-1).bfloat16()
        inputs = gate_of("simple_gla" if name in ("bonus", "gated_delta_net") else name, 300, generator)
        if name == "bonus":
            inputs["rate"] = torch.rand(4, generator=generator, device="cuda")
        if name == "gated_delta_net":
            inputs["beta"] = torch.rand(1, 4, 300, generator=generator, device="cuda")
        first = torch.randn(1, 4, *op.engine.state_shape(64, 64), generator=generator, device="cuda")
        found = []
        for way in (op, plain):
            leaves = [x.clone().requires_grad_() for x in (q, k, v, first)]
            own = {n: x.clone().requires_grad_(learned) for n, x in inputs.items()}
            out, last = way(*leaves[:3], **own, initial_state=leaves[3], output_final_state=True)
            leaves += own.values() if learned else ()
            grads = torch.autograd.grad((out * grad).sum() + last.square().mean(), leaves)
            with torch.no_grad():
                stepped = way(q, k, v, **inputs, plan="recurrent", initial_state=first, output_final_state=True)
            found.append([out, last, *grads, *stepped])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


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
