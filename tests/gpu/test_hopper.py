"""The Gluon kernels on a Hopper GPU: values, the same bits where they are promised, and the ways back to Triton."""

import pytest
import torch

import attncc as ac
from attncc.runtime.reference import reference
from attncc.runtime.samples import Shape, sample_inputs
from attncc.runtime.verify import Exam
from tests.gpu.bits import other_bits
from tests.hopper_served import NO_BACKWARD, NO_FORWARD

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
)

#: one kernel of each kind serves both
SHAPES = (
    Shape(2, 4, 2, 300, 517, 64, 64, strided=True),
    Shape(2, 2, 1, 129, 70, 64, 64, broadcast=("b", "h")),
)
DIMS = ((128, 64), (96, 128), (80, 80), (192, 128), (256, 256), (128, 128))


def backends(op):
    return {prepared.schedule.forward.backend for prepared in op.engine._prepared.values()}


def backward_backends(op):
    return {prepared.schedule.dkdv.backend for prepared in op.engine._prepared.values()}


def named(gradients):
    return dict(zip(("dq", "dk", "dv"), gradients, strict=True))


def wrong(name, shape, dtype, op, **options):
    """What is too far from the reference, or differs between two calls where that is not said."""
    rows = Exam(ac.variants.get(name), shape, "cuda", dtype, **options).rows(op)
    return [r for r in rows if not r.ok]


@pytest.mark.parametrize("name", [name for name in ac.variants.names() if name not in NO_FORWARD])
def test_shipped_variants(name):
    op = ac.compile(name, backend="gluon", plan="parallel")
    for shape in SHAPES:
        assert not wrong(name, shape, torch.bfloat16, op)
    assert backends(op) == {"gluon"}
    assert backward_backends(op) == {"triton" if name in NO_BACKWARD else "gluon"}


@pytest.mark.parametrize("dims", DIMS)
def test_head_dimensions(dims):
    op = ac.compile("causal", backend="gluon")
    shape = Shape(2, 4, 2, 333, 517, *dims, strided=True)
    assert not wrong("causal", shape, torch.float16, op, gradients=False)
    assert backends(op) == {"gluon"}


#: of four heads: below all scores, among them, and above
SINKS = {"sink": torch.tensor([-40.0, 0.0, 6.0, 30.0])}
#: the same: none, some, and such as raise and lower scores by hundreds from tile to tile
SLOPES = {"slopes": torch.tensor([0.0, 0.01, 1.5, -1.5])}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        *(("full", {}), ("causal", {}), ("sliding_window", {"window": 200}), ("sink", SINKS)),
        *(("alibi", SLOPES), ("cog", {}), ("softcap", {})),
    ],
)
@pytest.mark.parametrize("d", [64, 128])
def test_a_maximum_that_lags(name, numbers, d, dtype):
    """Scores that grow with the key, that fall, that are large, and that are all far below 0: weights pass no limit."""
    torch.manual_seed(0)
    numbers = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in numbers.items()}
    op = ac.compile(name, backend="gluon", plan="parallel")
    slopes = torch.linspace(-6, 6, 700, device="cuda")[:, None]
    drawn = [torch.randn(1, 4, 700, d, device="cuda") for _ in range(3)]
    for scales in (slopes, -slopes, torch.tensor(12.0), torch.tensor(-9.0)):
        q, k, v = drawn
        q, k = (q.abs(), k.abs() * scales) if scales.ndim or scales < 0 else (q * scales, k)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        out, lse = op(q, k, v, outputs=("out", "lse"), **numbers)
        exact, expected = reference(name, q.double(), k.double(), v.double(), outputs=("out", "lse"), **numbers)
        assert (out - exact).norm() < 5e-3 * exact.norm()
        assert (lse - expected).abs().max() < 1e-4 * expected.abs().max()
    assert backends(op) == {"gluon"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [64, 96, 128, 256])
def test_a_score_of_0_has_no_sign(d, dtype):
    """Rows and keys of zeros: cog gives them weights and gradients of 0, and counts them in the row's sum."""
    torch.manual_seed(0)
    op = ac.compile("cog", backend="gluon", plan="parallel")
    drawn = [torch.randn(1, 2, 300, d, device="cuda", dtype=dtype) for _ in range(4)]
    drawn[0][:, :, ::3], drawn[1][:, :, ::2] = 0, 0
    found = [x.clone().requires_grad_() for x in drawn[:3]]
    exact = [x.double().requires_grad_() for x in drawn[:3]]
    out, expected = op(*found), reference("cog", *exact)
    grads = torch.autograd.grad(out, found, drawn[3]), torch.autograd.grad(expected, exact, drawn[3].double())
    assert not out[:, :, ::3].any()
    assert not grads[0][0][:, :, ::3].any()
    for x, y in zip((out, *grads[0]), (expected, *grads[1]), strict=True):
        assert (x - y).norm() < 8e-3 * y.norm()
    assert backends(op) == backward_backends(op) == {"gluon"}


def test_tensors_that_tma_cannot_copy_go_to_triton():
    op = ac.compile("causal", backend="gluon")
    odd = torch.randn(1, 2, 200, 72, device="cuda", dtype=torch.bfloat16)[..., 4:68]  # begins at 8 bytes
    wide = torch.randn(1, 1, 200, 64, device="cuda", dtype=torch.bfloat16).expand(1, 2, 200, 64)  # a stride of 0
    for q in (odd, wide, torch.randn(1, 2, 200, 64, device="cuda")):
        out = op(q, q, q)
        exact = reference("causal", q.double(), q.double(), q.double())
        assert (out - exact).abs().max() < 2e-2
    assert backends(op) == {"triton"}


