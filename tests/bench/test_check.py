import math
from dataclasses import replace

import pytest
import torch

import attncc as ac
from attncc.runtime.verify import eager
from bench import area
from bench.case import Case, Shape
from bench.check import CheckFailedError, against_reference, numbers_heads, relative_rms, require, slice_inputs
from bench.dense_cases import ALIBI, DENSE
from bench.suites import variants


def test_relative_rms():
    expected = torch.tensor([3.0, 4.0])
    assert relative_rms(expected, expected) == 0
    assert math.isclose(relative_rms(expected + torch.tensor([0.0, 0.05]), expected), 0.01, rel_tol=1e-5)


def test_nan_never_passes():
    with pytest.raises(CheckFailedError, match="dq nan"):
        require({"out": 0.0, "dq": relative_rms(torch.tensor([float("nan")]), torch.ones(1))}, 1.0, "anything")


def test_zeros_are_expected_where_the_reference_is_zero():
    assert relative_rms(torch.ones(3), torch.zeros(3)) == 1.0
    assert relative_rms(torch.zeros(3), torch.zeros(3)) == 0.0


def test_inputs_are_cut_by_their_patterns():
    variant = ac.Variant(name="cut", score=ac.alibi() >> ac.bias(), mask=ac.causal & ac.document())
    inputs = {
        "slopes": torch.arange(8.0),
        "doc": torch.arange(3)[:, None].expand(3, 10),
        "bias": torch.arange(3 * 8 * 100.0).view(3, 8, 10, 10)[:1],  # the batch dimension is broadcast
    }
    cut = slice_inputs(variant, inputs, 2, slice(4, 6), slice(2, 3))
    assert cut["slopes"].tolist() == [4, 5]
    assert cut["doc"].tolist() == [[2] * 10]
    assert torch.equal(cut["bias"], inputs["bias"][:, 4:6])


def test_a_formula_that_numbers_heads_is_checked_at_the_first_ones():
    assert numbers_heads(ac.variants.get("split_heads"))
    assert not numbers_heads(ac.variants.get("alibi"))
    own = variants.case("split_heads")
    shape = Shape(b=2, h=4, hkv=2, m=40, d=16, dtype=torch.float32)
    doc = {"doc": (torch.arange(40) // 9).expand(2, 40).to(torch.int32)}
    found = against_reference(ac.compile(own.variant), replace(own, inputs=lambda *_: dict(doc)), shape, "cpu")
    assert found["out"] < 1e-5


def test_flops_of_equal_head_dimensions():
    shape = Shape(b=2, h=3, m=8, d=16)
    assert shape.flops(10, "forward") == 4 * 2 * 3 * 10 * 16
    assert shape.flops(10, "backward") == 2.5 * shape.flops(10, "forward")


def test_a_shape_fills_in_what_is_equal():
    shape = Shape(b=1, h=4, m=8, d=16)
    assert (shape.hkv, shape.n, shape.dv, shape.group) == (4, 8, 16, 1)
    assert Shape(b=1, h=4, m=8, d=16, hkv=2, n=9, dv=8).row()["N"] == 9


def test_cases_default_to_no_inputs():
    assert Case("full", ac.Variant(name="full"), area.full).inputs(Shape(b=1, h=1, m=1, d=16), "cpu") == {}


SMALL = Shape(b=2, h=4, hkv=2, m=40, d=16, dtype=torch.float32)


def plain(case):
    """Plain PyTorch in the place of an op."""
    return lambda *operands, **inputs: eager(case.variant, *operands, **inputs)


@pytest.mark.parametrize("case", [*DENSE, *map(variants.case, ac.variants.names())], ids=lambda case: case.name)
def test_a_right_op_passes(case):
    shape = variants.fitted(case.variant, SMALL)
    errors = against_reference(plain(case), case, shape, "cpu")
    assert set(errors) == {
        "out",
        "dq",
        "dk",
        *(() if shape.tied else ("dv",)),
        *(f"d{name}" for name in case.differentiable),
    }


def test_a_wrong_output_is_caught():
    with pytest.raises(CheckFailedError, match="out: largest error"):
        against_reference(lambda *qkv, **inputs: plain(ALIBI)(*qkv, **inputs) * 1.001, ALIBI, SMALL, "cpu")


@pytest.mark.parametrize("name", ["dq", "dk", "dv", "dslopes"])
def test_a_wrong_gradient_is_caught(name):
    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.001

    def op(q, k, v, slopes):
        given = {"dq": q, "dk": k, "dv": v, "dslopes": slopes}
        given[name] = Off.apply(given[name])
        return plain(ALIBI)(given["dq"], given["dk"], given["dv"], slopes=given["dslopes"])

    with pytest.raises(CheckFailedError, match=f"{name}: largest error"):
        against_reference(op, ALIBI, SMALL, "cpu")


def test_nan_in_one_element_is_caught():
    def op(*qkv, **inputs):
        out = plain(ALIBI)(*qkv, **inputs)
        return out.masked_fill(torch.arange(out.numel()).view_as(out) == out.numel() - 1, float("nan"))

    with pytest.raises(CheckFailedError, match="out"):
        against_reference(op, ALIBI, SMALL, "cpu")
