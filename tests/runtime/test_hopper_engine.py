"""What an engine makes of calls on a Hopper GPU, without one: schedules, launches, and what those ask to compile."""

from dataclasses import replace

import pytest
import torch
from triton.backends.compiler import GPUTarget

import attncc as ac
from attncc.runtime import engine as engines
from attncc.runtime import launch
from attncc.runtime.compiler import Binary, compile_kernel
from attncc.runtime.operands import Operands
from attncc.runtime.shapes import bind
from attncc.runtime.specialize import signature
from attncc.schedule import device_for

MEASURED = replace(device_for("h100"), gluon=("forward", "dkdv"))


@pytest.fixture(autouse=True)
def an_h100(monkeypatch):
    monkeypatch.setattr(engines, "device_of", lambda device: MEASURED)


def tensors(length=256, d=64, heads=4, kv_heads=2):
    return [torch.empty(1, h, length, d, dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads)]


def prepared(op, qkv, boxed=True, **inputs):
    bound = bind(op.engine.graph, *qkv, None, inputs)
    return bound, op.engine.prepare_for(MEASURED, bound, torch.bfloat16, boxed=boxed, ordered=op.engine.ordered())


def launched(monkeypatch, op, qkv, **inputs):
    """The kernels of a forward and a backward in the order of their text, each with its arguments and constants: what
    takes longest to compile is begun first."""
    jobs = []
    monkeypatch.setattr(launch.Launcher, "begin", lambda self, kernel, *rest: jobs.append((kernel, *rest[:2])))
    bound, made = prepared(op, qkv, **inputs)
    op.engine.warm(made, Operands(bound, *qkv), backward=True)
    return sorted(jobs, key=lambda job: job[0].starting_line_number)


def names(jobs):
    return [kernel.__name__ for kernel, *_ in jobs]


def test_both_kernels_in_gluon_where_they_are_measured_and_tensors_fit():
    op, qkv = ac.compile("causal", plan="parallel"), tensors(4096)
    _, made = prepared(op, qkv)
    assert (made.schedule.forward.backend, made.schedule.dkdv.backend) == ("gluon", "gluon")
    assert made.meta["dkdv"]["SUM_DQ"]
    _, made = prepared(op, qkv, boxed=False)
    assert (made.schedule.forward.backend, made.schedule.dkdv.backend) == ("triton", "triton")
    _, made = prepared(ac.compile("causal", plan="parallel", backend="triton"), qkv)
    assert (made.schedule.forward.backend, made.schedule.dkdv.backend) == ("triton", "triton")


def test_a_schedule_with_a_gluon_backward_needs_tensors_that_it_can_copy():
    op = ac.compile("causal", plan="parallel", backend="gluon")
    _, made = prepared(op, tensors())
    fixed = ac.compile("causal", plan="parallel", schedule=made.schedule)
    with pytest.raises(ac.InputError, match="16 bytes"):
        prepared(fixed, tensors(), boxed=False)


def test_launches_of_a_backward_that_sums_dq(monkeypatch):
    jobs = launched(monkeypatch, ac.compile("causal", plan="parallel", backend="gluon"), tensors())
    assert names(jobs) == ["forward_kernel", "prepare_kernel", "dkdv_kernel", "finish_kernel"]


@pytest.mark.parametrize("mode", ["argument", "torch"])
def test_in_a_fixed_order_programs_take_turns(monkeypatch, mode):
    op = ac.compile("causal", plan="parallel", backend="gluon", deterministic=mode == "argument")
    torch.use_deterministic_algorithms(mode == "torch")
    try:
        jobs = launched(monkeypatch, op, tensors(d=128))
    finally:
        torch.use_deterministic_algorithms(False)
    assert names(jobs) == ["forward_kernel", "prepare_kernel", "dkdv_kernel", "finish_kernel"]
    assert jobs[2][2]["ORDERED"]
    assert op.free_sums() == frozenset()


