from __future__ import annotations

import json
import multiprocessing
import os
import warnings
from pathlib import Path

import filelock
import pytest

from attncc.errors import AttnccWarning, InputError
from attncc.schedule import cache as cache_module
from attncc.schedule.cache import Cache, bucket, cache_key

KEY = cache_key(ir="abc", dtype="bf16", d_qk=128)
OTHER = cache_key(ir="abc", dtype="fp16", d_qk=128)
VALUE = {"kind": "schedule", "schedule": {"block_m": 128}, "us": 12.5}


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def test_a_value_comes_back_in_another_cache_object(cache):
    assert cache.get(KEY) is None
    cache.put(KEY, VALUE)
    assert Cache(cache.directory).get(KEY) == VALUE
    assert cache.get(OTHER) is None
    cache.put(KEY, {**VALUE, "us": 1.0})
    assert Cache(cache.directory).get(KEY)["us"] == 1.0


def test_reading_creates_nothing(cache):
    assert cache.get(KEY) is None
    assert cache.list() == ()
    assert cache.clear() == 0
    assert not cache.directory.exists()


def test_the_folder_is_the_environments(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(tmp_path / "mine"))
    assert Cache().directory == tmp_path / "mine"
    monkeypatch.delenv("ATTNCC_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Cache().directory == tmp_path / "xdg" / "attncc"


def test_a_key_depends_on_every_part_and_on_the_versions(monkeypatch):
    assert cache_key(a=1, b=2) == cache_key(b=2, a=1)
    assert len({cache_key(a=1), cache_key(a=2), cache_key(b=1), cache_key(a="1")}) == 4
    before = cache_key(a=1)
    monkeypatch.setattr(cache_module, "_versions", lambda: {"triton": "9"})
    assert cache_key(a=1) != before


@pytest.mark.parametrize("key", ["", "short", "../" + "a" * 61, "A" * 64, "a" * 65])
def test_a_key_that_is_no_digest_never_becomes_a_path(cache, key):
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        cache.get(key)
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        cache.put(key, VALUE)


@pytest.mark.parametrize("value", [{}, {"kind": "pickle"}, [1], {"kind": "schedule", "us": float("nan")}])
def test_only_json_of_a_known_kind_is_stored(cache, value):
    with pytest.raises(ValueError, match=r"JSON"):
        cache.put(KEY, value)
    assert cache.get(KEY) is None


def _torn(text):
    return text[: len(text) // 2]


def _another_key(text):
    return text.replace(KEY, OTHER)


def _another_format(text):
    return text.replace("attncc-cache-1", "attncc-cache-0")


def _one_digit_changed(text):
    return text.replace("128", "129")


def _of_another_program(text):
    return '{"version": 3, "entries": []}'


def _empty(text):
    return ""


def _nested(text):
    return "[" * 100_000


DAMAGES = [_torn, _another_key, _another_format, _one_digit_changed, _of_another_program, _empty, _nested]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_a_miss_with_one_warning_and_is_replaced(cache, damage):
    cache.put(KEY, VALUE)
    path = cache.directory / f"{KEY}.json"
    path.write_text(damage(path.read_text()))
    with pytest.warns(AttnccWarning, match=r"is ignored: it.*replaced at the next write") as caught:
        assert cache.get(KEY) is None
        assert cache.get(KEY) is None
        assert cache.list() == ()
    assert len(caught) == 1
    assert path.name in str(caught[0].message)
    cache.put(KEY, VALUE)
    assert cache.get(KEY) == VALUE


def test_bytes_that_are_no_text_are_a_miss(cache):
    cache.put(KEY, VALUE)
    (cache.directory / f"{KEY}.json").write_bytes(b"\x80\x04\x95\xff\x00")
    with pytest.warns(AttnccWarning, match="not JSON"):
        assert cache.get(KEY) is None


def test_an_entry_that_cannot_be_opened_is_a_miss(cache):
    cache.put(KEY, VALUE)
    path = cache.directory / f"{KEY}.json"
    path.unlink()
    path.mkdir()
    with pytest.warns(AttnccWarning, match="cannot be read"):
        assert cache.get(KEY) is None


def test_files_of_others_are_left_alone(cache):
    cache.put(KEY, VALUE)
    (cache.directory / "notes.json").write_text("{}")
    assert [entry.key for entry in cache.list()] == [KEY]
    assert cache.clear() == 1
    assert (cache.directory / "notes.json").exists()


def test_a_folder_that_cannot_exist_keeps_entries_in_memory(tmp_path):
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")
    with pytest.warns(AttnccWarning, match=r"cannot be written.*ATTNCC_CACHE_DIR") as caught:
        cache.put(KEY, VALUE)
        cache.put(OTHER, VALUE)
        Cache(cache.directory).put(KEY, VALUE)  # that of another op
    assert [w.filename for w in caught] == [__file__]  # whoever called attncc
    assert cache.get(KEY) == VALUE
    cache.get(KEY)["us"] = 0.0
    assert cache.get(KEY) == VALUE
    assert cache.clear() == 2
    assert cache.get(KEY) is None


def test_a_read_only_folder_is_still_read(cache, monkeypatch):
    cache.put(KEY, VALUE)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.warns(AttnccWarning, match="Permission denied"):
        cache.put(OTHER, {**VALUE, "us": 2.0})
    assert cache.get(KEY) == VALUE
    assert cache.get(OTHER)["us"] == 2.0
    assert not list(cache.directory.glob(".*.tmp"))
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(InputError, match="cannot be cleared: .*Permission denied"):
        cache.clear()
    monkeypatch.undo()
    cache.put(OTHER, VALUE)
    assert Cache(cache.directory).get(OTHER) == VALUE
    assert cache.get(OTHER) == VALUE


def test_a_lock_that_is_never_released_does_not_hang(cache, monkeypatch):
    monkeypatch.setattr(cache_module, "LOCK_SECONDS", 0.05)
    cache.directory.mkdir(parents=True)
    with filelock.FileLock(cache.directory / ".lock"), pytest.warns(AttnccWarning, match="cannot be written"):
        cache.put(KEY, VALUE)
    assert cache.get(KEY) == VALUE


def test_an_interrupted_write_leaves_the_old_entry(cache, monkeypatch):
    cache.put(KEY, VALUE)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.put(KEY, {**VALUE, "us": 3.0})
    assert Cache(cache.directory).get(KEY) == VALUE
    assert not list(cache.directory.glob(".*.tmp"))


def _write_many(directory, writer):
    cache = Cache(directory)
    for count in range(40):
        cache.put(KEY, {"kind": "schedule", "writer": writer, "count": count, "fill": str(writer) * 20_000})


def test_two_processes_writing_one_entry_never_tear_it(cache):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(cache.directory, writer)) for writer in (1, 2)]
    for writer in writers:
        writer.start()
    seen = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while any(writer.is_alive() for writer in writers):
            value = cache.get(KEY)
            if value is not None:
                seen += 1
                assert value["fill"] == str(value["writer"]) * 20_000
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen > 0
    assert cache.get(KEY)["count"] == 39
    assert not list(cache.directory.glob(".*.tmp"))


