import pytest
import torch

import attncc as ac
from bench import plain
from bench.case import Shape
from bench.suites import shelf, variants


def gradients(attend, operands, grad):
    out = attend(*operands)
    return [out, *torch.autograd.grad(out, operands, grad)]


@pytest.mark.parametrize("name", plain.WEIGHTS)
def test_plain_pytorch_is_the_variant(name):
    shape = Shape(b=1, h=2, m=40, d=16, dtype=torch.float64)
    operands = shape.tensors("cpu")
    grad = torch.randn_like(operands[0])
    case = variants.case(name)
    mine = gradients(lambda *o: ac.reference(case.variant, *o), operands, grad)
    # scores and weights are float32 there
    theirs = gradients(plain.attend(name, shape, "cpu"), operands, grad)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-4)


def test_differential_attention_is_two_calls(monkeypatch):
    from bench import peers

    monkeypatch.setattr(peers, "_compiled_flex", lambda: torch.nn.attention.flex_attention.flex_attention)
    masks = peers.create_block_mask
    monkeypatch.setattr(peers, "create_block_mask", lambda *a, device, **o: masks(*a, device="cpu", **o))
    shape = Shape(b=1, h=2, m=40, d=32, dtype=torch.float32)
    case = shelf.ENTRIES["differential"].case
    inputs = case.inputs(shape, "cpu")
    operands = [x.detach() for x in shape.tensors("cpu")]
    theirs = shelf.two_calls(case, shape, inputs)(*operands)
    mine = ac.reference(case.variant, *operands, **inputs)
    torch.testing.assert_close(mine, theirs.double(), atol=1e-5, rtol=1e-4)


def test_an_absorbed_call_is_two_matmuls(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    shape = Shape(b=2, h=3, hkv=1, m=1, n=20, d=24, dv=16, tied=True, dtype=torch.float32)
    q, k = (x.detach() for x in shape.tensors("cpu"))
    mine = ac.reference(ac.Variant(name="tied", value="k[:16]"), q, k)
    torch.testing.assert_close(mine, plain.latent(shape)(q, k).double(), atol=1e-5, rtol=1e-4)
