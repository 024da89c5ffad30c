import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attncc.runtime.processes import side_by_side


def work(what):
    if what == "raise":
        raise ValueError("no good")
    if what == "poison":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if what == "die":
        os._exit(3)
    if what == "sleep":
        time.sleep(600)
    if isinstance(what, Path):  # with a process of its own
        child = subprocess.Popen(["sleep", "600"])
        what.with_suffix(".new").write_text(f"{os.getpid()} {child.pid}")
        what.with_suffix(".new").rename(what)
        time.sleep(600)
    return what, os.getpid()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_failing_piece_costs_itself_alone(workers):
    first, raised, poisoned, dead, last = side_by_side(work, ["a", "raise", "poison", "die", "b"], workers=workers)
    assert first.value[0] == "a"
    assert last.value[0] == "b"
    assert raised.error == "ValueError: no good"
    assert "in work" in raised.trace
    assert "illegal memory access" in poisoned.error
    assert dead.error == "its process ended"
    if workers == 1:  # what CUDA has failed in does nothing more
        assert first.value[1] != last.value[1]


def test_what_is_not_finished_in_time_is_given_up():
    start = time.monotonic()
    done, late = side_by_side(work, ["a", "sleep"], workers=2, seconds=3)
    assert done.value[0] == "a"
    assert late.error == "not finished in time"
    assert time.monotonic() - start < 60


def in_turns(what):
    """There is memory for one at a time."""
    folder, name = what
    (folder / name).touch()
    time.sleep(0.5)
    others = [each for each in folder.iterdir() if each.name != name]
    (folder / name).unlink()
    if others or name == "huge":
        raise RuntimeError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.18 GiB of which "
            "12.88 MiB is free. Process 518 has 518.00 MiB memory in use. Process 550 has 7.34 GiB memory in use."
        )
    return name


def test_what_lacks_memory_is_done_again_alone(tmp_path):
    told = []
    *fit, huge = side_by_side(
        in_turns,
        [(tmp_path, name) for name in ("a", "b", "c", "d", "huge")],
        workers=3,
        finished=lambda at, done: told.append(at),
    )
    assert [done.value for done in fit] == ["a", "b", "c", "d"]
    assert huge.error == "RuntimeError: CUDA out of memory. Tried to allocate 20.00 MiB"
    assert sorted(told) == [0, 1, 2, 3, 4]


def test_results_are_told_as_they_come():
    told = {}
    side_by_side(work, ["a", "b"], workers=1, finished=lambda at, done: told.update({at: done.value[0]}))
    assert told == {0: "a", 1: "b"}


def test_nothing_to_do():
    assert side_by_side(work, [], workers=3) == []


def gone(pid):
    """Has a process ended? One that nobody asks for its result is a zombie at most."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def all_gone(told):
    pids = told.read_text().split()
    end = time.monotonic() + 20
    while time.monotonic() < end and not all(map(gone, pids)):
        time.sleep(0.1)
    return all(map(gone, pids))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_what_is_given_up_ends_with_all_that_it_started(tmp_path):
    told = tmp_path / "pids"
    (late,) = side_by_side(work, [told], workers=1, seconds=15)
    assert late.error == "not finished in time"
    assert all_gone(told)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_no_worker_outlives_who_is_killed(tmp_path):
    told = tmp_path / "pids"
    text = f"""
from pathlib import Path
from attncc.runtime.processes import side_by_side
from tests.runtime.test_processes import work
if __name__ == "__main__":
    side_by_side(work, [Path({str(told)!r})], workers=1)
"""
    script = tmp_path / "main.py"
    script.write_text(text)
    parent = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    end = time.monotonic() + 60
    while not told.exists() and time.monotonic() < end:
        time.sleep(0.1)
    parent.send_signal(signal.SIGTERM)
    parent.wait()
    assert all_gone(told)
