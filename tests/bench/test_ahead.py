import os
import time

import pytest

from bench.ahead import ahead


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
    first, raised, poisoned, dead, last = ahead(work, ["a", "raise", "poison", "die", "b"], workers=workers)
    assert first.value[0] == "a"
    assert last.value[0] == "b"
    assert raised.error == "ValueError: no good"
    assert "illegal memory access" in poisoned.error
    assert dead.error == "its process ended"
    if workers == 1:  # what CUDA has failed in does nothing more
        assert first.value[1] != last.value[1]


def test_what_is_not_finished_in_time_is_given_up():
    start = time.monotonic()
    done, late = ahead(work, ["a", "sleep"], workers=2, seconds=3)
    assert done.value[0] == "a"
    assert late.error == "not finished in time"
    assert time.monotonic() - start < 60


def test_nothing_to_do():
    assert ahead(work, []) == []
