"""Calls that are made again in the backward: their gradients, and what is left behind where one fails."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from attncc.runtime import recompute
from attncc.runtime.recompute import recomputed


def test_gradients_of_both_orders_and_one_more_call():
    calls = []

    def cube(x):
        calls.append(None)
        return x * x * x

    x = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(recomputed(cube, x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(first, 3 * x * x)
    assert torch.equal(second, 6 * x)
    assert len(calls) > 1


def test_a_call_that_fails_leaves_no_hooks(monkeypatch):
    """As in PyTorch before 2.13, whose hooks outlive an exception."""

    def careless(function, *args, **options):
        hooks = saved_tensors_hooks(lambda t: pytest.fail("a tensor of somebody else was caught"), lambda t: t)
        hooks.__enter__()
        result = function(*args)
        hooks.__exit__()
        return result

    def fails(x):
        raise MemoryError("no room")

    monkeypatch.setattr(recompute, "checkpoint", careless)
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(MemoryError, match="no room"):
        recomputed(fails, x)
    assert torch.autograd.grad(x.exp().sum(), x)[0].isfinite().all()
