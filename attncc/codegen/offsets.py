"""Distances between a query and a key, split by tile.

A term such as slope * (kv_idx - q_idx) costs a kernel three operations per pair. With each index written as the start
of its tile plus the position in the tile, the term becomes slope * kv_in_tile, one value per column, plus slope *
(tile_shift - q_in_tile), one value per row. They are added to other values per row and column, so that a pair pays for
one addition. Both parts are as large as a tile even if the distance is small. This loses some bits of float32, but is
far more precise than 16-bit kernels, so only those use it.
"""

from __future__ import annotations

import sympy

from attncc.codegen.lower import Leaf
from attncc.ir import symbols as sym
from attncc.ir.levels import Level, level

Q_IN_TILE = sympy.Symbol("q_in_tile", integer=True)
KV_IN_TILE = sympy.Symbol("kv_in_tile", integer=True)
#: the first key of the tile less its first query
TILE_SHIFT = sympy.Symbol("tile_shift", integer=True)

#: the symbols in a kernel; the shift is the same for all pairs of a tile, and differs between tiles
LEAVES = {
    Q_IN_TILE.name: Leaf(Q_IN_TILE.name, Level.ROW),
    KV_IN_TILE.name: Leaf(KV_IN_TILE.name, Level.COL),
    TILE_SHIFT.name: Leaf(TILE_SHIFT.name, Level.PROGRAM),
}
RUNNING = frozenset({TILE_SHIFT.name})
#: the position of a pair by tile: key and query in the tile, and the tile's share of their distance
PLACE = (KV_IN_TILE, Q_IN_TILE, TILE_SHIFT)


def split_distances(expr: sympy.Basic) -> sympy.Basic:
    """`expr` with each multiple of a distance, by a factor that is the same for the whole program, taken apart."""
    if not {sym.Q_IDX, sym.KV_IDX} <= expr.free_symbols:
        return expr
    if expr.is_Mul:
        taken = _taken_apart(expr)
        if taken is not None:
            return taken
    return expr.func(*(split_distances(a) for a in expr.args)) if expr.args else expr


def _taken_apart(product: sympy.Mul) -> sympy.Expr | None:
    distances = [f for f in product.args if {sym.Q_IDX, sym.KV_IDX} <= f.free_symbols]
    if len(distances) != 1:
        return None
    distance = distances[0]
    rest = product / distance
    a, b = distance.coeff(sym.KV_IDX), distance.coeff(sym.Q_IDX)
    others = distance - a * sym.KV_IDX - b * sym.Q_IDX
    linear = distance.is_Add and a.is_number and a + b == 0
    if not linear or level(others) != Level.PROGRAM or level(rest) != Level.PROGRAM:
        return None
    return rest * a * KV_IN_TILE + rest * (a * TILE_SHIFT - a * Q_IN_TILE + others)


def uses_tiles(*exprs: sympy.Basic) -> bool:
    """Whether any expression needs the three symbols of split distances."""
    return any(TILE_SHIFT in e.free_symbols for e in exprs)