def test_entries_travel_by_export_and_import(cache, tmp_path):
    cache.put(KEY, VALUE)
    cache.put(OTHER, {"kind": "source", "text": "import triton\n"})
    assert cache.export(tmp_path / "all.json") == 2
    there = Cache(tmp_path / "there")
    assert there.import_(tmp_path / "all.json") == 2
    assert there.get(KEY) == VALUE
    assert {entry.kind for entry in there.list()} == {"schedule", "source"}
    assert all(entry.size > 0 and entry.written > 0 for entry in there.list())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"format": "attncc-cache-1", "entries": {"../../evil": {"kind": "source"}}}',
        json.dumps({"format": "attncc-cache-1", "entries": {KEY: VALUE, OTHER: {"kind": "code"}}}),
    ],
)
def test_a_file_that_is_no_export_is_refused_whole(cache, tmp_path, text):
    (tmp_path / "in.json").write_text(text)
    with pytest.raises(InputError, match=r"in\.json"):
        cache.import_(tmp_path / "in.json")
    assert cache.get(KEY) is None


def test_a_missing_import_file_is_an_input_error(cache, tmp_path):
    with pytest.raises(InputError, match="cannot be imported"):
        cache.import_(tmp_path / "absent.json")


def test_clear_removes_damaged_entries_and_left_over_files(cache):
    cache.put(KEY, VALUE)
    (cache.directory / f"{OTHER}.json").write_text("torn")
    (cache.directory / ".x.tmp").write_text("left over")
    assert cache.clear() == 2
    assert [path.name for path in cache.directory.iterdir() if path.name != ".lock"] == []


@pytest.mark.parametrize(("length", "rounded"), [(1, 1), (2, 2), (3, 4), (1000, 1024), (1024, 1024), (1025, 2048)])
def test_buckets_are_powers_of_two(length, rounded):
    assert bucket(length) == rounded


def _hold(directory, taken, free):
    with Cache(directory).lock("gpu-0"), Cache(directory).lock("gpu-1"):
        taken.set()
        free.wait(20)


def test_one_process_holds_a_lock_and_may_take_it_again(cache):
    context = multiprocessing.get_context("spawn")
    taken, free = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(cache.directory, taken, free))
    other.start()
    assert taken.wait(30)
    lock = filelock.FileLock(cache.directory / ".gpu-0.lock", timeout=0)
    with pytest.raises(filelock.Timeout):
        lock.acquire()
    free.set()
    with cache.lock("gpu-0"), cache.lock("gpu-0"), pytest.raises(filelock.Timeout):
        lock.acquire()
    lock.acquire()
    lock.release()
    other.join()


def test_where_no_lock_can_be_nobody_is_waited_for(tmp_path):
    (tmp_path / "file").write_text("")
    with Cache(tmp_path / "file" / "cache").lock("gpu-0"):
        assert not (tmp_path / "file" / "cache").exists()
