import json

import pytest

import attncc as ac
from attncc.schedule.cache import Cache, cache_key

KS = ac.KernelSchedule(64, 32, 4, 2)
VALUE = {"kind": "schedule", "schedule": ac.Schedule(KS, KS, KS).to_json(), "what": "causal B1 [bold]"}


def test_an_empty_cache(attncc, own_cache):
    result = attncc("cache", "list")
    assert result.exit_code == 0
    assert f"0 entries in {own_cache}" in result.stdout


def test_entries_travel_by_file(attncc, own_cache, tmp_path):
    key = cache_key(what="x")
    Cache().put(key, VALUE)
    assert "causal B1" in attncc("cache", "list").stdout
    assert json.loads(attncc("cache", "list", "--json").stdout)[0]["key"] == key
    file = tmp_path / "tuned.json"
    assert "wrote 1 entry" in attncc("cache", "export", str(file)).stdout
    assert "removed 1 entry" in attncc("cache", "clear").stdout
    assert Cache().list() == ()
    assert "read 1 entry" in attncc("cache", "import", str(file)).stdout
    assert Cache().get(key) == VALUE


def test_a_corrupt_entry_is_a_warning_and_can_be_cleared(attncc, own_cache):
    (own_cache / f"{cache_key(what='y')}.json").write_text("not JSON")
    result = attncc("cache", "list")
    assert result.exit_code == 0
    assert "warning: the cache entry" in result.stderr
    assert "0 entries" in result.stdout
    assert "removed 1 entry" in attncc("cache", "clear").stdout


@pytest.mark.parametrize("text", ["", "[]", '{"format": "another", "entries": {}}'])
def test_a_foreign_file_is_not_imported(attncc, tmp_path, text):
    file = tmp_path / "foreign.json"
    file.write_text(text)
    result = attncc("cache", "import", str(file))
    assert result.exit_code == 2
    assert "foreign.json" in result.stderr


def test_missing_files_and_folders(attncc):
    assert attncc("cache", "import", "absent.json").exit_code == 2
    result = attncc("cache", "export", "/absent/folder/x.json")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
