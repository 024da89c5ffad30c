"""A pool of processes that compile. Triton's front end is Python: in threads of one process, kernels would compile one
at a time, and block whoever launches kernels meanwhile.

Nothing slow is imported here, so that the processes can start while this one imports torch.
"""

from __future__ import annotations

import linecache
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from attncc.runtime.processes import end_with_parent

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

    from attncc.runtime.compiler import Binary
    from attncc.runtime.specialize import Signature

#: the most processes: candidates that a race has under way, of a few kernels each
MOST = 12
#: what the process imports that the others are forked from
_NEEDED = ("attncc.runtime.compiler", "attncc.codegen.module", "triton.experimental.gluon")

_executor: ProcessPoolExecutor | None = None


@contextmanager
def compilers(count: int | None = None) -> Iterator[int]:
    """While this lasts, what this process asks to be compiled is, in `count` others: by default one for each core but
    one. How many there are; with a single one nothing would be gained, and there are none."""
    global _executor
    found = min(len(os.sched_getaffinity(0)) - 1, MOST) if count is None else count
    if found < 2:
        yield 0
        return
    context = multiprocessing.get_context("forkserver")  # neither CUDA nor threads survive a fork of this process
    context.set_forkserver_preload(list(_NEEDED))
    executor = _executor = ProcessPoolExecutor(found, context, initializer=_begin)
    try:
        executor.submit(os.getpid)  # starts the process that the others are forked from
        yield found
    finally:
        _executor = None
        executor.shutdown(wait=False, cancel_futures=True)


def running() -> bool:
    """Whether such processes are running."""
    return _executor is not None


def compiled(kernel: Any, signature: Signature, target: GPUTarget) -> Binary | None:
    """One specialization of a generated kernel, compiled in another process, for which this thread waits. None for what
    has to be compiled here: there are no such processes; it does not compile, and here it says why; or only Triton's
    own launcher can start it. CancelledError where the processes end first."""
    executor, file = _executor, kernel.fn.__code__.co_filename
    if executor is None:
        return None
    text = "".join(linecache.getlines(file))  # where `load_source` has put it
    with suppress(BrokenExecutor):
        return executor.submit(_compile, text, kernel.__name__, signature, target).result()
    return None


def _begin() -> None:
    """Whoever started this process says when it ends, or ends itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


@lru_cache(maxsize=32)
def _module(text: str) -> ModuleType:
    from attncc.codegen.module import load_source

    return load_source(text, "elsewhere")


def _compile(text: str, kernel: str, signature: Signature, target: GPUTarget) -> Binary | None:
    """In another process."""
    from attncc.runtime.compiler import Binary, compile_kernel

    try:
        found = compile_kernel(getattr(_module(text), kernel), signature, target)
    except Exception:
        return None
    return found if isinstance(found, Binary) else None