def test_wide_heads_have_a_kernel_for_dq_and_no_sum_in_a_free_order(monkeypatch):
    op = ac.compile("sink", plan="parallel", backend="gluon")
    free, wanted = torch.rand(4), torch.rand(4, requires_grad=True)
    for sink, last in ((free, "dq_of_rows_kernel"), (wanted, "dq_kernel")):
        jobs = launched(monkeypatch, op, tensors(512, 256), sink=sink)
        assert names(jobs) == ["forward_kernel", "prepare_kernel", "dkdv_kernel", last]
    assert op.engine.free_sums() == frozenset()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("kv_heads", "splits"), [(2, 4), (8, 1)])
def test_the_heads_of_a_group_are_dealt_to_programs_whatever_the_order_of_sums(
    monkeypatch, deterministic, kv_heads, splits
):
    op = ac.compile("causal", plan="parallel", backend="gluon", deterministic=deterministic)
    jobs = launched(monkeypatch, op, tensors(4096, 128, heads=8, kv_heads=kv_heads))
    assert names(jobs) == ["forward_kernel", "prepare_kernel", "dkdv_kernel", "finish_kernel"]
    kernel, arguments, meta = jobs[2]
    assert (meta["SPLITS"], meta["ORDERED"]) == (splits, deterministic)
    key_sums = dict(zip(kernel.arg_names, arguments, strict=False))["KEY_SUMS_PTR"]
    assert key_sums.dtype == (torch.float32 if splits > 1 else torch.bfloat16)
    # whose turn it is to add to them: a number for each 64 keys of each key head, 0 before the first
    turns = kv_heads * 4096 // 64 if splits > 1 else 0
    assert jobs[1][1][-1] == turns
    assert not turns or turns in {x.numel() for x in arguments if isinstance(x, torch.Tensor)}


def test_so_have_gradients_of_what_a_row_reads(monkeypatch):
    op, qkv = ac.compile("alibi", plan="parallel", backend="gluon"), tensors()
    assert "finish_kernel" in names(launched(monkeypatch, op, qkv, slopes=torch.rand(4)))
    assert "dq_kernel" in names(launched(monkeypatch, op, qkv, slopes=torch.rand(4, requires_grad=True)))


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_gradient_of_a_bias_by_distance_has_a_kernel_where_the_order_of_sums_is_fixed(monkeypatch, deterministic):
    op = ac.compile("relative_bias", plan="parallel", backend="gluon", deterministic=deterministic)
    table, qkv = torch.rand(4, 511, requires_grad=True), tensors(d=128)
    jobs = launched(monkeypatch, op, qkv, table=table)
    assert ("dtable_0_kernel" in names(jobs)) == deterministic
    assert dict(zip(names(jobs), jobs, strict=True))["dkdv_kernel"][2]["WANT_DTABLE_0"] != deterministic
    op.engine.prepare(Operands(bind(op.engine.graph, *qkv, None, {"table": table}), *qkv))
    assert op.free_sums() == (set() if deterministic else {"dq", "dtable"})
    assert "dtable_0_kernel" not in names(launched(monkeypatch, op, qkv, table=table.detach()))


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_the_host_hands_over_compiles(monkeypatch, deterministic):
    op = ac.compile("causal", plan="parallel", backend="gluon", deterministic=deterministic)
    jobs = launched(monkeypatch, op, tensors(250, 96))
    kernel, arguments, meta = jobs[2]
    made = compile_kernel(kernel, signature(kernel, arguments, meta), GPUTarget("cuda", 90, 32))
    assert isinstance(made, Binary)
    assert made.warps == 16  # dQ has a warpgroup
    assert made.shared <= MEASURED.smem_per_block


@pytest.mark.parametrize(
    ("deterministic", "kv_heads", "free"), [(False, 4, {"dq"}), (False, 2, {"dq"}), (True, 2, set())]
)
def test_which_gradients_are_summed_in_a_free_order(deterministic, kv_heads, free):
    """That of q alone, also where so few key heads are shared out between programs."""
    op = ac.compile("causal", plan="parallel", backend="gluon", deterministic=deterministic)
    assert op.free_sums() == set()
    qkv = tensors(4096, kv_heads=kv_heads)
    op.engine.prepare(Operands(bind(op.engine.graph, *qkv, None, {}), *qkv))
    assert op.free_sums() == free
