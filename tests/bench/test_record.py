import json

import pytest

from bench.record import Results, environment, load, slug


@pytest.fixture
def results(tmp_path):
    return Results("dense", tmp_path / "gpu" / "dense.json", meta={"gpu": "Some GPU", "date": "2026-01-01"})


def test_a_gpu_name_becomes_a_folder():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert slug("AMD Instinct MI300X (gfx942)") == "amd-instinct-mi300x-gfx942"


def test_an_empty_file_is_valid_json(results):
    results.write()
    assert load(results.path) == {"suite": "dense", "gpu": "Some GPU", "date": "2026-01-01", "rows": []}


def test_every_row_is_on_disk_as_soon_as_it_is_added(results):
    for value in range(3):
        results.add(case="causal", value=value)
        assert [row["value"] for row in load(results.path)["rows"]] == list(range(value + 1))


def test_one_row_is_one_line(results):
    results.add(case="a", nested={"x": [1, 2]})
    results.add(case="b")
    lines = [line for line in results.path.read_text().splitlines() if '"case"' in line]
    assert [json.loads(line.rstrip(","))["case"] for line in lines] == ["a", "b"]


def test_a_note_goes_into_the_head(results):
    results.add(case="a")
    results.note("stopped", "time budget spent")
    assert load(results.path)["stopped"] == "time budget spent"
    assert len(load(results.path)["rows"]) == 1


def test_a_quick_run_says_so(tmp_path):
    results = Results("dense", tmp_path / "dense.json", quick=True, meta={"gpu": "g"})
    results.add(case="a")
    assert load(results.path)["quick"] is True


def test_no_temporary_file_is_left(results):
    results.add(case="a")
    assert [p.name for p in results.path.parent.iterdir()] == ["dense.json"]


def test_the_environment_can_be_repeated(monkeypatch):
    monkeypatch.setenv("BENCH_COMMIT", "0123abcd")
    head = environment()
    assert {"gpu", "torch", "triton", "cudnn", "attncc", "commit", "date", "command"} <= set(head)
    assert head["commit"] == "0123abcd"
    assert head["date"].endswith("+00:00")
    json.dumps(head)
