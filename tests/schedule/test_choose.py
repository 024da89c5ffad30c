from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest

from attncc import resources
from attncc.errors import AttnccWarning, ScheduleError
from attncc.schedule import Cache, KernelSchedule, Schedule, choose, device_for, device_names, schedule_key
from attncc.schedule.choose import facts_of, read_table, shipped_row, table_text
from attncc.schedule.device import INTERPRETER

from .problems import problem

# The package's own name `choose` is the function.
choose_module = importlib.import_module("attncc.schedule.choose")
#: with no Gluon kernels, so that tables of Triton ones are all there is
H100 = replace(device_for("h100"), gluon=())
SMALL = KernelSchedule(64, 64, 4, 2)
MEASURED = Schedule(SMALL, SMALL, SMALL, "tuned", pair=SMALL)
WORK = problem(digest="d" * 64)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path)


@pytest.fixture
def shelf(monkeypatch, tmp_path):
    """A shipped table of our own for the H100, and none for others: call it with rows."""

    def write(*rows):
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        table = tuple(read_table(tmp_path / "rows.json"))
        monkeypatch.setattr(choose_module, "_table", lambda device: table if device == "h100" else ())

    return write


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch):
    """The tables that attncc ships must not answer for the ones that a test writes."""
    monkeypatch.setattr(choose_module, "_table", lambda device: ())


def test_without_measurements_it_is_the_models():
    schedule = choose(WORK, H100)
    assert schedule.origin == "model"
    assert schedule.pair is not None


def test_a_cached_schedule_wins(cache):
    cache.put(schedule_key(WORK, H100), {"kind": "schedule", "schedule": MEASURED.to_json()})
    assert choose(WORK, H100, cache) == MEASURED
    assert choose(WORK, H100).origin == "model"


def test_a_cached_schedule_is_for_its_own_problem(cache):
    cache.put(schedule_key(WORK, H100), {"kind": "schedule", "schedule": MEASURED.to_json()})
    assert choose(problem(digest="e" * 64), H100, cache).origin == "model"
    assert choose(problem(digest=""), H100, cache).origin == "model"
    assert choose(problem(digest="d" * 64, d_qk=64), H100, cache).origin == "model"
    assert choose(WORK, device_for("h200"), cache).origin == "model"
    assert choose(problem(digest="d" * 64, length=4000), H100, cache) == MEASURED  # of the same bucket
    assert choose(problem(digest="d" * 64, length=4097), H100, cache).origin == "model"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"forward": 1}, "has exactly the fields"),
        (None, "has exactly the fields"),
        (Schedule(KernelSchedule(128, 128, 8, 4), SMALL, SMALL).to_json(), "takes 296,960 bytes of shared memory"),
        (Schedule(SMALL, KernelSchedule(64, 64, 8, 2, "gluon"), SMALL).to_json(), "the Gluon backward has no tiling"),
    ],
)
def test_an_unusable_cached_schedule_is_ignored_with_a_warning(cache, data, reason):
    cache.put(schedule_key(WORK, H100), {"kind": "schedule", "schedule": data})
    with pytest.warns(AttnccWarning, match=reason):
        assert choose(WORK, H100, cache).origin == "model"


def test_a_shipped_row_is_used_where_it_matches(shelf):
    wide = Schedule(KernelSchedule(128, 64, 8, 3), SMALL, SMALL)
    narrow = Schedule(KernelSchedule(128, 64, 4, 3), SMALL, SMALL)
    shelf(
        {"match": {"dtype": "bf16", "d_qk": 128}, "schedule": wide.to_json()},
        {"match": {"dtype": "bf16", "d_qk": 128, "d_v": 128, "kv_bucket": 4096}, "schedule": narrow.to_json()},
    )
    found = choose(problem(), H100)
    assert (found.origin, found.forward) == ("shipped", narrow.forward)
    assert found.pair is not None
    assert choose(problem(length=8192), H100).forward == wide.forward
    assert choose(problem("fp16"), H100).origin == "model"
    assert choose(problem(), device_for("a100")).origin == "model"


def test_a_measurement_of_ones_own_beats_a_shipped_one(shelf, cache):
    shelf({"match": {}, "schedule": Schedule(KernelSchedule(128, 64, 8, 3), SMALL, SMALL).to_json()})
    assert choose(WORK, H100, cache).origin == "shipped"
    cache.put(schedule_key(WORK, H100), {"kind": "schedule", "schedule": MEASURED.to_json()})
    assert choose(WORK, H100, cache) == MEASURED


@pytest.mark.parametrize("row", [{"match": {"speed": 1}, "schedule": MEASURED.to_json()}, {"match": {}}, 7])
def test_a_malformed_table_is_named(tmp_path, row):
    (tmp_path / "bad.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=r"bad\.json"):
        read_table(tmp_path / "bad.json")


def test_every_shipped_table_can_be_read():
    for path in (resources.path("schedules") / "tuned").glob("*/*.json"):
        assert path.parent.name in device_names()
        assert read_table(path)


def test_nothing_fits_is_said_at_once():
    with pytest.raises(ScheduleError, match="dkdv kernel does not fit"):
        choose(problem("fp32", 512), device_for("rtx4090"))


def test_the_interpreter_has_a_schedule():
    assert choose(problem(length=100), INTERPRETER).forward == KernelSchedule(32, 32, 1, 1)


@pytest.mark.parametrize("lengths", [{}, {"q_bucket": 4096, "kv_bucket": 4096}])
def test_a_row_that_names_lengths_is_of_a_race_of_both_backends(shelf, lengths):
    """There Triton's kernels stay where the model would take Gluon's; not in one whose kernels raced among Triton's."""
    h100 = device_for("h100")
    assert choose(WORK, h100).dkdv.backend == "gluon"
    match = {"digest": WORK.digest, "dtype": WORK.dtype, "d_qk": WORK.d_qk, "d_v": WORK.d_v, **lengths}
    shelf({"match": match, "schedule": MEASURED.to_json()})
    assert choose(WORK, h100).dkdv == (SMALL if lengths else choose(WORK, h100, backend="gluon").dkdv)
    assert choose(WORK, h100, backend="gluon").dkdv.backend == "gluon"


def test_what_was_tuned_becomes_a_row(shelf, cache):
    h100 = device_for("h100")
    trials = [{"kernel": kernel, "us": us} for kernel, us in (("forward", 100.0), ("dkdv", 300.0), ("dkdv", 290.0))]
    value = {"kind": "schedule", "schedule": MEASURED.to_json(), **facts_of(WORK, h100), "trials": trials}
    slower, faster = ({**value, "us": {"forward": 100.0, "backward": us}} for us in (299.0, 290.0))
    assert shipped_row(slower, least=0.02) is None
    row = shipped_row(faster, least=0.02)
    assert "precision" not in row["match"]
    (cache.directory / "rows.json").write_text(table_text([row, row]))
    assert read_table(cache.directory / "rows.json") == [row, row]
    shelf(row)
    assert choose(WORK, h100) == replace(MEASURED, origin="shipped")
    assert choose(replace(WORK, q_len=100), h100).origin == "model"
    assert shipped_row({**faster, "trials": trials[1:], "us": {"forward": 100.0}}, least=0.02)  # the first one failed
