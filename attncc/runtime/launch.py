"""How a generated module's host code launches kernels: collect them, run them, or run and record them for a replay.

The module's own `_launch` is replaced by a Launcher. Binaries go straight to the driver; kernels whose arguments are
not only pointers and numbers, or that a profiler watches, go through Triton.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from attncc.runtime.arguments import Cells, addresses_of
from attncc.runtime.binaries import Binaries, start
from attncc.runtime.compiler import Binary, Compiled, bypasses, current_target
from attncc.runtime.cuda import Function
from attncc.runtime.interpreter import compiling
from attncc.runtime.specialize import Signature, signature
from attncc.schedule.cache import Cache

_KNOBS = triton.knobs.runtime


@dataclass(frozen=True)
class Call:
    """One launch as it was made: a loaded Function with the types of its arguments and the compiler's facts of their
    descriptors, or a kernel that Triton launches (`kinds` is empty)."""

    kernel: Any
    grid: int
    arguments: tuple[Any, ...]
    kinds: tuple[str, ...] = ()
    boxes: tuple[Mapping[str, Any], ...] = ()


class Tape(Protocol):
    """Records launches."""

    def launched(self, call: Call) -> None:
        """Take note of a launch that was made."""


@dataclass(frozen=True)
class Job:
    """One launch that host code asked for and that was not made: what is compiled for it."""

    launcher: Launcher
    kernel: Any
    arguments: Sequence[Any]
    meta: Mapping[str, Any]

    def finish(self, target: GPUTarget) -> Compiled | None:
        """Its binary for a target, from the cache or compiled now; None where Triton's own launcher compiles it."""
        special = signature(self.kernel, self.arguments, self.meta) if bypasses(self.kernel) else None
        return None if special is None else self.launcher.binaries.begin(self.kernel, special, target).result()


class Trace(threading.local):
    """How launches of this thread are handled besides running them: collected in `jobs`, or recorded on `tape`."""

    jobs: list[Job] | None = None
    tape: Tape | None = None


trace = Trace()


def watched() -> bool:
    """Whether a profiler has hooks on launches, which then go through Triton's front end."""
    return bool(_hooks(_KNOBS.launch_enter_hook) or _hooks(_KNOBS.launch_exit_hook))


def _hooks(hook: Any) -> Any:
    """The functions of a hook: Triton has it as None, one function, or a chain of them."""
    return getattr(hook, "calls", hook)


class Launcher:
    """The `_launch` of one compiled module; its kernels by specialization and device."""

    def __init__(self, digest: str, cache: Cache):
        self.binaries = Binaries(digest, cache)
        self._functions: dict[tuple[int, int], Function] = {}
        self._warming: dict[int, list[Future[Any]]] = {}

    def __call__(self, kernel: Any, grid: int, arguments: Sequence[Any], meta: Mapping[str, Any]) -> None:
        """Run a kernel on a one-dimensional grid of the current device."""
        if not grid:
            return
        if trace.jobs is not None:
            trace.jobs.append(Job(self, kernel, arguments, dict(meta)))
            return
        device = torch.cuda.current_device()
        special = signature(kernel, arguments, meta) if bypasses(kernel) and not watched() else None
        if special is None:
            for future in self._warming.pop(id(kernel), ()):
                future.exception()  # what failed fails again here, with its reason
            with compiling():
                compiled = kernel[(grid,)](*arguments, **meta)
            call = Call(compiled, grid, _all(kernel, arguments, meta))
        else:
            found = self.binaries.begin(kernel, special, current_target(device)).result()
            if isinstance(found, Binary):
                function = self._function(found, device)
                call = Call(function, grid, *_runtime(special, arguments), found.boxes)
                cells = Cells(call.kinds, call.arguments, call.boxes, addresses_of(call.arguments))
                function.ready(grid, cells.addresses)(torch._C._cuda_getCurrentRawStream(device))
            else:
                call = Call(found, grid, _all(kernel, arguments, meta))
                launch_compiled(found, grid, torch._C._cuda_getCurrentRawStream(device), call.arguments)
        if trace.tape is not None:
            trace.tape.launched(call)

    def begin(
        self, kernel: Any, arguments: Sequence[Any], meta: Mapping[str, Any], device: int
    ) -> Future[Compiled] | Future[Any]:
        """Start to compile what such a launch needs, unless it is there."""
        special = signature(kernel, arguments, meta) if bypasses(kernel) else None
        if special is not None:
            return self.binaries.begin(kernel, special, current_target(device))
        future = start(_warm_up, kernel, arguments, meta, device)
        self._warming.setdefault(id(kernel), []).append(future)
        return future

    def _function(self, binary: Binary, device: int) -> Function:
        key = (id(binary), device)  # binaries live as long as their module
        found = self._functions.get(key)
        if found is None:
            found = self._functions.setdefault(
                key, Function(binary.image, binary.name, binary.warps, binary.shared, device, binary.early)
            )
        return found


def _warm_up(kernel: Any, arguments: Sequence[Any], meta: Mapping[str, Any], device: int) -> Any:
    """Compile a kernel in Triton's own way, with the C code that launches it."""
    with torch.cuda.device(device), compiling():
        compiled = kernel.warmup(*arguments, grid=(1,), **meta)
        compiled.run  # noqa: B018  a property that loads the kernel
    return compiled


def launch_compiled(compiled: Any, grid: int, stream: int, arguments: Sequence[Any]) -> None:
    """Launch what Triton compiled, through its own launcher."""
    run = compiled.run  # loads the kernel at the first use
    run(grid, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


def _all(kernel: Any, arguments: Sequence[Any], meta: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments as Triton's launcher wants them: constants, too."""
    return (*arguments, *(meta[p.name] for p in kernel.params[len(arguments) :]))


def _runtime(special: Signature, arguments: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """The arguments that a binary takes, and their types."""
    positions = special.runtime
    return tuple(arguments[i] for i in positions), tuple(special.types[i] for i in positions)


def ghost(x: Tensor) -> Tensor:
    """A tensor like x without storage: as aligned as anything that PyTorch allocates."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def launches(run: Callable[[], object]) -> list[Job]:
    """Run host code for its launches alone."""
    trace.jobs = []
    try:
        run()
        return trace.jobs
    finally:
        trace.jobs = None


def collect(run: Callable[[], object], device: int) -> list[tuple[str, Future[Any]]]:
    """Run host code for its launches alone, and start to compile each of its kernels: their names, and what comes.

    Front ends take turns, so that the kernel which takes longest goes first: it is what the last launch waits for.
    """
    return [
        (job.kernel.__name__, job.launcher.begin(job.kernel, job.arguments, job.meta, device))
        for job in sorted(launches(run), key=_effort, reverse=True)
    ]


def _effort(job: Job) -> tuple[bool, int]:
    """The relative time to compile a launch's kernel: the length of its text and that of the functions it calls, more
    for unrolled loops. Gluon kernels have many."""
    function = job.kernel.fn
    called = (function.__globals__.get(name) for name in function.__code__.co_names)
    texts = [job.kernel.src, *(x.src for x in called if isinstance(x, JITFunction))]
    return job.kernel.is_gluon(), sum(len(text) * (1 + text.count("static_range")) for text in texts)
