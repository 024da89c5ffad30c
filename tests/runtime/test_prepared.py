"""A kernel that spills is not launched where another tiling is as good, without a GPU: what is compiled is made up."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import attncc as ac
from attncc.runtime import engine as engines
from attncc.runtime.operands import Operands
from attncc.runtime.shapes import bind
from attncc.schedule import Cache, choose, device_for
from attncc.schedule.spills import note_spills

A100 = device_for("a100")
MEASURED = replace(device_for("h100"), gluon=("forward", "dkdv"))
KERNELS = ("forward", "dkdv", "dq")


@pytest.fixture
def compiled(monkeypatch):
    """The schedules whose kernels were compiled, in order; `spills` says what those of one spill, by kernel."""
    found = SimpleNamespace(schedules=[], spills=lambda number, kernel: 0)

    def collect(run, device):
        found.schedules.append(run.args[0].schedule)  # of host_code(prepared, ...)
        number = len(found.schedules) - 1
        started = []
        for kernel in (*KERNELS, "cotangents"):
            future = Future()
            future.set_result(found.spills(number, kernel))
            started.append((f"{kernel}_kernel", future))
        return started

    monkeypatch.setattr(engines, "device_of", lambda device: A100)
    monkeypatch.setattr(engines, "collect", collect)
    monkeypatch.setattr("attncc.runtime.prepared.spilled_bytes", lambda count: count)
    return found


def ready(op, *kernels, wanted=None):
    q, k, v = (torch.empty(1, 2, 256, 64, dtype=torch.bfloat16) for _ in range(3))
    return op.engine.ready(kernels, Operands(bind(op.engine.graph, q, k, v, None, {}), q, k, v), True, wanted)


def first_choice(op):
    return ready(op).schedule


def test_a_kernel_that_spills_nothing_is_launched(compiled):
    op = ac.compile("causal", plan="parallel")
    assert ready(op, *KERNELS) is ready(op, *KERNELS)
    assert len(compiled.schedules) == 1


def test_the_next_tiling_is_taken_in_this_process_and_the_next(compiled):
    op = ac.compile("causal", plan="parallel")
    compiled.spills = lambda number, kernel: 64 if (number, kernel) == (0, "dkdv") else 0
    before = first_choice(op)
    assert ready(op, "forward").schedule == before  # nobody has asked for a backward
    after = ready(op, "dkdv", "dq").schedule
    assert after.dkdv != before.dkdv
    assert (after.forward, after.dq) == (before.forward, before.dq)
    assert ready(op, *KERNELS).schedule == after == first_choice(ac.compile("causal", plan="parallel"))
    problem, device = ready(op).chosen_for
    assert choose(problem, device, Cache()) == after  # what `attncc compile` and `explain` ask


def test_a_kernel_that_ran_stays_where_another_is_chosen_anew(compiled):
    """Or a second backward would follow a forward of other bits: another process may have noted what it spills."""
    op = ac.compile("causal", plan="parallel")
    compiled.spills = lambda number, kernel: 64 if (number, kernel) == (0, "dkdv") else 0
    before = ready(op, "forward")
    note_spills({("forward", before.schedule.forward): 64}, *before.chosen_for, Cache())
    after = ready(op, "dkdv", "dq").schedule
    assert after.dkdv != before.schedule.dkdv
    assert after.forward == ready(op, "forward").schedule.forward == before.schedule.forward
    assert first_choice(ac.compile("causal", plan="parallel")).forward != after.forward


def test_a_kernel_that_ran_stays_where_it_spills_in_another_call(compiled):
    """In one of which other gradients are wanted. The spill is noted for the next process."""
    op = ac.compile("causal", plan="parallel")
    before = ready(op, *KERNELS).schedule
    compiled.spills = lambda number, kernel: 64 if kernel == "dkdv" else 0
    assert ready(op, *KERNELS, wanted=("slopes",)).schedule == before == first_choice(op)
    assert first_choice(ac.compile("causal", plan="parallel")).dkdv != before.dkdv


def test_what_another_thread_chose_meanwhile_is_run(compiled, monkeypatch):
    """Two threads with one call: while one waits for the forward, the other finds that the backward spills."""
    op = ac.compile("causal", plan="parallel")
    compiled.spills = lambda number, kernel: 64 if (number, kernel) == (0, "dkdv") else 0
    before = ready(op)
    note_spills({("forward", before.schedule.forward): 64}, *before.chosen_for, Cache())
    looked = engines.spills_anew

    def waits(prepared, kernels, cache):
        monkeypatch.setattr(engines, "spills_anew", looked)
        ready(op, "dkdv", "dq")
        return looked(prepared, kernels, cache)

    monkeypatch.setattr(engines, "spills_anew", waits)
    ran = ready(op, "forward")
    assert ran is ready(op, *KERNELS)
    assert ran.schedule.forward != before.schedule.forward


def test_a_call_of_ordered_sums_leaves_the_others_alone(compiled, monkeypatch):
    monkeypatch.setattr(engines, "device_of", lambda device: MEASURED)
    free, fixed = (ac.compile("causal", plan="parallel", backend="gluon", deterministic=x) for x in (False, True))
    before = ready(free).schedule
    assert before.dkdv.backend == "gluon"
    compiled.spills = lambda number, kernel: 64 if (number, kernel) == (1, "dkdv") else 0
    assert ready(fixed, *KERNELS).schedule.dkdv != before.dkdv
    for op in (free, ac.compile("causal", plan="parallel", backend="gluon")):
        assert ready(op, *KERNELS).schedule == before


def test_a_companion_that_spills_is_a_reason_against_its_tiling(compiled):
    op = ac.compile("causal", plan="parallel")
    compiled.spills = lambda number, kernel: 16 if (number, kernel) == (0, "cotangents") else 0
    before, after = first_choice(op), ready(op, "dkdv", "dq").schedule
    assert after.dq != before.dq
    assert (after.forward, after.dkdv) == (before.forward, before.dkdv)


def test_where_all_spill_the_search_ends(compiled):
    op = ac.compile("causal", plan="parallel")
    compiled.spills = lambda number, kernel: 64
    chosen = ready(op, *KERNELS)
    assert 1 < len(compiled.schedules) < 12
    assert ready(op, *KERNELS) is chosen


def test_a_schedule_that_was_given_is_taken_as_it_is(compiled):
    given = first_choice(ac.compile("causal", plan="parallel"))
    compiled.spills = lambda number, kernel: 64
    op = ac.compile("causal", plan="parallel", schedule=given)
    assert ready(op, *KERNELS).schedule == given
    assert not Cache().list() or all(entry.kind != "spills" for entry in Cache().list())


def test_what_does_not_compile_is_left_to_its_launch(compiled, monkeypatch):
    def failed(run, device):
        future = Future()
        future.set_exception(RuntimeError("no"))
        return [(f"{kernel}_kernel", future) for kernel in KERNELS]

    monkeypatch.setattr(engines, "collect", failed)
    assert ready(ac.compile("causal", plan="parallel"), *KERNELS).schedule.origin == "model"
