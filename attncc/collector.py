"""Pause Python's garbage collector while an op is created."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held() -> Iterator[None]:
    """No full collection within: with PyTorch imported each looks at a million objects, a tenth of a second long, and
    what makes an op allocates enough for several. Where another thread holds it already, that one lets it go."""
    mine = gc.isenabled()
    if mine:
        gc.disable()
    try:
        yield
    finally:
        if mine:
            gc.enable()
