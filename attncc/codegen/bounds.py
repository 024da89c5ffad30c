"""The loop bounds of a block, as lines of Triton: the tiles to visit, and those among them that need no mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean

from attncc.codegen.lower import Leaf, Lowering
from attncc.ir import symbols as sym
from attncc.ir.levels import Level
from attncc.passes.intervals import Truth
from attncc.passes.tiles import (
    INNER_HI,
    INNER_LO,
    OUTER_HI,
    OUTER_LO,
    BlockMax,
    BlockMin,
    Segment,
    TilePlan,
)

_FAR = 2147483647


#: the values that a bounds kernel stores for each range of each block
STORED = ("live_begin", "live_end", "full_begin", "full_end")


@dataclass(frozen=True)
class BoundLines:
    """`setup` computes mixed_tiles and full_tiles; `mixed` and `full` turn the loop counter `i` into `tile`.

    If a separate kernel finds the bounds, once per block, `scan` holds its lines, `stored` the names of the values that
    it stores, and `setup` loads them.
    """

    setup: tuple[str, ...]
    mixed: tuple[str, ...]
    full: tuple[str, ...]
    scan: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()


def bound_lines(plan: TilePlan, kernel: Lowering, block: str, inside: str, apart: bool = False) -> BoundLines:
    """Lines for one kernel. `block`: the constexpr of the inner block's size; `inside`: the condition that a row of the
    outer block lies inside the tensor.

    A mask that must be scanned gets a separate kernel. With `apart`, so do bounds that depend on reads along the outer
    axis, for kernels in which no warp holds all rows of a block.
    """
    scope = _Scope(plan, kernel, block)
    if not plan.scanned and not (apart and plan.outer_reads):
        outer = scope.outer_lines(kernel, inside)
        return _loop_lines([*outer, *scope.range_lines()], len(plan.segments))
    line = "b * heads + h" if plan.by_head else "b"
    blocks, number = ("m_blocks", "m_block") if plan.outer == sym.Q_IDX else ("n_blocks", "n_block")
    tags = [""] if len(plan.segments) == 1 else [f"_{i}" for i in range(len(plan.segments))]
    stored = tuple(f"{name}{tag}" for tag in tags for name in STORED)
    setup = [f"bounds_at = BOUNDS_PTR + (({line}) * {blocks} + {number}) * {len(stored)}"]
    setup += [f"{name} = tl.load(bounds_at + {i})" for i, name in enumerate(stored)]
    found = _loop_lines(setup, len(plan.segments))
    separate = Lowering(kernel.graph, kernel.leaves, kernel.rows_first, kernel.own_axis, helpers=kernel.helpers)
    scanner = _Scope(plan, separate, block)
    reads = scanner.outer_lines(separate, inside)
    ranges = scanner.range_lines()
    scan = (*separate.outer, *separate.body, *reads, *ranges)
    return BoundLines(found.setup, found.mixed, found.full, scan, stored)


class _Scope:
    """Lowers expressions over a block: its ends, and the extremes of its reads over the block and over each tile."""

    def __init__(self, plan: TilePlan, kernel: Lowering, block: str):
        self.plan, self.block = plan, block
        self.length = "kv_len" if plan.inner == sym.KV_IDX else "q_len"
        self.stand_ins: dict[Any, sympy.Symbol] = {}
        leaves = dict(kernel.leaves)
        leaves[OUTER_LO.name] = Leaf("block_lo", Level.PROGRAM)
        leaves[OUTER_HI.name] = Leaf("block_hi", Level.PROGRAM)
        for i, _ in enumerate(plan.outer_reads):
            for op in ("min", "max"):
                leaves[f"own_{op}_{i}"] = Leaf(f"own_{op}_{i}", Level.PROGRAM)
        for i, _ in enumerate(plan.summaries):
            for op in ("min", "max"):
                leaves[f"tile_{op}_{i}"] = Leaf(f"tile_{op}_{i}", Level.PAIR)
        leaves[INNER_LO.name] = Leaf("tile_lo", Level.PAIR)
        leaves[INNER_HI.name] = Leaf("tile_hi", Level.PAIR)
        # both lowerings draw new names from one pool, so that neither shadows the other's
        self.lowering = Lowering(kernel.graph, leaves, helpers=kernel.helpers, _names=kernel._names)

    def outer_lines(self, kernel: Lowering, inside: str) -> list[str]:
        """Lines for the minimum and maximum of each read along the outer axis, over the block's rows."""
        lines = []
        for i, read in enumerate(self.plan.outer_reads):
            values = kernel.emit(read)
            for function, op, far in ((BlockMin, "min", _FAR), (BlockMax, "max", -_FAR)):
                name = f"own_{op}_{i}"
                lines.append(f"{name} = tl.{op}(tl.where({inside}, {values}, {far}), 0)")
                self.stand_ins[function(read)] = sympy.Symbol(name, integer=True)
        return lines

    def range_lines(self) -> list[str]:
        """Lines for the ranges in closed form, then narrowed by the minima and maxima of tiles if the segment scans,
        and sorted if there are several."""
        lines: list[str] = []
        many = len(self.plan.segments) > 1
        for i, segment in enumerate(self.plan.segments):
            tag = f"_{i}" if many else ""
            lines += _segment_lines(segment, self.lowering, self.stand_ins, tag, self.block)
            if segment.scan is not None:
                lines += _scan_lines(
                    self.plan, segment.scan, self.lowering, self.stand_ins, tag, self.block, self.length
                )
        return lines + (_order_lines(len(self.plan.segments)) if many else [])


