"""Calls by kind, from the op to the launch, on a machine with no GPU: nothing is compiled, and launches copy bytes."""

import ctypes
import sys

import pytest
import torch
from triton.backends.compiler import GPUTarget

import attncc as ac
from attncc.runtime import binaries, engine, kinds, launch, recordings, straight
from attncc.runtime.compiler import Binary
from attncc.schedule.device import device_for

SHAPE = (1, 2, 24, 16)


class Copies:
    """In a kernel's place: of the forward, the first bytes of q become those of out."""

    def __init__(self, image, name, warps, shared, device, early):
        self.name = name

    def ready(self, grid, addresses):
        def launched(stream):
            if self.name == "forward_kernel":
                q, _, _, out = (ctypes.c_uint64.from_address(a).value for a in addresses[:4])
                ctypes.memmove(out, q, 64)

        return launched


@pytest.fixture
def gpu(monkeypatch, own_cache):
    """A process that takes the CPU for an A100."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(engine, "device_of", lambda device: device_for("a100"))
    monkeypatch.setattr(launch, "Function", Copies)
    monkeypatch.setattr(launch, "current_target", lambda device: GPUTarget("cuda", 80, 32))
    monkeypatch.setattr(binaries, "compile_kernel", lambda kernel, *_: Binary(kernel.__name__, b"", 4, 0, 0))
    monkeypatch.setattr(straight, "_empty", lambda shape, stride, kind: torch.empty_strided(shape, stride, dtype=kind))
    for module in (kinds, recordings):
        monkeypatch.setattr(module, "capturing", lambda: False)


def drawn():
    return [torch.randn(SHAPE).half().requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("name", ["causal", "alibi"])
def test_the_third_call_of_a_kind_is_replayed_on_its_own_tensors(gpu, name):
    op = ac.compile(name, plan="parallel")
    slopes = {"slopes": torch.rand(2, requires_grad=True)} if name == "alibi" else {}
    for count in range(4):
        q, k, v = drawn()
        out = op(q, k, v, **slopes)
        assert torch.equal(out.flatten()[:32], q.flatten()[:32])
        assert len(op.kinds) == (count > 0)
        found = torch.autograd.grad(out, [q, k, v, *slopes.values()], torch.ones_like(out))
        assert [x.shape for x in found] == [x.shape for x in (q, k, v, *slopes.values())]
    with torch.no_grad():
        assert op(q, k, v, **slopes).grad_fn is None
    longer = torch.randn(1, 2, 25, 16).half()
    op(q, longer, longer, **slopes)
    assert len(op.kinds) == 1


def own_calls(run):
    """The functions of attncc's that a call enters, in order."""
    entered = []

    def note(frame, event, argument):
        if event == "call" and frame.f_globals.get("__name__", "").startswith("attncc."):
            entered.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return entered


def test_a_replayed_call_enters_few_functions(gpu):
    """A bound on its host time that no other process on the machine moves."""
    op, (q, k, v) = ac.compile("causal", plan="parallel"), drawn()
    for _ in range(3):
        op(q, k, v)
    entered = own_calls(lambda: op(q, k, v))
    assert entered[0] == "AttentionOp.__call__"
    assert "key_of" in entered
    assert len(entered) <= 16
