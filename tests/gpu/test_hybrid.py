"""Hybrids on a GPU: every part by the kernels that a GPU takes for it, in one call and in two that go on."""

import pytest
import torch

from attncc.runtime.verify import Shape, verify_variant
from tests.runtime.test_hybrid import HYBRIDS

SHAPES = (Shape(1, 4, 2, 391, 391, 128, 128, strided=True), Shape(2, 4, 4, 320, 320, 64, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_are_right(name, dtype):
    rows = verify_variant(HYBRIDS[name], "cuda", dtype, SHAPES)
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]
    assert any("two calls" in row.check.name for row in rows)
