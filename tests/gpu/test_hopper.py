"""The Gluon forward on a Hopper GPU: values, the same bits every time, and the ways back to Triton."""

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
