"""When the keys of a row are dealt to several programs, and to how many."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attncc.schedule import Cache, KernelSchedule, Schedule, choose, device_for, ranked, schedule_key
from attncc.schedule.candidates import candidates
from attncc.schedule.choose import sizes_of
from attncc.schedule.decode import rounded_keys
from attncc.schedule.decode_cost import programs_per_sm
from attncc.schedule.device import INTERPRETER
from attncc.schedule.memory import shared_memory

from .problems import full_live, problem

H100 = device_for("h100")


def few(batch, keys, q_len=1, heads=32, kv_heads=8, **rest):
    """A problem with few queries, all of which see all keys."""
    found = problem(batch=batch, heads=heads, kv_heads=kv_heads, length=q_len, kv_len=keys, live=full_live, **rest)
    return found


@pytest.mark.parametrize(("batch", "keys"), [(1, 65536), (8, 8192), (64, 8192), (8, 65536)])
@pytest.mark.parametrize("device", ["h100", "a100", "rtx4090", "mi300x", "b200"])
def test_every_sm_has_work_and_no_part_is_empty(batch, keys, device):
    work, device = few(batch, keys), device_for(device)
    best = ranked("forward", work, device)[0][0]
    programs = batch * 8 * best.splits
    assert programs >= 0.8 * device.sms
    assert best.splits * best.block_n <= keys
    waves = programs / (device.sms * programs_per_sm(best, work, device))
    assert waves <= 1 or waves > 1.5  # never a full wave and a few programs behind it


def test_more_sequences_take_fewer_parts():
    splits = [ranked("forward", few(batch, 16384), H100)[0][0].splits for batch in (1, 4, 16, 128)]
    assert splits == sorted(splits, reverse=True)
    assert splits[0] > 8
    assert splits[-1] == 1


def test_the_model_prefers_splits_where_sms_would_idle_and_not_where_they_are_busy():
    long = problem(batch=1, heads=4, length=512, kv_len=65536, live=full_live)
    assert ranked("forward", long, H100)[0][0].splits > 1
    busy = problem(batch=8, heads=16, length=4096)
    assert not any(ks.splits for ks in candidates("forward", busy, H100))
    assert not any(ks.splits for kernel in ("dkdv", "dq") for ks in candidates(kernel, few(1, 65536), H100))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (80, 80), (256, 256)])
@pytest.mark.parametrize("device", ["h100", "rtx3090", "mi300x"])
def test_every_candidate_fits(device, dims, dtype):
    device, work = device_for(device), few(2, 8192, d_qk=dims[0], d_v=dims[1], dtype=dtype)
    found = candidates("forward", work, device)
    assert found
    for ks in found:
        assert ks.splits >= 1
        assert shared_memory("forward", ks, work, device) <= device.smem_per_block


def test_bytes_under_way_cover_the_memorys_latency():
    """At 3 TB/s an SM of the H100 takes in 23 bytes a nanosecond: under a microsecond's worth would starve it."""
    for batch, keys in ((1, 65536), (8, 8192), (64, 8192), (8, 65536)):
        work = few(batch, keys)
        ks = choose(work, H100).forward
        tile = ks.block_n * 2 * 128 * 2
        together = min(programs_per_sm(ks, work, H100), -(-batch * 8 * ks.splits // H100.sms))
        assert together * (ks.num_stages - 1) * tile >= 32 * 1024


def test_a_variant_of_several_passes_is_not_split():
    work = few(1, 65536)
    several = replace(work, costs=replace(work.costs, whole_rows="two passes"))
    assert not any(ks.splits for ks in candidates("forward", several, H100))


def test_heads_that_cannot_share_a_tile_are_programs_of_their_own():
    work = few(1, 8192)
    apart = replace(work, costs=replace(work.costs, packs_heads=False))
    together, alone = (ranked("forward", p, H100)[0][0] for p in (work, apart))
    assert together.splits > alone.splits


def test_the_interpreter_splits_what_has_few_rows():
    assert candidates("forward", few(1, 200), INTERPRETER)[0].splits > 1
    assert candidates("forward", problem(length=64), INTERPRETER)[0].splits == 0
    assert candidates("dq", few(1, 200), INTERPRETER)[0].splits == 0


def test_a_schedule_with_splits_survives_json():
    ks = KernelSchedule(16, 128, 4, 3, splits=12)
    assert KernelSchedule.from_json(ks.to_json()) == ks
    assert str(ks) == "16x128, 4 warps, 3 stages, 12 splits"
    assert "splits" not in KernelSchedule(64, 64, 4, 2).to_json()
    with pytest.raises(ValueError, match="positive integers"):
        KernelSchedule.from_json({**ks.to_json(), "splits": 0})


def test_a_tuned_number_of_splits_is_for_its_own_batch(tmp_path):
    cache, small = Cache(tmp_path), KernelSchedule(64, 64, 4, 2)
    measured = few(1, 65536, digest="d" * 64)
    forward = KernelSchedule(16, 128, 4, 3, splits=20)
    schedule = Schedule(forward, small, small, "tuned", pair=small)
    value = {"kind": "schedule", "schedule": schedule.to_json(), "sizes": sizes_of(measured)}
    cache.put(schedule_key(measured, H100), value)
    assert choose(measured, H100, cache).forward == forward
    assert choose(few(1, 65000, digest="d" * 64), H100, cache).forward == forward
    other = choose(few(16, 65536, digest="d" * 64), H100, cache).forward
    assert replace(other, splits=20) == forward
    assert other.splits < 20


def test_a_growing_number_of_keys_is_scheduled_a_few_times_an_octave():
    assert [rounded_keys(1, n) for n in (100, 257, 4096, 4097, 5120, 5121)] == [100, 320, 4096, 5120, 5120, 6144]
    assert rounded_keys(128, 5000) == 5000  # many queries are scheduled as they are
    assert len({rounded_keys(1, n) for n in range(4097, 8193)}) == 4
