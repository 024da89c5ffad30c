"""What runs the candidates on a GPU, as far as a CPU can tell."""

from dataclasses import replace

import pytest
import torch

import attncc as ac
from attncc.codegen.problem import problem_of
from attncc.runtime import fullsize, yardstick
from attncc.runtime.explain import sizes_of
from attncc.runtime.gputime import median_us
from attncc.runtime.launch import launches
from attncc.runtime.operands import Operands
from attncc.runtime.race import TrialError, race
from attncc.runtime.samples import Shape, sample_inputs
from attncc.runtime.shapes import bind
from attncc.runtime.specialize import signature
from attncc.runtime.tune import Track, gpu, sliced
from attncc.runtime.verify import eager
from attncc.schedule import KernelSchedule, Schedule
from attncc.schedule.cache import Cache
from attncc.schedule.choose import choose
from attncc.schedule.device import device_for
from attncc.schedule.problem import KERNELS

SMALL = KernelSchedule(32, 32, 1, 1)
SHAPE = Shape(1, 4, 2, 1, 100, 16, 16)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (Shape(4, 16, 4, 8192, 8192, 128, 64), Shape(2, 16, 4, 512, 512, 128, 64)),
        (Shape(1, 8, 8, 1, 65536, 128, 128), Shape(1, 2, 2, 1, 512, 128, 128)),
        (Shape(2, 28, 4, 100, 300, 64, 64), Shape(2, 14, 2, 100, 300, 64, 64)),
        (Shape(2, 32, 2, 6000, 6000, 64, 64), Shape(2, 32, 2, 496, 496, 64, 64)),
        (Shape(3, 4, 1, 2001, 4003, 64, 64), Shape(2, 4, 1, 250, 500, 64, 64)),
    ],
)
def test_a_slice_keeps_what_a_schedule_depends_on(shape, expected):
    assert sliced(shape) == expected


def test_a_slice_needs_no_backward_of_its_own():
    """Triton compiles a kernel anew for a size that is 1, or that is a multiple of 16 where another is not."""
    graph, whole = ac.variants.get("alibi").graph, Shape(4, 32, 8, 8192, 8192, 128, 128)
    found = []
    for shape in (whole, sliced(whole)):
        op = ac.AttentionOp(graph, Schedule(SMALL, KernelSchedule(64, 64, 4, 2), KernelSchedule(64, 64, 4, 2)))
        sample = sample_inputs(graph, replace(shape, q_len=1, kv_len=1), torch.bfloat16, "meta")
        q, k, v = (
            torch.empty(shape.batch, heads, shape.q_len, 128, dtype=torch.bfloat16, device="meta")
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )
        bound = bind(op.engine.graph, q, k, v, None, op.kernel_inputs(q, k, None, sample.inputs))
        prepared = op.engine.prepare_for(device_for("h100"), bound, torch.bfloat16)
        jobs = launches(lambda: op.engine.host_code(prepared, Operands(bound, q, k, v), True))  # noqa: B023
        found.append({job.kernel.__name__: signature(job.kernel, job.arguments, job.meta) for job in jobs})
    assert {"dkdv_kernel", "dq_kernel"} <= set(found[0])
    assert all(found[0][name] == found[1][name] for name in ("dkdv_kernel", "dq_kernel"))


@pytest.fixture
def track():
    """A track on the interpreter, which checks but does not time."""
    return Track(ac.variants.get("alibi").graph, SHAPE, "fp32", torch.device("cpu"), {})


@pytest.mark.parametrize("name", ["slots", "simple_gla"])
def test_what_is_made_before_the_kernels_is_bound(name):
    """The inputs that other ops and running sums make: a race compiles kernels from a call that has them all."""
    own = Track(ac.variants.get(name).graph, SHAPE, "fp32", torch.device("cpu"), {})
    op = ac.AttentionOp(own.graph)
    bound = own._call_of(op, own.sample)[1].bound
    assert {d.name for d in op.engine.graph.inputs} == set(bound.tensors) != set(own.sample.inputs)


def test_a_right_candidate_passes(track):
    track.check("forward", Schedule(KernelSchedule(16, 32, 1, 1, splits=3), SMALL, SMALL))


def test_a_wrong_one_does_not(track, monkeypatch):
    class Off:
        def __call__(self, q, k, v, outputs=("out",), **inputs):
            results = [torch.zeros_like(q), torch.zeros(q.shape[:3])]
            return results[0] if outputs == ("out",) else tuple(results)

    monkeypatch.setattr(track, "_op", lambda schedule: Off())
    with pytest.raises(TrialError, match="wrong: out, lse"):
        track.check("forward", Schedule(SMALL, SMALL, SMALL))


class Eager:
    """An op in plain PyTorch, which at full size is off by `factor` in the heads `where`."""

    def __init__(self, track, factor=1.0, where=slice(None)):
        self.heads = torch.ones(track.shape.heads, 1, 1)
        self.heads[where] = factor
        self.whole = track.qkv[0]

    def __call__(self, q, k, v, outputs=("out",), **inputs):
        found = eager("alibi", q, k, v, outputs=outputs, **inputs)
        return found * self.heads if q is self.whole else found

    def free_sums(self):
        return frozenset()


@pytest.mark.parametrize(("kernel", "said"), [("forward", "out"), ("dkdv", "dq, dk, dv")])
def test_one_that_is_wrong_at_full_size_alone_does_not(track, monkeypatch, kernel, said):
    """Even as the first: the reference is asked."""
    monkeypatch.setattr(track, "_op", lambda schedule: Eager(track, 1.5))
    with pytest.raises(TrialError, match=f"wrong at full size: {said}"):
        track.check(kernel, Schedule(SMALL, SMALL, SMALL))


