"""Inspect machine code for sm_90 before it is launched, and reassemble miscompiled kernels with another ptxas.

The triton package ships two. In 3.6 and 3.7 the one for sm_90 is from CUDA 12.8, which miscompiles some tensor-core
operands (`codegen.wgmma`); the one for sm_100, from CUDA 12.9 or later, does not.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import triton

from attncc.codegen.wgmma import wgmma_faults
from attncc.errors import warn


def sound(name: str, ptx: str, image: bytes) -> bytes:
    """The cubin of a kernel for sm_90, or another of the same PTX where that one has a fault.

    The other assembler is asked first, then the same one to optimize nothing, which makes a slow kernel: that is said
    by a warning, as it is if all of them have a fault.
    """
    if "wgmma.mma_async" not in ptx:
        return image
    faults = wgmma_faults(image)
    if not faults:
        return image
    nvidia = triton.knobs.nvidia
    for tool, options in ((nvidia.ptxas_blackwell.path, ()), (nvidia.ptxas.path, ("--opt-level=0",))):
        other = assembled(ptx, tool, options)
        if not wgmma_faults(other):
            if options:
                _warn(f"{name} is not optimized, and slow: its optimized machine code has {faults[0]}.")
            return other
    _warn(f"{name} may be wrong: its machine code has {faults[0]}.")
    return image


def _warn(what: str) -> None:
    warn(f"{what} TRITON_PTXAS_PATH may name another assembler.", RuntimeWarning)


def assembled(ptx: str, tool: str, options: tuple[str, ...] = ()) -> bytes:
    """PTX for sm_90 to a cubin, with what Triton itself asks of its assembler, and `options`."""
    with tempfile.TemporaryDirectory() as folder:
        source, image = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [tool, *options, "-lineinfo", "--gpu-name=sm_90a", str(source), "-o", str(image)]
        subprocess.run(command, check=True, capture_output=True)
        return image.read_bytes()
