"""The backward that loads its tiles through descriptors, here in Triton's interpreter, against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import attncc as ac
from attncc.codegen.module import load_source
from attncc.codegen.plan import Plan
from attncc.codegen.render import render
from attncc.runtime import engine
from attncc.runtime.modules import Modules
from attncc.runtime.samples import Shape
from attncc.runtime.verify import verify_variant
from attncc.schedule.device import device_for, loads_boxes

ODD = Shape(2, 2, 1, 37, 21, 16, 16, strided=True)
CHUNKED = Shape(1, 2, 2, 17, 33, 72, 80)


@pytest.fixture
def boxed(monkeypatch):
    """Every call that a GPU with a tensor memory accelerator would serve so; the sources of those that were."""
    hopper = device_for("sm_90")
    monkeypatch.setattr(engine, "loads_boxes", lambda device, dtype, *dims: loads_boxes(hopper, "fp16", *dims))
    made = []
    load = Modules.load

    def noted(self, features, interpreted=False):
        made.append(features.tma)
        return load(self, features, interpreted)

    monkeypatch.setattr(Modules, "load", noted)
    return made


def failures(rows):
    return [f"{r.shape} {r.check} repeatable={r.repeatable}" for r in rows if not r.ok]


@pytest.mark.parametrize("name", ["causal", "document", "t5_bias", "sink", "sigmoid", "cog", "entmax15"])
@pytest.mark.parametrize("shape", [ODD, CHUNKED], ids=str)
def test_they_agree_with_the_reference(boxed, name, shape):
    assert failures(verify_variant(ac.variants.get(name), dtype=torch.float16, shapes=[shape])) == []
    assert boxed
    assert all(boxed)


def tensors(d=16, dtype=torch.float16):
    return [torch.randn(1, 2, 20, d, dtype=dtype, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def misaligned(x):
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)
    return flat[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize(
    "change",
    [
        misaligned,
        lambda x: torch.cat([x, x[..., :1]], -1)[..., :-1],  # rows 34 bytes apart
        lambda x: x[:, :1].expand(-1, 2, -1, -1),  # one head, repeated
    ],
    ids=["misaligned", "rows at odd steps", "repeated head"],
)
def test_what_descriptors_cannot_address_is_loaded_by_pointer(boxed, change):
    q, k, v = tensors()
    k = change(k)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    op = ac.compile("causal")
    op(*leaves).sum().backward()
    assert boxed
    assert not any(boxed)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    ac.reference("causal", *exact).sum().backward()
    for leaf, right in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.double(), right.grad, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("d", [16, 24])
def test_an_incoming_gradient_of_any_layout_is_taken(boxed, d):
    q, k, v = (x.requires_grad_() for x in tensors(d))
    op = ac.compile("causal")
    expanded = torch.autograd.grad(op(q, k, v).sum(), (q, k, v))  # all strides 0
    whole = torch.autograd.grad(op(q, k, v), (q, k, v), torch.ones_like(v))
    assert all(boxed)
    for a, b in zip(expanded, whole, strict=True):
        assert torch.equal(a, b)


zeros = partial(torch.zeros, dtype=torch.float16)
MAPS = {
    "as it is": (True, lambda: zeros(2, 3, 20, 24)),
    "one for all sequences": (True, lambda: zeros(1, 3, 20, 24)),
    "repeated": (True, lambda: zeros(1, 3, 20, 24).expand(2, -1, -1, -1)),
    "a part of longer rows": (True, lambda: zeros(2, 3, 20, 32)[..., :20]),
    "odd rows": (False, lambda: zeros(2, 3, 20, 21)),
    "transposed": (False, lambda: zeros(2, 3, 24, 24).mT),
    "one row for all queries": (False, lambda: zeros(2, 3, 1, 24).expand(-1, -1, 20, -1)),
    "from an odd place on": (False, lambda: zeros(2, 3, 20, 24)[..., 1:]),
}


@pytest.mark.parametrize("name", MAPS)
def test_which_maps_come_as_boxes(name):
    whole, make = MAPS[name]
    module = load_source(render(Plan(ac.variants.get("dense_bias").graph), 16, 16, True, tma=True), "maps")
    assert module._map_boxes(make(), 16, 16)[1] == whole
    assert not module._map_boxes(make().float(), 16, 16)[1]


@pytest.mark.parametrize("broadcast", [(), ("b",), ("h",)])
@pytest.mark.parametrize("keys", [24, 21])
def test_maps_as_boxes_and_by_pointers(boxed, broadcast, keys):
    shape = Shape(2, 4, 2, 37, keys, 16, 16, broadcast=broadcast)
    assert failures(verify_variant(ac.variants.get("dense_bias"), dtype=torch.float16, shapes=[shape])) == []
    assert all(boxed)


def test_only_16_bit_rows_of_16_byte_multiples():
    h100 = device_for("h100")
    assert loads_boxes(h100, "bf16", 128, 72)
    assert not loads_boxes(h100, "fp32", 128, 128)
    assert not loads_boxes(h100, "bf16", 100, 128)
    assert not loads_boxes(device_for("a100"), "bf16", 128, 128)


@pytest.mark.parametrize("shared_key", [False, True])
def test_branches_have_their_own_columns(boxed, shared_key):
    """Boxes of a branch must hold nothing of the next: with 24 columns each, the second piece would."""
    variant = ac.Variant(
        branches=2, mask=ac.causal, reduction=lambda weight, row, v_vec: row.sum((weight[0] - weight[1] / 2) * v_vec)
    )
    for dim, whole in ((16, True), (24, False)):
        boxed.clear()
        shape = Shape(1, 2, 1, 37, 45, dim, 32, shared_key=shared_key)
        assert failures(verify_variant(variant, dtype=torch.float16, shapes=[shape])) == []
        assert boxed
        assert all(made == whole for made in boxed)
