"""Locate faults in a user's Python code, from tracebacks and the source positions in bytecode."""

from __future__ import annotations

import dis
import linecache
import re
from collections.abc import Callable
from dataclasses import replace
from types import CodeType
from typing import Any

from attncc.errors import Span

_OWN = ("attncc.language.", "attncc.ir.", "sympy.", "torch.")


def outside_language(module: str) -> bool:
    """Whether code of this module is the user's, and not the language's own or a library's that it calls."""
    return module != "attncc" and not f"{module}.".startswith(_OWN)


def char_offset(text: str, offset: int) -> int:
    """The column of a UTF-8 byte offset: the compiler counts bytes, a caret stands under characters."""
    return len(text.encode()[:offset].decode(errors="ignore"))


def traceback_span(error: BaseException) -> Span | None:
    """The innermost place of the traceback that lies outside the language: the user's own expression."""
    found = None
    tb = error.__traceback__
    while tb is not None:
        if outside_language(tb.tb_frame.f_globals.get("__name__", "")):
            found = tb
        tb = tb.tb_next
    if found is None:
        return None
    code = found.tb_frame.f_code
    return _span(code.co_filename, list(code.co_positions())[found.tb_lasti // 2])


def return_span(function: Any) -> Span | None:
    """Where a function's result is: the expression whose value its last instruction returns."""
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return None
    last = [i for i in dis.get_instructions(code) if i.opname not in ("RETURN_VALUE", "RETURN_CONST", "CACHE")]
    return _instruction_span(code, last[-1]) if last else None


def use_span(function: Callable[..., Any], name: str) -> Span | None:
    """Where a function first reads its parameter `name`."""
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return None
    for instruction in dis.get_instructions(code):
        used = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
        if instruction.opname.startswith("LOAD") and name in used:
            return _narrowed(_instruction_span(code, instruction), name)
    return None


def _narrowed(span: Span | None, name: str) -> Span | None:
    """The name itself: from Python 3.13 one instruction may load two names, with the place of one of them."""
    found = re.search(rf"\b{name}\b", span.text[span.col :]) if span else None
    if span is None or found is None:
        return span
    return replace(span, col=span.col + found.start(), end_col=span.col + found.end())


def _instruction_span(code: CodeType, instruction: dis.Instruction) -> Span | None:
    position = instruction.positions
    if position is None:
        return None
    return _span(code.co_filename, (position.lineno, position.end_lineno, position.col_offset, position.end_col_offset))


def _span(filename: str, positions: tuple[int | None, int | None, int | None, int | None]) -> Span | None:
    line, end_line, col, end_col = positions
    if line is None or col is None or end_col is None:
        return None
    text = linecache.getline(filename, line).rstrip("\n")
    end = char_offset(text, end_col) if end_line == line else len(text)
    return Span(filename, line, char_offset(text, col), end, text)
