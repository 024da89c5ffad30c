"""Compiled kernels: each specialization is compiled once, in parallel with others, and kept on disk.

Binaries are kept in attncc's own cache, because a look-up in Triton's costs half a second per process: it hashes the
whole compiler first.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import Any

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from attncc.collector import held
from attncc.runtime import compilers
from attncc.runtime.compiler import Binary, Compiled, compile_kernel, is_watched
from attncc.runtime.specialize import Signature
from attncc.schedule.cache import Cache, cache_key

#: environment variables that say where Triton keeps things, not what it compiles
_PLACES = {"TRITON_CACHE_DIR", "TRITON_HOME"}


@cache
def pool() -> ThreadPoolExecutor:
    """The threads that compile, where LLVM and the assembler work outside Python's lock, or wait for those who do."""
    return ThreadPoolExecutor(compilers.MOST, thread_name_prefix="attncc-compile")


_under_way: set[Future[Any]] = set()


def start(work: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Let a thread compile."""
    future = pool().submit(work, *arguments)
    _under_way.add(future)
    future.add_done_callback(_under_way.discard)
    return future


def settle() -> None:
    """Wait until no thread of this process compiles, which would take its time from whoever launches kernels. What
    other processes compile goes on."""
    if not compilers.running():
        wait(tuple(_under_way))


def drop_waiting() -> None:
    """Forget what waits to be compiled, so that a process that is told to stop ends soon."""
    pool().shutdown(wait=False, cancel_futures=True)
    pool.cache_clear()


class Binaries:
    """The binaries of one generated module, by kernel and specialization. `digest` names the module's text."""

    def __init__(self, digest: str, cache: Cache):
        self._digest, self._cache = digest, cache
        self._found: dict[Any, Future[Compiled]] = {}
        self._lock = threading.Lock()

    def begin(self, kernel: Any, signature: Signature, target: GPUTarget) -> Future[Compiled]:
        """The binary, from memory or disk, or under way in another thread."""
        key = (kernel.__name__, signature, target.arch)
        with self._lock:
            future = self._found.get(key)
            if future is not None:
                return future
            future = self._found[key] = Future()
        try:
            name = self._key(kernel, signature, target)
            stored = None if name is None else self._cache.get(name)
            binary = None if stored is None else Binary.from_json(stored)
            if binary is not None:
                future.set_result(binary)
            else:
                start(self._finish, future, key, kernel, signature, target, name)
        except BaseException as error:
            self._fail(future, key, error)
        return future

    def _fail(self, future: Future[Compiled], key: Any, error: BaseException) -> None:
        with self._lock:
            del self._found[key]  # the next call tries again
        future.set_exception(error)

    def _finish(
        self, future: Future[Compiled], key: Any, kernel: Any, signature: Signature, target: GPUTarget, name: str | None
    ) -> None:
        try:
            elsewhere = None if name is None else compilers.compiled(kernel, signature, target)
            with held():
                compiled = elsewhere or compile_kernel(kernel, signature, target)
        except BaseException as error:
            self._fail(future, key, error)
            return
        future.set_result(compiled)
        if name is not None and isinstance(compiled, Binary):
            self._cache.put(name, {**compiled.to_json(), "what": f"{kernel.__name__} {_target_name(target)}"})

    def _key(self, kernel: Any, signature: Signature, target: GPUTarget) -> str | None:
        """The entry's name in the cache, or None where somebody watches the compiler work."""
        if is_watched():
            return None
        options = dict(vars(make_backend(target).parse_options(dict(signature.options))))
        options.pop("extern_libs", None)  # a path inside the installation
        facts = (
            signature.types,
            signature.aligned,
            tuple(map(str, signature.constants)),
            sorted(options.items(), key=str),
        )
        return cache_key(
            kind="kernel",
            source=self._digest,
            kernel=kernel.__name__,
            target=_target_name(target),
            facts=str(facts),
            compiler=_compiler(),
        )


def _target_name(target: GPUTarget) -> str:
    return f"{target.backend}:{target.arch}"


def _compiler() -> str:
    """The identity of this compiler: the size of its library, and the environment variables that affect it."""
    prefixes = ("TRITON_", "PTXAS", "DISABLE_PTXAS")
    asked = sorted(item for item in os.environ.items() if item[0].startswith(prefixes) and item[0] not in _PLACES)
    return str((_library_size(), asked, sorted(get_cache_invalidating_env_vars().items())))


@cache
def _library_size() -> int:
    return os.stat(triton._C.libtriton.__file__).st_size
