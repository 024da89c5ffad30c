"""Run kernels on CPU tensors through Triton's interpreter, beside compiled kernels in the same process.

Triton chooses between compiler and interpreter when a kernel is decorated, by an environment variable, and the
interpreter patches `triton.language` while it runs. Here each module chooses for itself; the language's standard
library is wrapped for the interpreter only while a kernel runs, and every change is undone afterwards.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


class _Gate:
    """The patches are global: one thread interprets at a time, and none compiles meanwhile. Any number may compile."""

    def __init__(self) -> None:
        self._interpreting = threading.RLock()
        self._changed = threading.Condition()
        self._compiling = 0
        self._closed = False

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """For a thread that patches the language."""
        with self._interpreting:
            with self._changed:
                self._closed = True
                self._changed.wait_for(lambda: not self._compiling)
            try:
                yield
            finally:
                with self._changed:
                    self._closed = False
                    self._changed.notify_all()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """For a thread that reads the language."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._compiling += 1
        try:
            yield
        finally:
            with self._changed:
                self._compiling -= 1
                self._changed.notify_all()


_gate = _Gate()

_MODULES = (tl, tl.core, tl.standard, tl.math)
_OWNERS = (*_MODULES, tl.core.tensor, tl.core.tensor_descriptor_base)


@contextlib.contextmanager
def decorating() -> Iterator[None]:
    """While this is open, `triton.jit` makes interpreted kernels."""
    with _gate.alone(), triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        yield


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """While this is open, interpreted kernels run."""
    import triton.experimental.gluon  # noqa: F401  before the language is patched: it refuses to be imported then

    with _gate.alone():
        before = [(owner, dict(vars(owner))) for owner in _OWNERS]
        patch_tensor = interpreter._patch_lang_tensor

        def patched(tensor: Any, scope: Any) -> None:
            patch_tensor(tensor, scope)
            # the interpreter's own forms convert one-element arrays, which NumPy no longer does
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
            scope.set_attr(tensor, "__bool__", _truth)

        for module in _MODULES:
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    setattr(module, name, InterpretedFunction(value.fn))
        interpreter._patch_lang_tensor = patched
        try:
            # hidden pairs and padding may divide by zero on the way to being selected away, as on a GPU
            with np.errstate(all="ignore"):
                yield
        finally:
            interpreter._patch_lang_tensor = patch_tensor
            for owner, attributes in before:
                _restore(owner, attributes)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """While this is open, no kernel is interpreted: the compiler reads the language that the interpreter patches."""
    with _gate.together():
        yield


def _truth(tensor: Any) -> bool:
    data = tensor.handle.data
    # every scalar is a tensor here; a block has no truth, and the interpreter never asks for it
    return bool(data.item()) if data.size == 1 else True


def _restore(owner: Any, attributes: dict[str, Any]) -> None:
    for name, value in list(vars(owner).items()):
        if name not in attributes:
            # rewritten functions keep looking their helpers up in the module's globals; a class must be as it was
            if isinstance(owner, type):
                delattr(owner, name)
        elif attributes[name] is not value:
            setattr(owner, name, attributes[name])
