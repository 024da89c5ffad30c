"""Worker processes: compiling keeps one core busy each, while a GPU would wait.

A process in which CUDA has failed is unusable (an illegal access poisons everything after it): it is replaced, and only
its piece of work has failed. A piece that ran out of memory beside the others is repeated when they have ended.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any


@dataclass(frozen=True)
class Done:
    """What one piece of work gave: its value, or why there is none, with the traceback; and the seconds it took."""

    value: Any = None
    error: str | None = None
    trace: str = ""
    seconds: float = 0.0

    @property
    def poisoned(self) -> bool:
        """Whether its process may have lost the GPU, or holds memory that it could not get more of."""
        return self.error is not None and "CUDA" in self.error

    @property
    def lacked_memory(self) -> bool:
        """Whether the GPU had no memory left for it."""
        return self.error is not None and re.search(r"CUDA.*(out of memory|ALLOC_FAILED)", self.error) is not None


def told(error: Exception) -> str:
    """An error in a line, without what PyTorch says of every process when the GPU's memory is full."""
    return re.sub(r"\. GPU \d+ has a total.*", "", f"{type(error).__name__}: {error}", flags=re.DOTALL)


def side_by_side(
    function: Callable[[Any], Any],
    arguments: Sequence[Any],
    *,
    workers: int,
    seconds: float = math.inf,
    finished: Callable[[int, Done], None] = lambda at, done: None,
) -> list[Done]:
    """`function` of each argument, in at most `workers` processes that import its module anew; in the order given.

    Function, arguments and values are pickled. A piece that raises, ends its process, or is not finished after
    `seconds` has an error; nothing is raised. What lacked memory is tried once more, with nothing else beside it.
    `finished` is called here with the place and result of each piece.
    """
    results = [Done(error="not finished in time")] * len(arguments)
    for at, done in _finished(function, arguments, workers, seconds):
        results[at] = done
        finished(at, done)
    return results


def end_with_parent() -> None:
    """From now on this process, and what it starts, ends when whoever started it does, be that by a signal in the
    middle of a piece: what nobody waits for would still keep cores, memory and the GPU."""
    os.setpgid(0, 0)  # with the assemblers and compilers that it starts, which end with it
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def _serve(connection: Connection) -> None:
    """In a process of its own: do what comes until nothing does, or CUDA has failed."""
    end_with_parent()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # read when torch is imported, with the first piece of work
    while True:
        try:
            function, argument = connection.recv()
        except EOFError:  # whoever asked has ended
            return
        start = time.monotonic()
        try:
            done = Done(function(argument))
        except Exception as error:
            done = Done(error=told(error), trace=traceback.format_exc())
        connection.send(replace(done, seconds=time.monotonic() - start))
        if done.poisoned:
            return


@dataclass
class _Worker:
    process: Any
    connection: Connection
    at: int = -1

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

    def result(self) -> Done:
        """What the piece gave."""
        try:
            done: Done = self.connection.recv()
        except EOFError:  # a crash, or no memory
            return Done(error="its process ended")
        return done

    def stop(self) -> None:
        """End the process, whatever it does, and what it has started."""
        self.process.kill()
        with contextlib.suppress(ProcessLookupError):  # it had not come so far as to have a group, or has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.connection.close()


def _finished(
    function: Callable[[Any], Any], arguments: Sequence[Any], workers: int, seconds: float
) -> Iterator[tuple[int, Done]]:
    end = time.monotonic() + seconds
    left = list(range(len(arguments)))
    alone: list[int] = []
    again: set[int] = set()
    busy: list[_Worker] = []

    def go_on(worker: _Worker | None) -> None:
        """The next piece, for this worker or for a new one; when all others have ended, one of those that need that."""
        if not left and not busy and alone:
            left.append(alone.pop())
        if left:
            at = left.pop(0)
            worker = worker or _Worker.start()
            busy.append(worker)
            worker.take(at, function, arguments[at])
        elif worker is not None:
            worker.stop()

    try:
        for _ in range(min(workers, len(arguments))):
            go_on(None)
        while busy:
            remaining = None if seconds == math.inf else max(end - time.monotonic(), 0)
            ready = wait([each.connection for each in busy], remaining)
            if not ready:
                return
            for each in [each for each in busy if each.connection in ready]:
                busy.remove(each)
                at, done = each.at, each.result()
                lost = done.poisoned or (done.error is not None and not done.trace)
                if lost:
                    each.stop()
                put_off = done.lacked_memory and at not in again
                if put_off:
                    again.add(at)
                    alone.append(at)
                go_on(None if lost else each)
                if not put_off:
                    yield at, done
    finally:
        for each in busy:
            each.stop()
