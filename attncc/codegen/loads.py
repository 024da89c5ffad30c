"""Reads of inputs in generated code: pointers, guards, and tiles of inputs with an entry per pair or per distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy

from attncc.codegen.texts import unwrap, wrap
from attncc.ir import symbols as sym
from attncc.ir.graph import VariantGraph
from attncc.ir.levels import Level
from attncc.ir.vocabulary import ByDistance, Read

if TYPE_CHECKING:
    from attncc.codegen.lower import Lowering

#: a longer guard of a load gets a name
_LONG_GUARD = 85


@dataclass(frozen=True)
class MapTile:
    """A tile, called `name`, of an input with an entry per pair. `text`: its load by pointers; `at`: the loop
    dimensions of the input's dimensions but the last two."""

    name: str
    input: str
    text: str
    at: tuple[str, ...]


def is_map(expr: Read, graph: VariantGraph) -> bool:
    """Whether an input is read at q_idx and kv_idx, and in its other dimensions at the program's own indices."""
    plain = tuple(str(i) for i in expr.index) == graph.input(expr.input).pattern
    return plain and {sym.Q_IDX, sym.KV_IDX} <= set(expr.index)


def read(scope: Lowering, expr: Read, level: Level) -> str:
    """A load, as text. Past the ends of a sequence, and outside the tensor, it gives the input's value `beyond`."""
    decl = scope.graph.input(expr.input)
    if scope.whole and level == Level.PAIR and _is_map(scope, expr):
        return _read_map(scope, expr)
    offsets, guards = [], []
    for dim, (pattern, index) in enumerate(zip(decl.pattern, expr.index, strict=True)):
        at = scope.level_of(index)
        text = scope.operand(index, level, False)
        plain = isinstance(index, sympy.Symbol) and index.name == pattern
        if at == Level.PAIR and not text.isidentifier():  # a pointer and two guards read it
            name = scope.fresh(f"{decl.name}_at")
            scope.define(name, unwrap(text), index, at)
            text = name
            scope.remember(index, name, at)
        if index == sym.COMPONENT:
            guards.append(f"({text} < HEAD_DIM_QK)")
        elif plain and pattern in ("q_idx", "kv_idx"):
            guards.append(f"({text} < {'q_len' if pattern == 'q_idx' else 'kv_len'})")
        elif not plain:
            guards.append(f"({text} >= 0) & ({text} < size_{decl.name}_{dim})")
        if at == Level.PROGRAM:
            offsets.append(f"{wrap(text)} * stride_{decl.name}_{dim}")
        else:
            scope.helpers.add("_offset")
            offsets.append(f"_offset({text}, stride_{decl.name}_{dim}, WIDE)")
    pointer = " + ".join([decl.name.upper() + "_PTR", *offsets])
    inside = " & ".join(guards)
    if len(inside) > _LONG_GUARD:
        name = scope.fresh(f"{decl.name}_inside")
        scope.define(name, inside, expr, level)
        inside = name
    mask = f", mask={inside}, other={decl.beyond}" if guards else ""
    load = f"tl.load({pointer}{mask})"
    if decl.dtype == "int":
        scope.helpers.add("_integer")
        return f"_integer({load})"
    return f"{load}.to(tl.float32)"


def _is_map(scope: Lowering, expr: Read) -> bool:
    fixed = [i for i in expr.index if i not in (sym.Q_IDX, sym.KV_IDX)]
    return is_map(expr, scope.graph) and all(scope.level_of(i) == Level.PROGRAM for i in fixed)


def _read_map(scope: Lowering, expr: Read) -> str:
    """A load of a tile of a map: one pointer per index of the block's axis, clamped to the last index of the tensor."""
    decl = scope.graph.input(expr.input)
    strides = {i: f"stride_{decl.name}_{d}" for d, i in enumerate(expr.index)}
    lengths = {sym.Q_IDX: "q_len", sym.KV_IDX: "kv_len"}
    along, across = (sym.Q_IDX, sym.KV_IDX) if scope.rows_first else (sym.KV_IDX, sym.Q_IDX)
    others = [i for i in expr.index if i not in lengths]
    start = [f"{decl.name.upper()}_PTR", *(f"{scope.leaves[i.name].name} * {strides[i]}" for i in others)]
    start.append(f"_wide(tl.minimum({scope.leaves[along.name].name}, {lengths[along]} - 1)) * {strides[along]}")
    lines = scope.fresh(f"{decl.name}_lines")
    scope.define(lines, " + ".join(start), sympy.Tuple(along, *others), scope.leaves[along.name].level)
    at = scope.leaves[across.name].name
    scope.helpers.add("_pairs")
    tile = f"_pairs({lines}, {at}, {strides[across]}, {lengths[across]}, {scope.whole})"
    name = scope.fresh(f"{decl.name}_tile") if scope.maps is not None or scope.ahead is not None else tile
    if scope.maps is not None and expr.index[-2:] == (sym.Q_IDX, sym.KV_IDX) and decl.dtype == "float":
        scope.maps.append(MapTile(name, decl.name, tile, decl.pattern[:-2]))
        tile = name
    elif scope.ahead is not None:
        scope.ahead.append(f"{name} = {tile}")
        tile = name
    if decl.dtype == "int":
        scope.helpers.add("_integer")
        return f"_integer({tile})"
    return f"{tile}.to(tl.float32)"


def by_distance(scope: Lowering, expr: Any, level: Level) -> str:
    """A load of a tile of a table by distance: one pointer per row, with constant offsets for its columns."""
    number, column, row, shift = expr.args
    key = ByDistance(number, *[sympy.S.Zero] * 3)  # the table's entry of distance 0
    start = scope.known(key)
    if start is None:
        line = "b * heads + h" if scope.tables.by_batch else "h" if scope.tables.by_head else "0"
        count = len(scope.tables.formulas)
        if count > 1:
            line = " + ".join([*([f"{wrap(line)} * {count}"] if line != "0" else []), str(number)])
        name = scope.fresh("at_distance")
        scope.helpers.add("_by_distance")
        heads = sym.H if scope.tables.by_head or scope.tables.by_batch else sympy.S.Zero
        scope.define(name, f"_by_distance(DISTANCES_PTR, {line}, q_len, kv_len)", heads, Level.PROGRAM)
        start = name
        scope.remember(key, name, Level.PROGRAM)
    q, kv = scope.leaves[row.name].name, scope.leaves[column.name].name
    moved = None if shift == 0 else scope.leaves[shift.name].name
    if scope.rows_first:
        row = f"({moved} + _minus({q}))" if moved else f"_minus({q})"
        entries = f"({start} + {row})[:, None] + _wide({kv})[None, :]"
        return f"_entries({entries})" if scope.fragments else f"tl.load({entries})"
    row = f"({moved} + _wide({kv}))" if moved else f"_wide({kv})"
    return f"tl.load(({start} + {row})[:, None] + _minus({q})[None, :])"
