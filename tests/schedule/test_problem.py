from __future__ import annotations

import pytest

from attncc.errors import InputError
from attncc.passes.work import LiveTiles
from attncc.schedule.problem import KernelSchedule, Schedule, head_chunks

from .problems import problem

KS = KernelSchedule(128, 64, 8, 3)


@pytest.mark.parametrize(
    ("dim", "chunks"),
    [
        (1, (16,)),
        (16, (16,)),
        (40, (32, 16)),
        (64, (64,)),
        (72, (64, 16)),
        (80, (64, 16)),
        (96, (64, 32)),
        (112, (128,)),
        (128, (128,)),
        (192, (128, 64)),
        (256, (256,)),
        (576, (256, 256, 64)),
    ],
)
def test_head_dimensions_are_cut_into_powers_of_two(dim, chunks):
    assert head_chunks(dim) == chunks


def test_every_head_dimension_is_covered():
    for dim in range(1, 600):
        chunks = head_chunks(dim)
        assert sum(chunks) >= dim
        assert sum(chunks) <= max(16, dim + dim // 4 + 15)
        assert all(chunk >= 16 and chunk & (chunk - 1) == 0 for chunk in chunks)


def test_a_head_dimension_of_zero_is_refused():
    with pytest.raises(InputError, match="at least 1"):
        head_chunks(0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "fp64"}, "dtype 'fp64'"),
        ({"precision": "fast"}, "precision 'fast'"),
        ({"heads": 6, "kv_heads": 4}, "6 query heads are no multiple of 4"),
        ({"d_qk": -1, "d_v": 64}, "d_qk is -1"),
    ],
)
def test_sizes_that_clash_are_an_input_error(wrong, message):
    with pytest.raises(InputError, match=message):
        problem(**wrong)


def test_schedules_travel_through_json():
    for schedule in (Schedule(KS, KS, KS), Schedule(KS, KS, KS, "tuned", pair=KernelSchedule(32, 32, 4, 1))):
        assert Schedule.from_json(schedule.to_json()) == schedule
    with pytest.raises(KeyError):
        Schedule(KS, KS, KS).of("pair")


@pytest.mark.parametrize(
    "change",
    [
        {"origin": "guess"},
        {"forward": None},
        {"dq": {"block_m": 64}},
        {"dkdv": {**KS.to_json(), "block_m": "64"}},
        {"dkdv": {**KS.to_json(), "num_warps": 0}},
        {"dkdv": {**KS.to_json(), "num_stages": True}},
        {"pair": [1, 2, 3, 4]},
        {"extra": 1},
    ],
)
def test_json_that_is_no_schedule_is_refused(change):
    with pytest.raises(ValueError, match="schedule"):
        Schedule.from_json({**Schedule(KS, KS, KS).to_json(), **change})


def test_schedules_read_well():
    assert str(KS) == "128x64, 8 warps, 3 stages"
    assert str(KernelSchedule(16, 16, 1, 1)) == "16x16, 1 warp, 1 stage"
    assert LiveTiles(full=3, mixed=2, total=9).live == 5
