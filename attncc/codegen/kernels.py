"""Template slots of small kernels: gradients of inputs with an entry per pair, tables, block extremes, loop bounds."""

from __future__ import annotations

import textwrap
from typing import Any

import sympy

from attncc.codegen.backward import tile_slots
from attncc.codegen.bounds import BoundLines, summary_offset
from attncc.codegen.chunks import Chunk
from attncc.codegen.lower import Leaf, Lowering
from attncc.codegen.pairs import base_leaves, edge
from attncc.codegen.plan import InputGradient, Plan
from attncc.codegen.similarity import VectorGradient
from attncc.ir import symbols as sym
from attncc.ir.levels import Level
from attncc.ir.text import formula
from attncc.ir.vocabulary import Read
from attncc.passes.distances import DISTANCE, Tables
from attncc.passes.tiles import TilePlan

#: columns of a comment that is wrapped
_COMMENT = 110


def pair_slots(
    plan: Plan, qk_chunks: tuple[Chunk, ...], gradient: InputGradient, band: VectorGradient | None = None
) -> dict[str, Any]:
    """Slots of pair_grad.py.j2, for one element read that varies by pair. `band`: the table of distances, if a sum over
    components reads it; `gradient` then has the cotangent of that sum."""
    edges = [edge("q_idx", True), edge("kv_idx", True)]
    common = tile_slots(
        plan,
        qk_chunks,
        True,
        [gradient],
        plan.over_keys,
        "BLOCK_N",
        edges,
        "q_idx < q_len",
        in_loop=False,
        band=band,
    )
    operand = band is not None and not band.looped and sym.Q_VEC in band.expr.free_symbols
    return {
        **common,
        "reads_q": common["reads_q"] or operand,
        "by_component": band is not None and band.vector,
        "gradient": gradient,
        "by_b": sym.B in gradient.read.free_symbols,
        "by_h": bool({sym.H, sym.H_KV} & gradient.read.free_symbols),
    }


def table_slots(plan: Plan, qk_chunks: tuple[Chunk, ...], band: VectorGradient) -> dict[str, Any]:
    """Slots of pair_grad.py.j2, for a table of distances (`band`) that a sum over components reads."""
    (cotangent,) = (e for s, e in plan.backward.dsums if band.loop is not None and s == band.loop.symbol)
    return pair_slots(plan, qk_chunks, InputGradient(band.read, cotangent, "band", band.number), band)


def summary_slots(plan: Plan, read: sympy.Expr, axis: sympy.Symbol) -> dict[str, Any]:
    """Slots of summary.py.j2: the minima and maxima, per block of an axis, of an integer read that varies along it."""
    along = axis.name
    leaves = base_leaves(plan, {})
    lowering = Lowering(plan.core, leaves, rows_first=axis == sym.Q_IDX)
    value = lowering.emit(read)
    return {
        "axis": along,
        "length": "q_len" if axis == sym.Q_IDX else "kv_len",
        "lines": [*lowering.outer, *lowering.body],
        "value": value,
        "offset": summary_offset(read),
        "input": read.input if isinstance(read, Read) else None,
        "by_head": summary_offset(read) != "b",
        "helpers": lowering.helpers,
        "what": formula(read),
    }


def distance_slots(plan: Plan, tables: Tables) -> dict[str, Any]:
    """Slots of distances.py.j2: the tables, indexed by distance, that other kernels read."""
    leaves = base_leaves(plan, {DISTANCE.name: Leaf(DISTANCE.name, Level.ROW)})
    lowering = Lowering(plan.core, leaves)
    formulas = tables.of_distance
    lowering.count(formulas)
    values = [lowering.emit(e, Level.ROW) for e in formulas]
    return {
        "tables": [
            {"value": value, "what": [f"# {line}" for line in textwrap.wrap(formula(e), _COMMENT)], "number": i}
            for i, (value, e) in enumerate(zip(values, tables.formulas, strict=True))
        ],
        "lines": [*lowering.outer, *lowering.body],
        "by_batch": tables.by_batch,
        "by_head": tables.by_head,
        "helpers": lowering.helpers,
    }


def bounds_slots(tile: TilePlan, bounds: BoundLines, packed: bool) -> dict[str, Any]:
    """Slots of bounds.py.j2: the scan of a mask that reads inputs, for the blocks of one axis. `packed`: the query
    heads of a group are rows of one block."""
    by_rows = tile.outer == sym.Q_IDX
    return {
        "bounds": bounds,
        "outer": tile.outer.name,
        "inner": tile.inner.name,
        "length": "q_len" if by_rows else "kv_len",
        "block": "BLOCK_M" if by_rows else "BLOCK_N",
        "inner_block": "BLOCK_N" if by_rows else "BLOCK_M",
        "stored": bounds.stored,
        "by_head": tile.by_head,
        "packed": packed,
        "summaries": [{"index": i} for i, _ in enumerate(tile.summaries)],
    }