def _flush(scope: Lowering, lines: list[str]) -> None:
    lines += scope.outer
    scope.outer.clear()


def _segment_lines(
    segment: Segment, scope: Lowering, stand_ins: dict[Any, sympy.Symbol], tag: str, block: str
) -> list[str]:
    lines: list[str] = []

    def text(e: Any, over_rows: str) -> str:
        """A bound. If it differs by row, as with rows of several heads, it is reduced to one that holds for all
        rows."""
        e = e.xreplace(stand_ins)
        result = scope.emit(e)
        _flush(scope, lines)
        if scope.level_of(e) != Level.ROW:
            return result
        if isinstance(e, Boolean):
            return f"(tl.{over_rows}(({result}).to(tl.int32), 0) > 0)"
        return f"tl.{over_rows}({result}, 0)"

    lo, hi = text(segment.live.lo, "min"), text(segment.live.hi, "max")
    lines.append(f"live_begin{tag} = " + ("0" if lo == "0" else f"tl.maximum({lo}, 0) // {block}"))
    lines.append(f"live_end{tag} = tl.maximum((tl.maximum({hi}, -1) + {block}) // {block}, live_begin{tag})")
    if segment.may is not sympy.true:
        lines.append(f"live_end{tag} = tl.where({text(segment.may, 'max')}, live_end{tag}, live_begin{tag})")
    if segment.full is None:
        lines += [f"full_begin{tag} = live_end{tag}", f"full_end{tag} = live_end{tag}"]
        return lines
    lo, hi = text(segment.full.lo, "max"), text(segment.full.hi, "min")
    lines.append(f"full_begin{tag} = " + ("0" if lo == "0" else f"(tl.maximum({lo}, 0) + {block} - 1) // {block}"))
    lines.append(f"full_end{tag} = tl.maximum({hi} + 1, 0) // {block}")
    if segment.must is not sympy.true:
        lines.append(f"full_end{tag} = tl.where({text(segment.must, 'min')}, full_end{tag}, full_begin{tag})")
    lines.append(f"full_begin{tag} = tl.minimum(tl.maximum(full_begin{tag}, live_begin{tag}), live_end{tag})")
    lines.append(f"full_end{tag} = tl.maximum(tl.minimum(full_end{tag}, live_end{tag}), full_begin{tag})")
    return lines


def _scan_lines(
    plan: TilePlan,
    scan: Truth,
    scope: Lowering,
    stand_ins: dict[Any, sympy.Symbol],
    tag: str,
    block: str,
    length: str,
) -> list[str]:
    """Lines that narrow a range to the tiles whose minima and maxima allow the mask to hold."""
    loop: list[str] = ["tile_id = chunk + tl.arange(0, 128)", f"known = tile_id < live_end{tag}"]
    loop.append(f"tile_lo = tile_id * {block}")
    loop.append(f"tile_hi = tl.minimum(tile_lo + {block}, {length}) - 1")
    needed = scan.may.atoms(BlockMin, BlockMax) | scan.must.atoms(BlockMin, BlockMax)
    for i, read in enumerate(plan.summaries):
        base = summary_offset(read)
        for op, function in (("min", BlockMin), ("max", BlockMax)):
            if function(read) not in needed:
                continue
            loop.append(
                f"tile_{op}_{i} = tl.load(SUMMARY_{i}_{op.upper()} + {base} * tl.cdiv({length}, {block}) + tile_id, "
                f"mask=known, other=0)"
            )
            stand_ins[function(read)] = sympy.Symbol(f"tile_{op}_{i}", integer=True)
    inside = scope.branch()  # values of this loop's tiles do not exist after it
    may = inside.emit(scan.may.xreplace(stand_ins), Level.PAIR)
    must = inside.emit(scan.must.xreplace(stand_ins), Level.PAIR)
    before: list[str] = []
    _flush(scope, before)
    loop += inside.body
    loop += [
        f"may = known & {may}",
        f"must = known & (tile_lo + {block} <= {length}) & {must}",
        "first_live = tl.minimum(first_live, tl.min(tl.where(may, tile_id, 2147483647), 0))",
        "last_live = tl.maximum(last_live, tl.max(tl.where(may, tile_id, -1), 0))",
        "first_full = tl.minimum(first_full, tl.min(tl.where(must, tile_id, 2147483647), 0))",
        "last_full = tl.maximum(last_full, tl.max(tl.where(must, tile_id, -1), 0))",
        "full_count += tl.sum(must.to(tl.int32), 0)",
    ]
    return [
        *before,
        f"first_live = live_end{tag}",
        f"last_live = live_begin{tag} - 1",
        f"first_full = live_end{tag}",
        f"last_full = live_begin{tag} - 1",
        f"full_count = live_end{tag} * 0",
        f"for chunk in range(live_begin{tag}, live_end{tag}, 128):",
        *(f"    {line}" for line in loop),
        f"live_begin{tag} = first_live",
        f"live_end{tag} = tl.maximum(last_live + 1, live_begin{tag})",
        "# whole tiles are skipped over as one range, so only an unbroken run of them counts",
        "unbroken = (full_count > 0) & (last_full + 1 - first_full == full_count)",
        f"full_begin{tag} = tl.where(unbroken, first_full, live_end{tag})",
        f"full_end{tag} = tl.where(unbroken, last_full + 1, live_end{tag})",
    ]


