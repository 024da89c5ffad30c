"""Triton's specialization of a launch: which properties of its arguments are compiled into the kernel.

These are their types, integers equal to 1, and whether integers and addresses are multiples of 16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import mangle_type

from attncc.runtime.arguments import is_box

#: what integers and addresses are looked at for being multiples of
ALIGNED = 16
_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bool: "*u1",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Signature:
    """The specialization of one launch: of each parameter its type ("constexpr" for what is compiled in), whether it is
    a multiple of 16, and its value if it is compiled in; then the compiler's options."""

    types: tuple[str, ...]
    aligned: tuple[bool, ...]
    constants: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def runtime(self) -> tuple[int, ...]:
        """The positions of the parameters that a launch passes."""
        return tuple(i for i, kind in enumerate(self.types) if kind != "constexpr")


def signature(kernel: Any, arguments: Sequence[Any], meta: Mapping[str, Any]) -> Signature | None:
    """How Triton specializes a launch; None where an argument is neither a tensor, a descriptor nor a number."""
    types, aligned, constants = [], [], []
    names = set()
    for position, parameter in enumerate(kernel.params):
        names.add(parameter.name)
        if parameter.is_constexpr:
            value = meta[parameter.name]
            if not isinstance(value, int | float | str | tl.dtype | None):
                return None
            kind, sixteen, constant = "constexpr", False, value
        else:
            value = arguments[position]
            found = _specialized(value, not parameter.do_not_specialize)
            if found is None:
                return None
            kind, sixteen = found
            constant = value if kind == "constexpr" else None
        types.append(kind)
        aligned.append(sixteen)
        constants.append(constant)
    options = tuple(sorted((name, value) for name, value in meta.items() if name not in names))
    return Signature(tuple(types), tuple(aligned), tuple(constants), options)


def _specialized(value: Any, specialize: bool) -> tuple[str, bool] | None:
    """Type and alignment of one argument."""
    if isinstance(value, Tensor):
        kind = _POINTERS.get(value.dtype)
        return None if kind is None else (kind, specialize and value.data_ptr() % ALIGNED == 0)
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, int):
        if specialize and value == 1:
            return "constexpr", False
        kind = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
        return kind, specialize and value % ALIGNED == 0
    if isinstance(value, float):
        return "fp32", False
    if is_box(value):
        return mangle_type(value), False
    return ("constexpr", False) if value is None else None