def test_a_recorded_call_serves_other_tensors():
    op = ac.compile("softcap", backend="gluon")
    for seed in range(4):  # the second call is recorded
        torch.manual_seed(seed)
        q, k, v = (torch.randn(1, 4, 384, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        exact = reference("softcap", q.double(), k.double(), v.double())
        assert (op(q, k, v) - exact).abs().max() < 2e-2
    assert len(op.kinds) == 1


BACKWARD_DIMS = (
    *((64, 64), (96, 96), (128, 128), (80, 128), (128, 64)),
    *((192, 128), (128, 192), (160, 160), (256, 256), (64, 256), (192, 160)),
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", BACKWARD_DIMS)
def test_backward_head_dimensions(dims, dtype):
    op = ac.compile("causal", backend="gluon")
    for group in (1, 3):
        assert not wrong("causal", Shape(2, 2 * group, 2, 333, 517, *dims, strided=True), dtype, op)
    assert backward_backends(op) == {"gluon"}


@pytest.mark.parametrize("name", ["full", "alibi", "document", "softcap", "cog", "sigmoid", "taylor", "qk_temperature"])
def test_backward_of_wide_heads(name):
    """Two warpgroups with both gradients of keys of their own, one matmul after the other."""
    op = ac.compile(name, backend="gluon", plan="parallel")
    assert not wrong(name, Shape(2, 4, 2, 333, 517, 192, 128, strided=True), torch.bfloat16, op)
    assert backward_backends(op) == {"gluon"}


@pytest.mark.parametrize("mode", ["argument", "torch"])
def test_a_fixed_order_gives_the_same_bits_every_time(mode):
    op = ac.compile("causal", backend="gluon", deterministic=mode == "argument")
    torch.use_deterministic_algorithms(mode == "torch")
    try:
        rows = Exam(ac.variants.get("causal"), Shape(2, 8, 4, 1000, 1500, 128, 128), "cuda", torch.bfloat16).rows(op)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not [r for r in rows if not (r.ok and r.repeatable)]
    assert backward_backends(op) == {"gluon"}


@pytest.mark.parametrize("name", ["full", "causal", "sliding_window", "document", "prefix_lm"])
def test_programs_take_turns_at_dq(name):
    """Long enough that programs of several waves wait for each other."""
    shape = Shape(2, 6, 2, 3000, 3072, 128, 128)
    sample = sample_inputs(ac.variants.get(name).graph, shape, torch.bfloat16, "cuda")
    qkv = [t.requires_grad_() for t in (sample.q, sample.k, sample.v)]
    free, fixed = (ac.compile(name, backend="gluon", deterministic=fixed) for fixed in (False, True))
    cotangent = torch.randn_like(free(*qkv, **sample.inputs))

    def results(op):
        out = op(*qkv, **sample.inputs)
        return {"out": out.detach(), **named(torch.autograd.grad(out, qkv, cotangent))}

    first, about = results(fixed), results(free)
    # all calls: one that differs from all others, and a first that does, have different causes
    unlike = {call: other_bits(results(fixed), first) for call in range(10)}
    said = [f"call {call}: {what or 'the same'}" for call, what in unlike.items()]
    taken = [str(prepared.schedule) for prepared in fixed.engine._prepared.values()]
    assert not any(unlike.values()), "\n".join((*taken, *said))
    assert fixed.free_sums() == frozenset()
    for gradient in ("dq", "dk", "dv"):
        one, other = first[gradient], about[gradient]
        assert (one - other).float().square().mean() < 1e-5 * other.float().square().mean()


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_turns_begin_anew_in_every_replay_of_a_cuda_graph(kv_heads):
    op = ac.compile("causal", backend="gluon", deterministic=True)
    qkv = [
        torch.randn(1, h, 1024, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for h in (4, kv_heads, kv_heads)
    ]
    cotangent = torch.randn_like(qkv[0])
    expected = torch.autograd.grad(op(*qkv), qkv, cotangent)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(op(*qkv), qkv, cotangent)
    for _ in range(3):
        for gradient in found:
            gradient.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert not other_bits(named(found), named(expected))


def test_dk_and_dv_have_the_same_bits_every_time():
    op = ac.compile("causal", backend="gluon")
    q, k, v = (torch.randn(2, 8, 2048, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    cotangent = torch.randn_like(q)
    found = [torch.autograd.grad(op(q, k, v), (q, k, v), cotangent) for _ in range(20)]
    first = named(found[0])
    for gradients in found[1:]:
        dq, dk, dv = gradients
        assert not other_bits({"dk": dk, "dv": dv}, first)
        assert (dq - first["dq"]).abs().max() < 1e-2


def test_backward_through_lse_and_under_cuda_graphs_and_compile():
    op = ac.compile("causal", backend="gluon")
    q, k, v = (torch.randn(1, 4, 512, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def step(a, b, c):
        out, lse = op(a, b, c, outputs=("out", "lse"))
        return torch.autograd.grad(out.float().square().sum() + lse.sum(), (a, b, c))

    eagerly = step(q, k, v)
    compiled = torch.compile(step, fullgraph=False)(q, k, v)
    for a, b in zip(eagerly, compiled, strict=True):
        assert (a - b).abs().max() < 2e-2 * a.abs().max()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(q, k, v)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(q, k, v)
    graph.replay()
    for a, b in zip(eagerly, captured, strict=True):
        assert (a - b).abs().max() < 2e-2 * a.abs().max()


def test_a_recorded_backward_serves_other_tensors():
    op, alibi = ac.compile("alibi", backend="gluon"), ac.variants.get("alibi")
    shape = Shape(1, 4, 2, 400, 400, 64, 64)
    for seed in range(3):
        assert not [r for r in Exam(alibi, shape, "cuda", torch.bfloat16, seed).rows(op) if not r.check.ok]
    assert len(op.kinds._backwards) == 1
