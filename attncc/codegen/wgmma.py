"""Detect miscompiled wgmma instructions in the machine code of kernels for sm_90.

Two bugs of ptxas, the assembler, are detected. Both leave the PTX right and the results wrong.

*The upper half of a descriptor.* A wgmma reads an operand in shared memory through a 64-bit descriptor. Its lower half
is an address; its upper half holds swizzle and stride, which are constants (PTX ISA, "matrix descriptor format"). ptxas
of CUDA 12.8 adds the steps along an operand in two halves and, if the address was zero-extended from 32 bits, may use
the address in place of the zeros:

    UIADD3   UR4, UP0, UR5, 0x40, URZ
    UIADD3.X UR5, UR5, -0x7fffffe0, URZ, UP0

All steps but the first then read a wrong or invalid address. CUDA 12.9 and later use a zero. This was found in
delta_net with chunks of 64 tokens, whose results were wrong on an H100; flash-linear-attention's pull request 1262
reports wrong addresses with the same release. The check: the upper half of a descriptor must be a constant.

*A register in flight.* A wgmma is asynchronous until a wait covers its group. ptxas of CUDA 12.9 may reuse the
registers of an operand before that (fixed in CUDA 13.3, see its release notes; Triton's pull request 11781). The check:
until the wait, no instruction writes registers of an operand, and none reads or writes those of an accumulator, except
the next wgmma of the same accumulator.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from attncc.codegen.sass import Instruction, disassemble
from attncc.codegen.sass_values import Known, Value, known_before, states_before

_ANY = Value(frozenset({"any"}), 0)
#: the most groups in flight that are counted
_GROUPS = 8
#: by the index of a wgmma in flight: the number of groups closed since it was issued, including its own
Flying = dict[int, int]


@dataclass(frozen=True)
class Fault:
    """A fault of an instruction."""

    instruction: str
    what: str

    def __str__(self) -> str:
        return f"{self.instruction}: {self.what}"


def wgmma_faults(binary: bytes) -> tuple[Fault, ...]:
    """The faults of a cubin for sm_90; () for one without wgmma."""
    return faults_of(disassemble(binary))


def faults_of(code: list[Instruction]) -> tuple[Fault, ...]:
    """The faults of a kernel's instructions, in their order."""
    if not any(x.is_wgmma for x in code):
        return ()
    found = [
        (i, Fault(str(code[i]), what))
        for i, known in known_before(code)
        if code[i].is_wgmma
        for what in _descriptors(code[i], known)
    ]
    registers = {i: (frozenset(x.writes), frozenset(x.reads)) for i, x in enumerate(code) if x.is_wgmma}
    found += [
        (i, Fault(str(code[i]), what))
        for i, flying in states_before(code, _fly, _soonest)
        if flying
        for what in _clashes(code, code[i], flying, registers)
    ]
    return tuple(fault for _, fault in sorted(found, key=lambda entry: entry[0]))


def _descriptors(x: Instruction, known: Known) -> list[str]:
    """Faults for the upper halves of a wgmma's descriptors that are not constants: the descriptor of its right operand,
    and that of its left operand if this is in shared memory."""
    gdesc = next(re.match(r"gdesc\[UR(\d+)\]", v) for v in x.operands if v.startswith("gdesc"))
    if gdesc is None:  # gdesc[URZ]: only closes a group whose sums are never read
        return []
    first = int(gdesc[1])
    halves = {"right": first + 3} if x.operands[1].startswith("R") else {"left": first + 1, "right": first + 3}
    return [
        f"the swizzle and stride of its {side} operand, in UR{register}, are no constant"
        for side, register in halves.items()
        if known.get(f"UR{register}", _ANY).unknown
    ]


def _soonest(a: Flying, b: Flying) -> Flying:
    return {i: min(a.get(i, _GROUPS), b.get(i, _GROUPS)) for i in a.keys() | b.keys()}


def _fly(i: int, x: Instruction, flying: Flying) -> None:
    if x.is_wgmma:
        flying[i] = 0
        if any(v.startswith("gsb") for v in x.operands):  # the group is closed
            for k, n in flying.items():
                flying[k] = min(n + 1, _GROUPS)
    elif x.name.startswith("WARPGROUP.DEPBAR"):
        left = int(x.operands[-1], 16)
        for k in [k for k, n in flying.items() if n > left]:
            del flying[k]


def _clashes(
    code: list[Instruction],
    x: Instruction,
    flying: Flying,
    registers: dict[int, tuple[frozenset[str], frozenset[str]]],
) -> list[str]:
    """Faults for the registers of wgmmas in flight that an instruction touches but must not. `registers`: those of the
    accumulator and of the operands, by the index of the wgmma."""
    writes, reads = frozenset(x.writes), frozenset(x.reads)
    found = []
    for i in flying:
        sums, operands = registers[i]
        if writes & operands:
            found.append(f"writes an operand of the wgmma at {code[i].address:#06x}, which is in flight")
        if (reads | (writes if not (x.is_wgmma and writes == sums) else frozenset())) & sums:
            found.append(f"touches the sum of the wgmma at {code[i].address:#06x}, which is in flight")
    return found
