"""Shipped variants against plain PyTorch written by hand: outputs, every gradient, and their kernels in 16 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import attncc as ac
from attncc.runtime.samples import Shape, sample_inputs
from attncc.runtime.verify import verify_variant
from tests.runtime.test_reference import FORMULAS
from tests.variants import test_pairs, test_reductions, test_similarity
from tests.variants.formulas import BY_HAND

#: those that tests/variants/test_reductions.py writes out, beside others that ship nowhere
REDUCTIONS = {"head_gates", "differential", "mla"}
SHAPES = (
    Shape(2, 4, 2, 7, 11, 6, 5, strided=True),
    Shape(1, 2, 1, 13, 4, 5, 8),  # with causal, nine queries stand before the first key
    Shape(2, 2, 2, 1, 9, 8, 4),
)


def test_every_variant_has_an_oracle_that_is_not_ours():
    oracles = {*FORMULAS, *test_similarity.BY_HAND, *test_pairs.BY_HAND, *BY_HAND, *REDUCTIONS}
    assert oracles == set(ac.variants.names())
    assert all(f'"{name}"' in Path(test_reductions.__file__).read_text() for name in REDUCTIONS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BY_HAND)
def test_the_reference_is_the_formula_by_hand(name, shape):
    variant = ac.variants.get(name)
    sample = sample_inputs(variant.graph, shape, torch.float64, seed=5)
    found = {"q": sample.q, "k": sample.k, "v": sample.v, **sample.inputs}
    found = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in found.items()}
    learned = ("q", "k", "v", *(d.name for d in variant.graph.inputs if d.grad))
    leaves = {n: found[n].requires_grad_() for n in learned}
    q, k, v = (leaves[n] for n in "qkv")
    inputs = {n: x for n, x in found.items() if n not in "qkv"}
    got = ac.reference(variant, q, k, v, **inputs)
    group = q.shape[1] // k.shape[1]
    expected = BY_HAND[name](q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), **inputs)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)
    assert not got.isnan().any()
    cotangent = torch.randn_like(got)
    ours, theirs = (
        torch.autograd.grad(x, tuple(leaves.values()), cotangent, materialize_grads=True) for x in (got, expected)
    )
    for leaf, a, b in zip(leaves, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda text, leaf=leaf: f"d{leaf}: {text}")


@pytest.mark.parametrize("name", BY_HAND)
def test_kernels_in_16_bits(name):
    """Grouped heads, odd lengths, rows that see nothing; float32 is tests/runtime/test_op.py's."""
    shape = Shape(1, 4, 2, 27, 19, 24, 16, strided=True)
    rows = verify_variant(ac.variants.get(name), dtype=torch.float16, shapes=[shape])
    assert [f"{r.shape} {r.check} repeatable={r.repeatable}" for r in rows if not r.ok] == []
