"""The registers and spills of a compiled kernel, read from its machine code."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

#: two attributes of a kernel in a cubin's `.nv.info`; their values are pairs of a symbol and a number
_REGISTERS, _STACK_BYTES = 0x2F, 0x12
#: the form of an attribute that is followed by a value, whose number of bytes is in the attribute's head
_WITH_VALUE = 0x04
#: the stack's size is a multiple of this
_STACK_ALIGNED = 8
_LOCAL_ARRAY = re.compile(r"^\s*\.local\b[^;\[]*\[(\d+)\];", re.M)


@dataclass(frozen=True)
class Usage:
    """Registers per thread, and bytes per thread that are spilled to memory."""

    registers: int
    spills: int


def usage_of_cubin(image: bytes, ptx: str) -> Usage:
    """The usage of a cubin with one kernel; ValueError for something else. `ptx` is its source: arrays that it declares
    in local memory, such as those for cosines of large angles, are not counted as spills."""
    found = dict(_attributes(image))
    if not {_REGISTERS, _STACK_BYTES} <= set(found):
        raise ValueError("this is not a cubin with a kernel")
    arrays = sum(int(size) for size in _LOCAL_ARRAY.findall(ptx))
    stack = -(-arrays // _STACK_ALIGNED) * _STACK_ALIGNED
    return Usage(found[_REGISTERS], max(found[_STACK_BYTES] - stack, 0))


def usage_of_amdgcn(text: str) -> Usage:
    """The usage of a kernel in AMD's assembly."""
    registers, spills = (re.search(rf"\.vgpr_{what}:\s*(\d+)", text) for what in ("count", "spill_count"))
    return Usage(int(registers[1]) if registers else 0, 4 * int(spills[1]) if spills else 0)


def _attributes(image: bytes) -> Iterator[tuple[int, int]]:
    """(attribute, number) of each attribute in `.nv.info` whose value is a symbol and a number."""
    if image[:4] != b"\x7fELF":
        return
    (headers,) = struct.unpack_from("<Q", image, 0x28)
    size, count, names = struct.unpack_from("<HHH", image, 0x3A)
    # a section header: name, type, flags, address, offset, size
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
