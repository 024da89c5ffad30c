"""Work done ahead of the timing, side by side: processes that compile and check cases into the caches on disk.

What is timed then runs alone, in the process that asked, which finds every kernel compiled. A process that CUDA has
failed is of no further use (an illegal access poisons all that follows): another takes its place, and the case alone
has failed.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

WORKERS = 14


@dataclass(frozen=True)
class Done:
    """What one piece of work gave: its value, or why there is none; and the seconds that it took."""

    value: Any = None
    error: str | None = None
    seconds: float = 0.0


class NotReadyError(Exception):
    """A case that failed, or was not finished, ahead of the timing."""


def _serve(connection: Connection) -> None:
    """In a process of its own: do what comes until nothing does, or CUDA has failed."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # read when torch is imported, with the first piece of work
    while (work := connection.recv()) is not None:
        function, argument = work
        start, broken = time.monotonic(), False
        try:
            done = Done(function(argument))
        except Exception as error:
            traceback.print_exc()
            broken = "CUDA" in str(error)
            done = Done(error=f"{type(error).__name__}: {error}")
        connection.send(Done(done.value, done.error, time.monotonic() - start))
        if broken:
            return


@dataclass
class _Worker:
    process: Any
    connection: Connection
    at: int | None = None

    @classmethod
    def start(cls) -> _Worker:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,))
        process.start()
        theirs.close()
        return cls(process, ours)

    def take(self, at: int, function: Callable[[Any], Any], argument: Any) -> None:
        """Start piece `at`."""
        self.at = at
        self.connection.send((function, argument))

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def ahead(
    function: Callable[[Any], Any], arguments: Sequence[Any], *, workers: int = WORKERS, seconds: float = math.inf
) -> list[Done]:
    """`function` of each argument, in `workers` processes that import its module anew, in the order of `arguments`.

    Function, arguments and values are pickled. A piece that raises, ends its process, or is not finished after
    `seconds` has an error; nothing is raised.
    """
    results = [Done(error="not finished in time")] * len(arguments)
    for at, done in _finished(function, arguments, workers, seconds):
        results[at] = done
    return results


def _finished(
    function: Callable[[Any], Any], arguments: Sequence[Any], workers: int, seconds: float
) -> Iterator[tuple[int, Done]]:
    end = time.monotonic() + seconds
    left = iter(range(len(arguments)))
    pool = [_Worker.start() for _ in range(min(workers, len(arguments)))]
    try:
        busy = [each for each in pool if _next(each, left, function, arguments)]
        while busy:
            ready = wait(
                [each.connection for each in busy], None if end == math.inf else max(end - time.monotonic(), 0)
            )
            if not ready:
                return
            for each in [each for each in busy if each.connection in ready]:
                at, fresh = each.at, each
                assert at is not None
                try:
                    done = each.connection.recv()
                    if done.error is not None and "CUDA" in done.error:
                        fresh = _replaced(pool, each)
                except EOFError:  # the process ended: a crash, or no memory
                    done = Done(error="its process ended")
                    fresh = _replaced(pool, each)
                yield at, done
                busy.remove(each)
                if _next(fresh, left, function, arguments):
                    busy.append(fresh)
    finally:
        for each in pool:
            each.stop()


def _replaced(pool: list[_Worker], broken: _Worker) -> _Worker:
    broken.stop()
    pool.remove(broken)
    pool.append(_Worker.start())
    return pool[-1]


def _next(worker: _Worker, left: Iterator[int], function: Callable[[Any], Any], arguments: Sequence[Any]) -> bool:
    at = next(left, None)
    if at is not None:
        worker.take(at, function, arguments[at])
    return at is not None
