"""NVIDIA machine code (SASS) as instructions: the registers that each reads and writes, and its branch targets.

Disassembled by nvdisasm from the triton package; a line is `/*0b40*/ @!P0 IADD3 R4, P1, R36, UR6, RZ ;`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton

_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"(\.L_\w+):")
#: `(.L_x_1) of a jump; of one by a table (*"BRANCH_TARGETS .L_x_2,.L_x_3"*)
_TARGET = re.compile(r"\.L_\w+")
_REGISTER = re.compile(r"\b(U?R)(\d+)\b(\.64)?")
_WGMMA = re.compile(r"[HQIB]GMMA\.")
_PREDICATE = re.compile(r"!?U?P(\d|T)$")
#: instructions whose first operands are predicates, and which write no register
_PREDICATES = re.compile(r"(U?[IFHD]SETP|U?PLOP3|R2P|U?VOTE\.(?!.*\bU?R))")
_STORES = ("ST", "RED", "LDGSTS", "BAR", "WARPSYNC", "SYNCS", "UTMA", "UBLKCP", "UBLKRED")


@dataclass(frozen=True)
class Instruction:
    """One instruction. guard: its predicate or ""; next: the indices of the instructions that may follow it."""

    address: int
    guard: str
    name: str
    operands: tuple[str, ...]
    next: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.address:#06x}: {self.guard + ' ' if self.guard else ''}{self.name} {', '.join(self.operands)}"

    @cached_property
    def is_wgmma(self) -> bool:
        """Whether it is a warpgroup's matmul."""
        return bool(_WGMMA.match(self.name))

    @cached_property
    def values(self) -> tuple[str, ...]:
        """Its operands without predicates and the barrier of a group."""
        skip = 0
        while skip < len(self.operands) and _PREDICATE.match(self.operands[skip]):
            skip += 1
        # a carry may follow the register: IADD3 R4, P1, R36, ...
        rest = self.operands[skip:]
        return rest[:1] + tuple(x for x in rest[1:] if not _PREDICATE.match(x) and not x.startswith("gsb"))

    @cached_property
    def writes(self) -> tuple[str, ...]:
        """The registers that it writes."""
        if self.name.startswith(_STORES) or _PREDICATES.match(self.name) or not self.values:
            return ()
        return span(self.values[0], self._written)

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """The registers that it reads; for a wgmma, without those of the accumulator that it updates."""
        sources = self.values if not self.writes else self.values[1:]
        if self.is_wgmma:
            left, begun = sources[0], sources[-1]
            own = span(left, 4) if left.startswith("R") else ()
            return own if begun == self.values[0] else own + span(begun, len(self.writes))
        found: list[str] = []
        for k, text in enumerate(sources):
            # a product of two 32-bit values has a 64-bit addend
            size = 1 if ".WIDE" in self.name and k < 2 else self.size
            for match in _REGISTER.finditer(text):
                wide = 2 if match[3] else size if "[" not in text else 1
                found += span(match[1] + match[2], wide)
        return tuple(found)

    @property
    def _written(self) -> int:
        if self.is_wgmma:
            return self.columns * (4 if ".F32" in self.name or self.name.startswith("I") else 2) // 8
        if ".MMA" in self.name or self.name.startswith(("HMMA", "IMMA", "DMMA", "QMMA")):
            return 4
        return self.size

    @property
    def size(self) -> int:
        """The number of registers of a value."""
        if self.is_wgmma or self.name.startswith(("HMMA", "IMMA", "QMMA")) or ".128" in self.name:
            return 4
        matrices = re.search(r"(?:LDSM|STSM)\S*\.(\d)$", self.name)
        if matrices:
            return int(matrices[1])
        return 2 if ".64" in self.name or ".WIDE" in self.name or self.name.startswith("CS2R") else 1

    @property
    def columns(self) -> int:
        """The number of columns of a wgmma's accumulator."""
        return int(self.name.split(".")[1].split("x")[1])


def span(register: str, count: int) -> tuple[str, ...]:
    """The names of `count` consecutive registers from `register`; () for RZ, an address or a number."""
    match = re.match(r"-?\|?(U?R)(\d+)", register)
    return tuple(f"{match[1]}{int(match[2]) + i}" for i in range(count)) if match else ()


def disassemble(binary: bytes) -> list[Instruction]:
    """The instructions of a cubin with one kernel."""
    text = _printed(binary, "--no-dataflow")
    # the targets of a jump by a table need nvdisasm's dataflow analysis, which doubles its time
    return parse(_printed(binary) if re.search(r"\bBRX\b", text) else text)


def _printed(binary: bytes, *options: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), "--print-code", *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(text: str) -> list[Instruction]:
    """The instructions that nvdisasm printed, and the control flow between them."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := _LINE.match(line):
            operands = tuple(x.strip().replace(".reuse", "") for x in match[4].split(",")) if match[4] else ()
            found.append(Instruction(int(match[1], 16), match[2] or "", match[3], operands))
    return [
        Instruction(x.address, x.guard, x.name, x.operands, _next(i, x, labels, len(found)))
        for i, x in enumerate(found)
    ]


def _next(i: int, x: Instruction, labels: dict[str, int], count: int) -> tuple[int, ...]:
    kind = x.name.split(".")[0]
    # the target of BSSY is where threads reconverge, after the BSYNC that they reach
    targets = [] if kind == "BSSY" else [labels.get(t, count) for t in _TARGET.findall(" ".join(x.operands))]
    # BRA P0, `(.L_x_1) has a condition too
    always = not x.guard and (kind in ("EXIT", "RET", "BRX") or (kind == "BRA" and len(x.operands) == 1))
    found = targets if always or i + 1 == count else [*targets, i + 1]
    return tuple(to for to in dict.fromkeys(found) if to < count)
