"""The Gluon kernels on a Hopper GPU: values, the same bits where they are promised, and the ways back to Triton."""

from functools import partial

import pytest
import torch

import attncc as ac
from attncc.runtime.reference import reference
from attncc.runtime.samples import Shape, sample_inputs
from attncc.runtime.verify import check, eager

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
)

SHAPES = (
    Shape(2, 4, 2, 300, 517, 64, 64),
    Shape(1, 2, 1, 129, 70, 64, 64, strided=True),
    Shape(1, 2, 2, 640, 640, 64, 64, broadcast=("b", "h")),
)
DIMS = ((128, 64), (96, 128), (80, 80), (192, 128), (256, 256), (128, 128))


def backends(op):
    return {prepared.schedule.forward.backend for prepared in op.engine._prepared.values()}


def failures(name, shape, dtype, op):
    sample = sample_inputs(ac.variants.get(name).graph, shape, dtype, "cuda")
    outputs = ("out", "lse") if op.plan.has_lse else ("out",)
    exact_inputs = {
        n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in sample.inputs.items()
    }
    qkv = (sample.q, sample.k, sample.v)
    with torch.no_grad():
        got, *again = (op(*qkv, outputs=outputs, **sample.inputs) for _ in range(4))
        exact = reference(name, *(x.double() for x in qkv), outputs=outputs, **exact_inputs)
        plain = eager(name, *qkv, outputs=outputs, **sample.inputs)
    found = []
    for i, output in enumerate(outputs):
        results = [x[i] if isinstance(x, tuple) else x for x in (got, exact, plain)]
        found.append(check(output, *results, dtype=dtype))
        if not all(torch.equal(results[0], x[i] if isinstance(x, tuple) else x) for x in again):
            found.append(f"{output} differs between calls")
    return [f for f in found if isinstance(f, str) or not f.ok]


@pytest.mark.parametrize("name", ac.variants.names())
def test_shipped_variants(name, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    op = ac.compile(name, backend="gluon")
    for shape in SHAPES:
        assert not failures(name, shape, torch.bfloat16, op)
    assert backends(op) == {"gluon"}


@pytest.mark.parametrize("dims", DIMS)
def test_head_dimensions(dims):
    op = ac.compile("causal", backend="gluon")
    assert not failures("causal", Shape(2, 4, 2, 333, 517, *dims, strided=True), torch.float16, op)
    assert backends(op) == {"gluon"}


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
    for seed in range(3):
        torch.manual_seed(seed)
        q, k, v = (torch.randn(1, 4, 384, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        exact = reference("softcap", q.double(), k.double(), v.double())
        assert (op(q, k, v) - exact).abs().max() < 2e-2
    assert len(op.engine._recordings) == 1


BACKWARD_DIMS = ((64, 64), (96, 96), (128, 128), (80, 128), (128, 64))


def gradients(name, shape, dtype, op):
    """(found, exact, plain) of dq, dk, dv and the inputs' gradients for one random cotangent."""
    sample = sample_inputs(ac.variants.get(name).graph, shape, dtype, "cuda")
    graph = ac.variants.get(name).graph
    wanted = ["q", "k", "v", *(d.name for d in graph.inputs if d.grad)]
    torch.manual_seed(7)
    cotangent = torch.randn(shape.batch, shape.heads, shape.q_len, shape.d_v, device="cuda", dtype=dtype)
    found = []
    for attend, kind in ((op, dtype), (partial(reference, name), torch.float64), (partial(eager, name), dtype)):
        tensors = {"q": sample.q, "k": sample.k, "v": sample.v}
        tensors |= {n: x for n, x in sample.inputs.items() if isinstance(x, torch.Tensor)}
        wide = kind == torch.float64
        leaf = {}
        for n, x in tensors.items():
            x = x.detach().clone() if n in wanted else x.detach()
            leaf[n] = (x.double() if wide and x.is_floating_point() else x).requires_grad_(n in wanted)
        numbers = {n: x for n, x in sample.inputs.items() if not isinstance(x, torch.Tensor)}
        out = attend(**leaf, **numbers)
        found.append(
            torch.autograd.grad(out, [leaf[n] for n in wanted], cotangent.to(out.dtype), materialize_grads=True)
        )
    return wanted, *found


def wrong(name, shape, dtype, op):
    wanted, got, exact, plain = gradients(name, shape, dtype, op)
    checks = [
        check(f"d{n}", *results, "gradient", dtype=dtype) for n, *results in zip(wanted, got, exact, plain, strict=True)
    ]
    return [c for c in checks if not c.ok]


def backward_backends(op):
    return {prepared.schedule.dkdv.backend for prepared in op.engine._prepared.values()}


@pytest.mark.parametrize("name", ac.variants.names())
def test_backward_of_shipped_variants(name, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    op = ac.compile(name, backend="gluon")
    if not op.plan.facts.has_backward:
        pytest.skip("no backward")
    for shape in SHAPES:
        assert not wrong(name, shape, torch.bfloat16, op)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", BACKWARD_DIMS)
def test_backward_head_dimensions(dims, dtype):
    op = ac.compile("causal", backend="gluon")
    for group in (1, 3):
        assert not wrong("causal", Shape(2, 2 * group, 2, 333, 517, *dims, strided=True), dtype, op)
    assert backward_backends(op) == {"gluon"}


@pytest.mark.parametrize("mode", ["argument", "torch"])
def test_a_fixed_order_gives_the_same_bits_every_time(mode):
    op = ac.compile("causal", backend="gluon", deterministic=mode == "argument")
    torch.use_deterministic_algorithms(mode == "torch")
    try:
        shape = Shape(2, 8, 4, 1000, 1500, 128, 128)
        _, first, exact, plain = gradients("causal", shape, torch.bfloat16, op)
        assert all(check("d", *x, "gradient", dtype=torch.bfloat16).ok for x in zip(first, exact, plain, strict=True))
        for _ in range(4):
            _, again, _, _ = gradients("causal", shape, torch.bfloat16, op)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert backward_backends(op) == {"gluon"}


def test_dk_and_dv_have_the_same_bits_every_time():
    op = ac.compile("causal", backend="gluon")
    q, k, v = (torch.randn(2, 8, 2048, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    cotangent = torch.randn_like(q)
    found = [torch.autograd.grad(op(q, k, v), (q, k, v), cotangent) for _ in range(20)]
    for dq, dk, dv in found[1:]:
        assert torch.equal(dk, found[0][1])
        assert torch.equal(dv, found[0][2])
        assert (dq - found[0][0]).abs().max() < 1e-2


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
    op = ac.compile("alibi", backend="gluon")
    shape = Shape(1, 4, 2, 400, 400, 64, 64)
    for _ in range(4):
        assert not wrong("alibi", shape, torch.bfloat16, op)
