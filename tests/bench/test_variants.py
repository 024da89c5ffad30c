import pytest
import torch

import attncc as ac
from attncc.runtime.reference import Dense
from attncc.runtime.shapes import REFERENCE_DTYPES, bind, value_of
from bench.case import Shape
from bench.dense_cases import DENSE
from bench.suites import variants
from bench.suites.variants import case, fitted


def visible_pairs(case, shape):
    """Pairs of one (batch, head) that the reference's own mask shows."""
    shape = fitted(case.variant, shape)
    q, k, *v = shape.tensors("cpu")
    v = value_of(case.variant.graph, k, *v or [None])
    inputs = case.inputs(shape, "cpu")
    bound = bind(case.variant.graph, q, k, v, None, inputs, REFERENCE_DTYPES)
    (graph,) = {part["mask"].expr: part for part in case.variant.graph.parts}.values()  # branches share their mask
    return len(Dense(graph, q.double(), k.double(), v.double(), bound, torch.float64).visible)


@pytest.fixture
def small(monkeypatch):
    """Constants at which a mask of a few dozen keys has an inside and an outside."""
    monkeypatch.setattr(variants, "PREFIX", 7)
    monkeypatch.setattr(variants, "DOCUMENT", 11)


@pytest.mark.parametrize("name", ac.variants.names())
def test_the_area_of_a_shipped_variant_is_exact(name, small):
    length = 1100 if name.endswith("window") else 40  # longer than the windows of 1024
    heads = 1 if name in variants.AREAS else variants.SHAPE.h  # of those that are counted, heads may differ
    pairs = visible_pairs(case(name), Shape(b=1, h=heads, m=length, d=16))
    assert case(name).area(length, length) == round(pairs / heads)


@pytest.mark.parametrize("dense", DENSE, ids=lambda case: case.name)
def test_the_area_of_a_dense_case_is_exact(dense):
    shape = Shape(b=1, h=1, m=1100, d=16)  # longer than the window and the document of 1024
    assert dense.area(1100, 1100) == visible_pairs(dense, shape)


@pytest.mark.parametrize("dense", [c for c in DENSE if c.flex.mask_mod], ids=lambda case: case.name)
def test_the_peer_has_the_same_mask(dense):
    shape = Shape(b=1, h=1, m=1100, d=16)
    mask_mod = dense.flex.mask_mod(shape, dense.inputs(shape, "cpu"))
    i, j = torch.arange(1100)[:, None], torch.arange(1100)
    assert int(mask_mod(0, 0, i, j).expand(1100, 1100).sum()) == dense.area(1100, 1100)


@pytest.mark.parametrize("name", ac.variants.names())
def test_inputs_fit_their_declarations(name):
    shape = Shape(b=2, h=4, m=24, d=16, dtype=torch.float16)
    shape = fitted(ac.variants.get(name), shape)
    made = case(name).inputs(shape, "cpu")
    assert set(made) == {decl.name for decl in case(name).variant.graph.inputs}
    out = ac.reference(case(name).variant, *shape.tensors("cpu"), **made)
    assert out.isfinite().all()