def summary_offset(read: Any) -> str:
    """The row of a summary that a program reads: one per sequence, or one per (sequence, head)."""
    by_head = {sym.H, sym.H_KV} & read.free_symbols
    return "(b * heads + h)" if by_head else "b"


def _order_lines(count: int) -> list[str]:
    """Lines that sort the ranges by their first tile, then clip each to start where the previous ones end, so that no
    tile is visited twice."""
    lines = []
    for upper in range(count - 1, 0, -1):
        for i in range(upper):
            j = i + 1
            lines.append(f"swap = live_begin_{j} < live_begin_{i}")
            for name in ("live_begin", "live_end", "full_begin", "full_end"):
                lines.append(
                    f"{name}_{i}, {name}_{j} = "
                    f"tl.where(swap, {name}_{j}, {name}_{i}), tl.where(swap, {name}_{i}, {name}_{j})"
                )
    for i in range(1, count):
        reach = f"live_end_{i - 1}"
        lines.append(f"live_begin_{i} = tl.maximum(live_begin_{i}, {reach})")
        lines.append(f"live_end_{i} = tl.maximum(live_end_{i}, live_begin_{i})")
        lines.append(f"full_begin_{i} = tl.minimum(tl.maximum(full_begin_{i}, live_begin_{i}), live_end_{i})")
        lines.append(f"full_end_{i} = tl.minimum(tl.maximum(full_end_{i}, full_begin_{i}), live_end_{i})")
    return lines


def _loop_lines(setup: list[str], count: int) -> BoundLines:
    if count == 1:
        setup += [
            "head_tiles = full_begin - live_begin",
            "mixed_tiles = head_tiles + live_end - full_end",
            "full_tiles = full_end - full_begin",
        ]
        mixed = ("tile = i + tl.where(i < head_tiles, live_begin, full_end - head_tiles)",)
        return BoundLines(tuple(setup), mixed, ("tile = i + full_begin",))
    mixed_lines, full_lines = ["tile = i + live_begin_0"], ["tile = i + full_begin_0"]
    setup.append("mixed_0 = full_begin_0 - live_begin_0")
    setup.append("full_0 = full_end_0 - full_begin_0")
    for i in range(count):
        last = f"mixed_{2 * i}"
        setup.append(f"mixed_{2 * i + 1} = {last} + live_end_{i} - full_end_{i}")
        mixed_lines.append(f"tile = tl.where(i >= {last}, i - {last} + full_end_{i}, tile)")
        if i + 1 < count:
            setup.append(f"mixed_{2 * i + 2} = mixed_{2 * i + 1} + full_begin_{i + 1} - live_begin_{i + 1}")
            setup.append(f"full_{i + 1} = full_{i} + full_end_{i + 1} - full_begin_{i + 1}")
            mixed_lines.append(
                f"tile = tl.where(i >= mixed_{2 * i + 1}, i - mixed_{2 * i + 1} + live_begin_{i + 1}, tile)"
            )
            full_lines.append(f"tile = tl.where(i >= full_{i}, i - full_{i} + full_begin_{i + 1}, tile)")
    setup += [f"mixed_tiles = mixed_{2 * count - 1}", f"full_tiles = full_{count - 1}"]
    return BoundLines(tuple(setup), tuple(mixed_lines), tuple(full_lines))
