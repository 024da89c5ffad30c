"""Compile generated kernels without line numbers, because their text is in no file that a profiler could show.

Line numbers take a fifth of the time of LLVM and the assembler, and three quarters of a binary; the instructions are
the same. TRITON_DISABLE_LINE_INFO=0 keeps them; `attncc compile --emit` and vendored files always have them.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import triton
from triton._C.libtriton import getenv_bool

_NAME = "TRITON_DISABLE_LINE_INFO"


class _Here(threading.local):
    """Whether this thread compiles a kernel of ours: the value of Triton's knob, which is one for all threads."""

    ours = False

    def __bool__(self) -> bool:
        return self.ours or bool(getenv_bool(_NAME, False))


_here = _Here()


@contextlib.contextmanager
def without_lines() -> Iterator[None]:
    """While this is open, what this thread compiles has no line numbers, unless the environment or the program has said
    whether it has. Other threads, with kernels of others, have theirs."""
    own = vars(triton.knobs.compilation)
    if _NAME in os.environ or own.setdefault("disable_line_info", _here) is not _here:
        yield
        return
    _here.ours = True
    try:
        yield
    finally:
        _here.ours = False
