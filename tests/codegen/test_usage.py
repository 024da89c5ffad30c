"""Registers and spills, read from machine code."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attncc.codegen.usage import usage_of_amdgcn, usage_of_cubin
from attncc.runtime.interpreter import compiling


@triton.jit
def cosine_kernel(X, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(X + at, tl.cos(tl.load(X + at)))


@triton.jit
def scan_kernel(X, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(X + at[:, None] * N + at[None, :])
    tl.store(X + at[:, None] * N + at[None, :], tl.sort(x) + x)


def compiled(kernel, size, **options):
    with compiling():
        source = ASTSource(kernel, {"X": "*fp32", "N": "constexpr"}, {(1,): size}, {})
        return triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm


def stack(cubin, tmp_path):
    """What NVIDIA's own tool says: registers, and bytes of a thread's stack."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    text = subprocess.run([tool, "--dump-resource-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True)
    return tuple(int(re.search(rf"{what}:(\d+)", text.stdout)[1]) for what in ("REG", "STACK"))


def test_an_array_of_the_kernels_own_is_no_spill(tmp_path):
    asm = compiled(cosine_kernel, 128, num_warps=4)
    registers, on_stack = stack(asm["cubin"], tmp_path)
    assert on_stack > 0
    usage = usage_of_cubin(asm["cubin"], asm["ptx"])
    assert (usage.registers, usage.spills) == (registers, 0)


def test_what_registers_do_not_hold_is(tmp_path):
    asm = compiled(scan_kernel, 32, num_warps=1, maxnreg=32)
    registers, on_stack = stack(asm["cubin"], tmp_path)
    usage = usage_of_cubin(asm["cubin"], asm["ptx"])
    assert (usage.registers, usage.spills) == (registers, on_stack)
    assert on_stack > 0


def test_what_is_no_cubin_is_refused():
    with pytest.raises(ValueError, match="not a cubin"):
        usage_of_cubin(b"something else", "")


def test_amds_are_in_its_text():
    usage = usage_of_amdgcn("    .vgpr_count:     88\n    .vgpr_spill_count: 3\n")
    assert (usage.registers, usage.spills) == (88, 12)
