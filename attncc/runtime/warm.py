"""Compile the kernels of a call side by side, before they are launched one after the other.

The module's own host code is run on tensors without storage, with launches collected instead of made; each becomes a
job of a thread pool. LLVM and the assembler work outside Python's lock, so the slowest kernel sets the time. When a
call wants gradients, the backward's kernels start compiling with the forward's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attncc.runtime.interpreter import compiling

Job = tuple[Any, int, Sequence[Any], dict[str, Any]]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(8, thread_name_prefix="attncc-compile")


_pending: dict[int, list[Future[None]]] = {}
_lock = threading.Lock()


def ghost(x: Tensor) -> Tensor:
    """A tensor like x without storage: as aligned as anything that PyTorch allocates."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def start(jobs: Sequence[Job], device: torch.device) -> None:
    """Begin to compile; `wait` of a kernel returns when it is done."""
    for kernel, grid, arguments, meta in jobs:
        future = _pool().submit(_compile, kernel, grid, arguments, meta, device)
        with _lock:
            _pending.setdefault(id(kernel), []).append(future)


def wait(kernel: Any) -> None:
    """Until no job of this kernel is under way. What failed fails again where it is launched, with its reason."""
    if not _pending:
        return
    with _lock:
        futures = _pending.pop(id(kernel), [])
    for future in futures:
        future.exception()


def _compile(kernel: Any, grid: int, arguments: Sequence[Any], meta: dict[str, Any], device: torch.device) -> None:
    with torch.cuda.device(device), compiling():
        kernel.warmup(*arguments, grid=(grid,), **meta)


class Collector(threading.local):
    """Where a module's launches go while its host code is only run for their arguments."""

    jobs: list[Job] | None = None

    def collect(self, run: Callable[[], object]) -> list[Job]:
        """The launches that `run` would make, one a kernel."""
        self.jobs = []
        try:
            run()
            found = self.jobs
        finally:
            self.jobs = None
        return list({id(job[0]): job for job in found}.values())


collector = Collector()
