"""How often a value changes in a kernel: per program, row, column or pair. This decides what a loop can hoist."""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Any

from attncc.ir import symbols as sym


class Level(IntEnum):
    """A lattice: PROGRAM below ROW and COL, both below PAIR."""

    PROGRAM = 0
    ROW = 1
    COL = 2
    PAIR = 3


#: "dp" is dot(dout, v_vec), a value per pair of the backward
_PAIR_NAMES = {s.name for s in (sym.QK, sym.RAW_SCORE, sym.SCORE, sym.WEIGHT)} | {"dp"}
_ROW_NAMES = {sym.Q_IDX.name, sym.Q_VEC.name, "lse", "delta", "dlse"}
_PAIR_SUMS = re.compile(r"(dot|band|pair)_\d+")


def join(a: Level, b: Level) -> Level:
    """The lowest level that is above both or equal."""
    return Level(a | b)


def level_of_name(name: str) -> Level:
    """The level of one symbol. Row reductions and stored row statistics have level ROW."""
    if name in _PAIR_NAMES or _PAIR_SUMS.fullmatch(name):
        return Level.PAIR
    if name in _ROW_NAMES or sym.is_row_name(name) or name.startswith("q_term_"):
        return Level.ROW
    if name in (sym.KV_IDX.name, sym.K_VEC.name) or name.startswith("k_term_") or sym.is_col_name(name):
        return Level.COL
    return Level.PROGRAM


def level(expr: Any) -> Level:
    """The level of an expression of the IR."""
    result = Level.PROGRAM
    for symbol in expr.free_symbols:
        result = join(result, level_of_name(symbol.name))
    return result


def varies_by_key(expr: Any) -> bool:
    """Whether the value differs between the keys of one row."""
    return level(expr) in (Level.COL, Level.PAIR)