@pytest.mark.parametrize("kernel", ["forward", "dkdv"])
def test_at_full_size_every_head_is_held_against_the_first_right_candidate(track, monkeypatch, kernel):
    monkeypatch.setattr(track, "_op", lambda schedule: Eager(track))
    track.check(kernel, Schedule(SMALL, SMALL, SMALL))
    track.check(kernel, Schedule(SMALL, SMALL, SMALL))
    monkeypatch.setattr(track, "_op", lambda schedule: Eager(track, 1.5, where=-1))
    with pytest.raises(TrialError, match="wrong at full size: "):
        track.check(kernel, Schedule(SMALL, SMALL, SMALL))


def test_where_the_reference_has_no_room_that_is_known(track, monkeypatch):
    monkeypatch.setattr(fullsize, "ROOM", 1000)
    assert not track.cramped
    track.check("forward", Schedule(SMALL, SMALL, SMALL))
    assert track.cramped


def test_a_reference_that_runs_out_of_memory_refuses_no_candidate(track, monkeypatch):
    def full(*args, **inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fullsize, "reference", full)
    track.check("forward", Schedule(SMALL, SMALL, SMALL))
    assert track.cramped


def test_a_formula_that_counts_the_heads_is_held_against_one_that_has_them_all():
    counts = ac.Variant(name="counts", score=lambda score, h, num_heads, kv_idx: score + (h + 1) / num_heads * kv_idx)
    Track(counts.graph, SHAPE, "fp32", torch.device("cpu"), {}).check("forward", Schedule(SMALL, SMALL, SMALL))


def test_v_may_be_part_of_k_at_full_size():
    own = Track(ac.variants.get("mla").graph, Shape(1, 2, 1, 5, 20, 16, 16), "fp32", torch.device("cpu"), {})
    own.check("dkdv", Schedule(SMALL, SMALL, SMALL))


def test_one_that_drifts_does_not(track, monkeypatch):
    op, calls = ac.compile("alibi"), []

    def drifts(q, k, v, **rest):
        calls.append(1)
        found = op(q, k, v, **rest)
        shifted = 1 + 1e-7 * len(calls)
        return found * shifted if isinstance(found, torch.Tensor) else tuple(x * shifted for x in found)

    monkeypatch.setattr(track, "_op", lambda schedule: drifts)
    with pytest.raises(TrialError, match="other bits each time"):
        track.check("forward", Schedule(SMALL, SMALL, SMALL))


def test_a_refusal_is_told_by_its_first_line(track):
    with pytest.raises(TrialError, match="splits the keys|cannot be dealt|UnsupportedError|ValueError"):
        track.check("forward", Schedule(KernelSchedule(48, 32, 1, 1), SMALL, SMALL))


def test_the_yardstick_says_what_it_measures():
    q, k, v = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16)
    shape = Shape(1, 4, 2, 8, 8, 16, 16)
    causal, alibi = (ac.variants.get(name).graph for name in ("causal", "alibi"))
    assert "cuDNN" in yardstick.contestants(causal, shape, (q, k, v))
    assert "cuDNN (plain softmax)" in yardstick.contestants(alibi, shape, (q, k, v))
    assert not yardstick.contestants(ac.variants.get("mla").graph, shape, (q, k))
    longer = Shape(1, 4, 2, 8, 16, 16, 16)
    assert "cuDNN (without the mask)" in yardstick.contestants(causal, longer, (q, k, v))
    found = yardstick.times(
        yardstick.contestants(causal, shape, (q, k, v)), (q, k, v), lambda call: call().sum(), False
    )
    assert found["cuDNN"] == (None, None)  # a CPU has no such kernel


@pytest.mark.gpu
def test_a_variant_is_tuned_on_this_gpu():
    from attncc.schedule.device import device_of

    variant = ac.variants.get("alibi")
    op = ac.compile(variant)
    device = device_of(gpu())
    problem = problem_of(op.plan, sizes_of(1024, heads=4, d_qk=64), "fp16", op.engine.precision(), {})
    track = Track(variant.graph, Shape(1, 4, 4, 1024, 1024, 64, 64), "fp16", gpu(), {})
    result = race(problem, device, KERNELS, track, Cache(), limit=2)
    assert all(result.best(kernel).us > 0 for kernel in KERNELS)
    assert choose(problem, device, Cache()) == result.schedule
    q = torch.randn(1, 4, 1024, 64, device="cuda", dtype=torch.float16)
    assert ac.compile(variant)(q, q, q).isfinite().all()
    assert all(us is None or us > 0 for times in track.against(True).values() for us in times)


@pytest.mark.gpu
def test_split_keys_are_tuned_on_this_gpu():
    from attncc.schedule.device import device_of

    variant, shape = ac.variants.get("softcap"), Shape(2, 16, 4, 1, 20000, 128, 128)
    op = ac.compile(variant)
    device = device_of(gpu())
    problem = problem_of(op.plan, sizes_of(1, 20000, 2, 16, 4), "bf16", op.engine.precision(), {})
    track = Track(variant.graph, shape, "bf16", gpu(), {})
    result = race(problem, device, ("forward",), track, Cache(), limit=6)
    assert result.schedule.forward.splits >= 1
    assert median_us(lambda: op(*(t.detach() for t in track.qkv)), 10) > 0
