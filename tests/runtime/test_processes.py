import os
import time

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


def test_results_are_told_as_they_come():
    told = {}
    side_by_side(work, ["a", "b"], workers=1, finished=lambda at, done: told.update({at: done.value[0]}))
    assert told == {0: "a", 1: "b"}


def test_nothing_to_do():
    assert side_by_side(work, [], workers=3) == []
