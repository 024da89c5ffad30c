"""Template slots of the light passes for auxiliary outputs: the lines that reduce a tile's values, and their stores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from attncc.codegen.bounds import bound_lines
from attncc.codegen.lower import Leaf, Lowering
from attncc.codegen.pairs import base_leaves as leaves_of
from attncc.codegen.pairs import edge, take, visible_lines
from attncc.codegen.plan import Plan
from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc
from attncc.ir.levels import Level
from attncc.ir.outputs import Domain
from attncc.ir.text import formula
from attncc.passes.intervals import Interval, truth
from attncc.passes.outputs import Named, Pass, Weight
from attncc.passes.tiles import INNER_HI, INNER_LO, OUTER_HI, OUTER_LO, tile_plan

_EMPTY = {"sum": "0.0", "count": "0", "max": 'float("-inf")'}
_DTYPE = {"sum": "tl.float32", "count": "tl.int32", "max": "tl.float32"}


@dataclass(frozen=True)
class Axis:
    """The axis along which a pass has its programs (`own`), and the axis of its loop (`inner`)."""

    own: str
    own_len: str
    own_block: str
    inner_block: str
    inner: str


_QUERY = Axis("q_idx", "q_len", "BLOCK_M", "BLOCK_N", "kv_idx")
_KEY = Axis("kv_idx", "kv_len", "BLOCK_N", "BLOCK_M", "q_idx")


def loop_of(domain: Domain) -> str:
    """The loop that computes a domain: by_query (over the keys of a block of queries), by_key (over the queries of a
    block of keys) or by_offset (along diagonals)."""
    return {"col": "by_key", "offset": "by_offset"}.get(domain.kind, "by_query")


def pass_slots(plan: Plan, light: Pass, weight: Weight, number: int, hopper: bool = False) -> dict[str, Any]:
    """Slots of the pass's template. hopper: for the one in Gluon, whose tiles are [keys, queries], and whose bounds are
    found by a separate kernel if they need a whole block."""
    kind = light.domain.kind
    axis = _KEY if kind == "col" else _QUERY
    saved = [s.name for s, _ in weight.rows] if light.uses_weight else []
    leaves = leaves_of(plan, {name: Leaf(name, Level.ROW) for name in saved})
    if kind == "offset":  # q_idx and kv_idx change inside its loop, so nothing may move before it
        running = frozenset({"q_idx", "kv_idx", *saved, "b", "h", "h_kv"})
        lowering = Lowering(plan.graph, leaves, running=running)
    else:
        own_axis = Level.COL if kind == "col" else Level.ROW
        lowering = Lowering(plan.graph, leaves, rows_first=not hopper, own_axis=own_axis)
    folded = plan.folded
    exprs = [folded.apply(weight.of(n.reduction.expr)) for n in light.reductions]
    conditions = [folded.apply(weight.of(n.reduction.when)) for n in light.reductions]
    own_weight = folded.apply(weight.expr)
    mask = plan.graph["mask"].expr
    lowering.count([folded.score, mask, *exprs, *conditions, *([own_weight] if light.uses_weight else [])])
    edges = [edge(index, not hopper) for index in (("q_idx", "kv_idx") if kind != "row" else ("kv_idx",))]
    tile = tile_plan(light.mask, sym.Q_IDX if kind == "col" else sym.KV_IDX)
    bounds = None
    if kind != "offset":
        bounds = bound_lines(tile, lowering, axis.inner_block, f"{axis.own} < {axis.own_len}", apart=hopper)
    score = lowering.tile(folded.score)
    visible = visible_lines(lowering, mask, edges)
    score_lines = take(lowering)
    weight_lines: list[str] = []
    if light.uses_weight:
        lowering.assign("p", own_weight, Level.PAIR)
        weight_lines = take(lowering)
    value_lines: list[str] = []
    for entry, expr, condition in zip(light.reductions, exprs, conditions, strict=True):
        value_lines += _value(lowering, entry, expr, condition, hopper)
    hide = [f"{n.name} = tl.where(visible, {n.name}, {_EMPTY[_kind(n)]})" for n in light.reductions]
    slots = {
        "domain": light.domain,
        "number": number,
        "name": f"{loop_of(light.domain)}_{number}",
        "outer": lowering.outer,
        "bounds": bounds,
        "tile": tile,
        "score": score,
        "score_lines": score_lines,
        "visible": visible,
        "weight_lines": weight_lines,
        "value_lines": value_lines,
        "hide": hide,
        "saved": saved,
        "reductions": [_reduction(n, kind) for n in light.reductions],
        "what": [
            f"{n.output}: {light.domain}.{n.reduction.op} of {formula(n.reduction.expr)}" for n in light.reductions
        ],
        "helpers": lowering.helpers,
        "in_warps": hopper,
    }
    if kind == "offset":
        slots["may"] = _may_lines(lowering, light.mask)
    return slots


def _kind(entry: Named) -> str:
    """The kind of reduction in the kernel: argmax is computed as max."""
    return "max" if entry.reduction.op == "argmax" else entry.reduction.op


def _reduction(entry: Named, kind: str) -> dict[str, Any]:
    return {
        "name": entry.name,
        "op": entry.reduction.op,
        "empty": _EMPTY[_kind(entry)],
        "dtype": _DTYPE[_kind(entry)],
        "is_int": entry.reduction.is_int,
    }


def _value(lowering: Lowering, entry: Named, expr: Any, condition: Any, hopper: bool) -> list[str]:
    """Lines that compute the tile of values to reduce, under the entry's name, before masking. hopper: in the layout of
    the scores."""
    op = entry.reduction.op
    if op == "count":
        lines = [f"{entry.name} = tl.full(qk.shape, 1, tl.int32{', layout=SCORES' if hopper else ''})"]
    else:
        if voc.type_of(expr) == "int":
            expr = voc.to_float(expr)
        text = lowering.tile(expr)  # not assigned: the name's tile changes below, where pairs are hidden
        lines = [*take(lowering), f"{entry.name} = {text}"]
    if condition is not sympy.true:
        text = lowering.emit(condition, Level.PAIR)
        lines += [*take(lowering), f"{entry.name} = tl.where({text}, {entry.name}, {_EMPTY[_kind(entry)]})"]
    return lines


def _may_lines(lowering: Lowering, mask: Any) -> list[str]:
    """Lines that compute `may`: whether the mask can show any pair of the block block_lo.. and the tile tile_lo.. ."""
    box = {sym.Q_IDX: Interval(OUTER_LO, OUTER_HI), sym.KV_IDX: Interval(INNER_LO, INNER_HI)}
    known = truth(mask, box, lambda read: None).may
    leaves = dict(lowering.leaves)
    ends = {OUTER_LO: "block_lo", OUTER_HI: "block_hi", INNER_LO: "tile_lo", INNER_HI: "tile_hi"}
    for symbol, name in ends.items():
        leaves[symbol.name] = Leaf(name, Level.PROGRAM)
    scope = Lowering(lowering.graph, leaves, running=frozenset(leaves), helpers=lowering.helpers)
    text = scope.emit(known)
    return [*scope.outer, *scope.body, f"may = {text}"]
