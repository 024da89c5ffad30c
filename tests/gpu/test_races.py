"""Races and what was never written: every family of kernels gives the same bits over many launches, in shared memory
and in tensors that were NaN before."""

import pytest
import torch

from tests.gpu.bits import other_bits
from tests.gpu.kernels import FAMILIES
from tests.gpu.shared_memory import fill_with_nan, nan_is_found

LAUNCHES = 30


@pytest.fixture(scope="module", autouse=True)
def gpu_can():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("shared memory is filled by a kernel for newer GPUs")


def poison(*like):
    """Leave NaN where the next tensors of these sizes will be."""
    held = [torch.full_like(t, float("nan")) for t in like if t.is_floating_point()]
    del held


@pytest.mark.parametrize("name", FAMILIES)
def test_many_launches_on_nan_give_the_same_bits(name):
    family = FAMILIES[name]
    if family.hopper and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper GPU")
    call = family.make()
    expected = call()
    assert not [n for n, x in expected.items() if x.isnan().any()]
    for _ in range(LAUNCHES):
        poison(*expected.values(), *expected.values())
        fill_with_nan()
        found = call()
        assert not other_bits(found, expected)


def test_nan_in_shared_memory_is_found():
    """Or the test above would see nothing. Kernels of other processes may come between now and then."""
    assert any(nan_is_found() for _ in range(20))
