"""The Gluon backward where a program has block after block of keys, dealt by a counter: many blocks a program, launches
that overlap, and a counter that begins anew."""

import pytest
import torch

import attncc as ac
from attncc.runtime.samples import Shape, sample_inputs
from attncc.runtime.verify import Exam
from attncc.schedule.hopper_backward import deals
from tests.gpu.shared_memory import fill_with_nan

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
)

#: what is cut, what is not; one slope, two; a third warpgroup for dQ, and a warp that adds it; a block of a tile or two
CASES = (
    ("full", Shape(2, 44, 44, 200, 1100, 64, 64, strided=True)),
    ("causal", Shape(2, 44, 44, 1000, 600, 128, 128)),
    ("causal", Shape(1, 61, 61, 60, 1500, 64, 64)),
    ("sliding_window", Shape(3, 37, 37, 600, 600, 128, 128, strided=True)),
    ("document", Shape(3, 37, 37, 517, 517, 128, 128)),
    ("document", Shape(2, 44, 44, 700, 700, 64, 64)),
    ("softcap", Shape(1, 60, 60, 300, 1100, 128, 128)),
    ("sigmoid", Shape(2, 44, 44, 200, 1000, 64, 64)),
    ("cog", Shape(2, 44, 44, 200, 900, 112, 112)),
    ("prefix_lm", Shape(2, 44, 44, 700, 700, 128, 128)),
)


def dealt(op):
    """Have the calls of `op` had programs with block after block?"""
    chosen = [(p.schedule.dkdv, p.chosen_for) for p in op.engine._prepared.values()]
    return bool(chosen) and all(found is not None and deals(tiling, found[0]) for tiling, found in chosen)


@pytest.mark.parametrize(("name", "shape"), CASES, ids=lambda x: str(x))
def test_many_blocks_a_program(name, shape):
    op = ac.compile(name, backend="gluon")
    assert not [r for r in Exam(ac.variants.get(name), shape, "cuda", torch.bfloat16).rows(op) if not r.ok]
    assert dealt(op)


def made(name, shape):
    """q, k and v, a call that computes their gradients, and what that is."""
    sample = sample_inputs(ac.variants.get(name).graph, shape, torch.bfloat16, "cuda")
    qkv = [t.requires_grad_() for t in (sample.q, sample.k, sample.v)]
    op = ac.compile(name, backend="gluon")
    cotangent = torch.randn_like(op(*qkv, **sample.inputs))

    def gradients():
        return torch.autograd.grad(op(*qkv, **sample.inputs), qkv, cotangent)

    expected = gradients()
    assert dealt(op)
    return gradients, expected


def same(found, expected):
    """dK and dV in every bit, dQ but for the order of its sums."""
    (dq, dk, dv), (dq_before, dk_before, dv_before) = found, expected
    near = (dq - dq_before).float().square().mean() < 1e-5 * dq_before.float().square().mean()
    return torch.equal(dk, dk_before) and torch.equal(dv, dv_before) and bool(near)


FAST = (("causal", 64), ("causal", 80), ("document", 128), ("full", 128))


@pytest.mark.parametrize(("name", "d"), FAST)
def test_many_launches_on_nan_give_the_same(name, d):
    gradients, expected = made(name, Shape(2, 16, 16, 1000, 1000, d, d))
    for _ in range(30):
        held = [torch.full_like(t, float("nan")) for t in (*expected, *expected)]
        del held
        fill_with_nan()
        assert same(gradients(), expected)


def test_two_streams_have_counters_of_their_own():
    gradients, expected = made("causal", Shape(2, 16, 16, 1500, 1500, 128, 128))
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(gradients())
    torch.cuda.synchronize()
    assert all(same(each, expected) for each in found)


def test_blocks_are_dealt_anew_in_every_replay_of_a_cuda_graph():
    gradients, expected = made("causal", Shape(2, 16, 16, 1500, 1500, 128, 128))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients()
    for _ in range(3):
        for gradient in found:
            gradient.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert same(found, expected)
