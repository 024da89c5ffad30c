"""A call that saves nothing for its backward, which repeats the forward instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], *args: Any, preserve_rng_state: bool = True) -> Any:
    """`torch.utils.checkpoint`, which leaves nothing behind where `function` fails, as for want of memory.

    Before PyTorch 2.13 its hooks then stay in place as long as the exception does, and catch what others save for
    their backwards: those end in a CheckpointError. So the first call returns its exception, and the hooks are gone
    when it is raised.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
    if torch.compiler.is_compiling():  # which knows `checkpoint` itself, and cannot follow an exception
        return checkpoint(function, *args, **options)
    again = False
    failed: list[BaseException] = []

    def run(*args: Any) -> Any:
        nonlocal again
        if again:
            return function(*args)
        again = True
        try:
            return function(*args)
        except BaseException as error:
            failed.append(error)
            return None

    result = checkpoint(run, *args, **options)
    if failed:
        raise failed.pop()
    return result
