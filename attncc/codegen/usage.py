"""The registers and spills of a compiled kernel, read from its machine code."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

#: attributes of a kernel in a cubin's `.nv.info`, whose values are pairs of a symbol and a number
_REGISTERS, _STACK_BYTES = 0x2F, 0x12
#: an attribute's form: with a value behind it, of so many bytes as its head says
_WITH_VALUE = 0x04
#: what the stack is a multiple of
_STACK_ALIGNED = 8
_LOCAL_ARRAY = re.compile(r"^\s*\.local\b[^;\[]*\[(\d+)\];", re.M)


@dataclass(frozen=True)
class Usage:
    """Registers a thread has, and bytes of them that it keeps in memory meanwhile: spilled ones."""

    registers: int
    spills: int


def usage_of_cubin(image: bytes, ptx: str) -> Usage:
    """That of a cubin with one kernel, and of the PTX that it was assembled from, whose own arrays (such as a cosine's,
    of large angles) are no spills; ValueError for something else."""
    found = dict(_attributes(image))
    if not {_REGISTERS, _STACK_BYTES} <= set(found):
        raise ValueError("this is not a cubin with a kernel")
    arrays = sum(int(size) for size in _LOCAL_ARRAY.findall(ptx))
    stack = -(-arrays // _STACK_ALIGNED) * _STACK_ALIGNED
    return Usage(found[_REGISTERS], max(found[_STACK_BYTES] - stack, 0))


def usage_of_amdgcn(text: str) -> Usage:
    """That of AMD's assembly."""
    registers, spills = (re.search(rf"\.vgpr_{what}:\s*(\d+)", text) for what in ("count", "spill_count"))
    return Usage(int(registers[1]) if registers else 0, 4 * int(spills[1]) if spills else 0)


def _attributes(image: bytes) -> Iterator[tuple[int, int]]:
    """Of each attribute in `.nv.info` that has a symbol and a number: which one, and the number."""
    if image[:4] != b"\x7fELF":
        return
    (headers,) = struct.unpack_from("<Q", image, 0x28)
    size, count, names = struct.unpack_from("<HHH", image, 0x3A)
    # of a section header: its name, type, flags, address, offset, size
    sections = [struct.unpack_from("<IIQQQQ", image, headers + i * size) for i in range(count)]
    texts = sections[names][4]
    for name, _, _, _, at, length in sections:
        if image[texts + name : texts + name + 9] != b".nv.info\0":
            continue
        end = at + length
        while at < end:
            form, attribute, bytes_behind = struct.unpack_from("<BBH", image, at)
            at += 4
            if form == _WITH_VALUE:
                if bytes_behind == 8:
                    yield attribute, struct.unpack_from("<II", image, at)[1]
                at += bytes_behind
