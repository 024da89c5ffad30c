"""Where kernels stand: their work counted by hand, the roof above them, and what a race measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attncc.schedule import Cache, KernelSchedule, LiveTiles, Schedule, choose, device_for, schedule_key
from attncc.schedule.choose import sizes_of
from attncc.schedule.roofline import at_backward, backward_work, measured, predicted, roof_at, work_of

from .problems import full_live, problem

H100 = device_for("h100")
TILE = KernelSchedule(64, 64, 4, 2)
WORK = problem(batch=2, heads=8, kv_heads=4, length=1024, d_qk=64, d_v=32, live=full_live, digest="d" * 64)


def test_the_work_of_each_kernel_is_that_of_its_matmuls_and_operands():
    pairs, q, k = 2 * 8 * 1024 * 1024, 2 * 8 * 1024, 2 * 4 * 1024
    forward, dkdv, dq = (work_of(kernel, TILE, WORK) for kernel in ("forward", "dkdv", "dq"))
    assert forward.flops == 2 * pairs * (64 + 32)
    assert dkdv.flops == 2 * pairs * 2 * (64 + 32)
    assert dq.flops == 2 * pairs * (2 * 64 + 32)
    assert forward.bytes == 2 * (q * (64 + 32) + k * (64 + 32))
    whole = backward_work(TILE, WORK)
    assert whole.flops == 2 * pairs * (3 * 64 + 2 * 32)
    assert whole.bytes == 2 * (q * (2 * 64 + 32) + 2 * k * (64 + 32))


def test_a_tile_higher_than_the_queries_does_no_more_work():
    few = problem(batch=1, heads=32, kv_heads=8, length=1, kv_len=4096, live=full_live)
    whole, split = (work_of("forward", ks, few) for ks in (TILE, KernelSchedule(16, 64, 4, 2, splits=4)))
    assert whole == split
    assert split.flops == 2 * 32 * 4096 * 256


def test_query_heads_that_are_dealt_to_programs_do_no_more_work():
    """The splits of Gluon's backward: those of a split forward share their rows with other heads, these do not."""
    dealt = KernelSchedule(64, 128, 8, 2, "gluon", splits=2)
    assert backward_work(dealt, WORK) == backward_work(replace(dealt, splits=0), WORK)


def test_keys_that_no_query_sees_are_not_read():
    """As in decoding with a window of 256."""

    def window(q_len, kv_len):
        return lambda block_m, block_n: LiveTiles(full=256 // block_n, mixed=0, total=kv_len // block_n)

    last = problem(batch=1, heads=8, length=1, kv_len=65536, live=window)
    point = predicted("forward", choose(last, H100).forward, last, H100)
    assert work_of("forward", TILE, last).bytes == 2 * 8 * 128 * (2 * 256 + 2)
    assert work_of("dkdv", TILE, last).bytes == 2 * 8 * 128 * (2 * 256 + 2 * 65536 + 2)
    assert 0 < point.share < 1


def test_a_mask_that_hides_all_has_a_share_of_the_memorys_rate():
    hidden = problem(live=lambda q_len, kv_len: lambda block_m, block_n: LiveTiles(0, 0, 1))
    point = predicted("forward", TILE, hidden, H100)
    assert point.tflops == 0
    assert 0 < point.share < 1


def test_the_roof_is_the_lower_of_two_rates():
    assert roof_at(1.0, WORK, H100) == pytest.approx(3.352)
    assert roof_at(1e6, WORK, H100) == 989
    fp32 = problem(dtype="fp32")
    assert roof_at(1e6, fp32, H100) == pytest.approx(61.8)


@pytest.mark.parametrize("length", [1, 4096])
def test_no_prediction_is_above_the_roof(length):
    work = problem(batch=4, heads=32, kv_heads=8, length=length, kv_len=8192, live=full_live)
    schedule = choose(work, H100)
    for kernel in ("forward", "dkdv", "dq"):
        point = predicted(kernel, schedule.of(kernel), work, H100)
        assert 0 < point.share < 1
        assert point.share == pytest.approx(point.tflops / point.roof)
        assert all(rate >= point.tflops * 0.9 for rate in point.ceilings.values())


def test_what_a_race_measured_is_a_point_beside(tmp_path):
    cache, schedule = Cache(tmp_path), Schedule(TILE, TILE, TILE, "tuned", pair=TILE)
    us = {"forward": 100.0, "backward": 280.0}
    value = {"kind": "schedule", "schedule": schedule.to_json(), "sizes": sizes_of(WORK), "us": us}
    cache.put(schedule_key(WORK, H100), value)
    forward, backward = measured(schedule, WORK, H100, cache)
    assert forward.tflops == pytest.approx(work_of("forward", TILE, WORK).flops / 100 / 1e6)
    assert (backward.name, backward.us, backward.source) == ("backward", 280.0, "measured")
    assert backward == at_backward(280.0, schedule, WORK, H100)
    other = Schedule(KernelSchedule(32, 32, 4, 2), TILE, TILE, "tuned", pair=TILE)
    assert [p.name for p in measured(other, WORK, H100, cache)] == ["backward"]
    assert measured(schedule, problem(length=512, digest="d" * 64), H100, cache) == ()
