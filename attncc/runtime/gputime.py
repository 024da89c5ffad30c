"""Time a call on the GPU alone, without the time of the host."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

#: calls of a measurement, at least and at most
FEWEST, MOST = 5, 100
#: cycles that the GPU idles before a call that is timed, so that the host, which takes up to 0.2 ms for a backward, has
#: asked for all of it when it begins
HEAD_START = 600_000


def median_us(call: Callable[[], Any], rep_ms: int) -> float:
    """The median time of a call on the GPU, in microseconds, over about `rep_ms` milliseconds of them, with a cold
    cache each time."""
    import triton

    driver = triton.runtime.driver.active
    cache = driver.get_empty_cache_for_benchmark()
    call()
    us = statistics.median(_timed(call, FEWEST, lambda: driver.clear_cache(cache)))
    count = min(max(int(rep_ms * 1e3 / us), FEWEST), MOST)
    return statistics.median(_timed(call, count, lambda: driver.clear_cache(cache)))


def _timed(call: Callable[[], Any], count: int, forget: Callable[[], None]) -> list[float]:
    """Microseconds of each of `count` calls."""
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
    for start, end in events:
        forget()
        torch.cuda._sleep(HEAD_START)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in events]
