"""The work of a variant, counted from its expressions: operations per pair, and the tiles that its mask leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import sympy

from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc
from attncc.ir.graph import VariantGraph
from attncc.ir.levels import Level, level
from attncc.ir.vocabulary import ByDistance, Read
from attncc.passes.fold import exp2, with_sign
from attncc.passes.numeric import evaluate
from attncc.passes.tiles import OUTER_HI, OUTER_LO, BlockMax, BlockMin, Range, TilePlan
from attncc.passes.work import LiveTiles, PairCosts

# If data decides which tiles are live, one in this many is assumed to be: documents of an eighth to a half of a row.
SCANNED = 4

# Integer operations that take as long as a load from a table by distance, which hits the L1 cache.
TABLE_WORK = 3
# Instructions of a division by a constant, which is a multiplication, and of one by a value unknown at compile time.
CONSTANT_DIVISION, DIVISION = 4, 20
# Instructions that copy the sign of another value.
SIGN = 3

_BOOLEAN_OPERATIONS = (sympy.And, sympy.Or, sympy.Not)


def pair_costs(exprs: Iterable[Any], pair_names: frozenset[str]) -> PairCosts:
    """Operations per pair, with each shared value counted once. `pair_names`: symbols that vary by pair, besides the
    IR's."""
    seen: set[Any] = set()
    fma = sfu = integer = loads = tables = 0.0
    stack = list(exprs)
    while stack:
        e = stack.pop()
        if e in seen or not e.args:
            continue
        seen.add(e)
        stack.extend(e.args)
        if not _by_pair(e, pair_names):
            continue
        if isinstance(e, Read):
            loads += 1
            integer += 2 * len(e.index)
        elif isinstance(e, ByDistance):
            tables += 1
            integer += TABLE_WORK
        elif isinstance(e, voc.floordiv | voc.mod):
            integer += CONSTANT_DIVISION if e.args[1].is_number else DIVISION
        elif isinstance(e, sympy.core.relational.Relational | sympy.And | sympy.Or | sympy.Not) or (
            not isinstance(e, voc.where) and e.is_integer
        ):
            integer += max(len(e.args) - 1, 1)
        elif e.is_Add or e.is_Mul:
            fma += len(e.args) - 1
        elif e.is_Pow:
            fma += 1 if e.exp.is_Integer and e.exp > 0 else 0
            sfu += 0 if e.exp.is_Integer and e.exp > 0 else 1
        elif isinstance(e, exp2):
            sfu += 1
        elif isinstance(e, with_sign):
            fma += SIGN
        elif type(e) in voc.SFU_COST:
            sfu += voc.SFU_COST[type(e)]
        else:
            fma += 1
    return PairCosts(fma=fma, sfu=sfu, int=integer, loads=loads, tables=tables)


def _by_pair(expr: Any, pair_names: frozenset[str]) -> bool:
    return level(expr) == Level.PAIR or any(s.name in pair_names for s in expr.free_symbols)


def live_tiles(
    plan: TilePlan, graph: VariantGraph, heads: int, q_len: int, kv_len: int, scalars: Mapping[str, Any]
) -> Callable[[int, int], LiveTiles]:
    """A function from (block_m, block_n) to the tiles of one head, over the blocks of the plan's outer axis.

    Values that depend on data are estimated: an input read once per program counts as half the keys, and a scanned mask
    leaves one in `SCANNED` tiles of its closed-form hull.
    """
    known: dict[str, Any] = {
        sym.Q_LEN.name: q_len,
        sym.KV_LEN.name: kv_len,
        sym.NUM_HEADS.name: heads,
        sym.H.name: heads // 2,
        sym.H_KV.name: 0,
        sym.B.name: 0,
        **{s.name: scalars.get(s.name, s.default) for s in graph.scalars},
    }
    half = sympy.Integer(kv_len // 2)

    def settle(expr: Any) -> Any:
        return expr.xreplace(dict.fromkeys(expr.atoms(Read, BlockMin, BlockMax), half))

    def ends(r: Range) -> tuple[Any, Any]:
        return settle(r.lo), settle(r.hi)

    segments = [(ends(s.live), ends(s.full) if s.full else None, settle(s.may), settle(s.must)) for s in plan.segments]

    def evaluate_over(expr: Any, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
        return np.broadcast_to(evaluate(expr, {**known, OUTER_LO.name: lo, OUTER_HI.name: hi}), lo.shape)

    def count(block_m: int, block_n: int) -> LiveTiles:
        by_rows = plan.inner == sym.KV_IDX
        outer, inner = (block_m, block_n) if by_rows else (block_n, block_m)
        outer_len, inner_len = (q_len, kv_len) if by_rows else (kv_len, q_len)
        lo = np.arange(0, outer_len, outer, dtype=np.int64)
        hi = np.minimum(lo + outer, outer_len) - 1
        tiles = -(-inner_len // inner)
        live = np.zeros((lo.size, tiles), dtype=bool)
        full = np.zeros_like(live)
        at = np.arange(tiles)[None, :]

        def inside(r: tuple[Any, Any], whole: bool) -> np.ndarray:
            first = np.maximum(evaluate_over(r[0], lo, hi), 0)[:, None]
            last = np.minimum(evaluate_over(r[1], lo, hi), inner_len - 1)[:, None]
            if whole:
                return (at * inner >= first) & (at * inner + inner - 1 <= last)
            return (at * inner <= last) & (at * inner + inner - 1 >= first)

        for live_range, full_range, may, must in segments:
            live |= inside(live_range, False) & evaluate_over(may, lo, hi).astype(bool)[:, None]
            if full_range is not None:
                full |= inside(full_range, True) & evaluate_over(must, lo, hi).astype(bool)[:, None]
        if plan.scanned:
            live &= (np.cumsum(live, axis=1) - 1) % SCANNED == 0
        full &= live
        return LiveTiles(int(full.sum()), int((live & ~full).sum()), live.size)

    return count
