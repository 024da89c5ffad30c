"""The slots of the Gluon templates for Hopper: those of the Triton kernels, cut into the functions of its warps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import sympy

from attncc.codegen.bounds import BoundLines
from attncc.codegen.chunks import chunks
from attncc.codegen.forward import ROW_OFFSET, forward_slots
from attncc.codegen.loads import MapTile
from attncc.codegen.lower import Streamed
from attncc.codegen.plan import Plan
from attncc.codegen.similarity import SimilaritySlots
from attncc.codegen.statements import free_names, in_gluon
from attncc.errors import UnsupportedError
from attncc.ir.levels import Level, level
from attncc.passes.stream import any_shift_serves
from attncc.schedule import hopper

#: arguments of the kernel that its warps may need, besides the variant's inputs
_COMMON = ("scale", "heads", "group", "q_len", "kv_len", "WIDE", "FAST_MATH")
#: columns of an accumulator from which on to rescale it in a branch pays, and the same where a score is q k as it is:
#: at 256 an H200 takes a tenth less time for all of a tile, at 128 up to a twentieth; ALiBi took a fiftieth more there
_WIDE_OUTPUT, _WIDE_OF_PLAIN = 192, 128


def hopper_forward_slots(plan: Plan, d_qk: int, d_v: int) -> dict[str, Any]:
    """Slots of hopper_forward.py.j2: those of forward.py.j2 in Gluon, and which names each function is handed.

    `weigh` has the stages of one tile: it takes the running row values `state` and gives them back, after the tile's
    weights and the factor of the accumulator. `loads` and `attends` name the kernel's arguments that the warps need
    which load, and those which compute.
    """
    refuse(plan)
    f = forward_slots(plan, chunks(d_qk), hopper=True, tables=plan.score_tables)
    (chain,) = f.pop("chains")
    f = {**f, **chain, "visible": chain["show"]}
    state = [(m, f"tl.full([ROWS], {f['negative']}, tl.float32, layout=BY_ROW)") for m, _ in f["moves"]]
    state += [(s, "tl.zeros([ROWS], tl.float32, layout=BY_ROW)") for s in f["sums"]]
    if f["count_seen"]:
        state.append(("seen", "tl.zeros([ROWS], tl.int32, layout=BY_ROW)"))
    names = [name for name, _ in state]
    weigh = [*f["score_lines"], f"s = {f['score']}", *f["peak_lines"], *f["visible"], *f["max_lines"]]
    weigh += [*f["weight_lines"], *f["hide"], *f["rescale_lines"], *f["sum_lines"], *f["sign_lines"]]
    keyed = keyed_values(plan, f.pop("streamed"), f["outer"], weigh, f["visible"])
    own = {"qk", "phase", *names, *(value.name for value in keyed.values)}
    taken = [n for n in free_names(weigh) if n not in own]
    bounds = f["bounds"]
    tiles = [*bounds.setup, "i = 0", *bounds.mixed, *bounds.full]
    final = [*f["final_lines"], f"final = {f['final']}", f"alive = {f['alive']}", *f["stores"]]
    pointers = [f"{name.upper()}_PTR" for name, _ in plan.stored]
    arguments = kernel_arguments(plan, pointers, bool(bounds.scan), _COMMON)
    maps = [_boxed(m) for m in f["maps"]]
    boxes = [f"box = {at}" for m in maps for at in m["at"]]
    loads = free_names(["n = q_len + heads + group", *tiles, *keyed.block_lines, *keyed.lines, *boxes])
    attends = free_names(
        [
            "n = q_len + heads + group",
            *f["outer"],
            *tiles,
            *f["ahead"],
            *(f"{m.name} = {m.text}" for m in f["maps"]),
            *weigh,
            *final,
        ]
    )
    quick = _lags(plan, f)
    if quick:
        (maximum, _), total = f["moves"][0], f["sums"][0]
        state = [(maximum, f"tl.full_like(none, {f['negative']})"), (total, "tl.zeros_like(none)")]
    slots = {key: translated(value) for key, value in f.items()}
    if quick:
        tile, _, offset = f["raises"][0]
        if offset:
            at = next(i for i, line in enumerate(slots["max_lines"]) if line.startswith(f"{ROW_OFFSET} = "))
            slots["max_lines"].insert(at + 1, f"{ROW_OFFSET} = _of_lanes({ROW_OFFSET}, {f['moves'][0][0]})")
        slots["weight_lines"] = [
            re.sub(r"(\w+)\[:, None\]", rf"_spread(\1, {tile})", line) for line in slots["weight_lines"]
        ]
    by_row = bool(f["final"]) and (f["guard"] or f["final"].endswith("[:, None]"))
    slots.update(
        state=[(name, in_gluon(start)) for name, start in state],
        taken=taken,
        maps=maps,
        keyed=[*keyed.values],
        keyed_block=[in_gluon(line) for line in keyed.block_lines],
        keyed_lines=[in_gluon(line) for line in keyed.lines],
        given=["p", *([f["acc_rescale"]] if f["acc_rescale"] else []), *names],
        arguments=arguments,
        loads=[n for n in arguments if n in loads],
        attends=[n for n in arguments if n in attends],
        **tile_slots(bounds),
        final=in_gluon(f["final"].removesuffix("[:, None]")) if f["final"] else None,
        final_by_row=by_row,
        out_in_q=hopper.out_in_q(d_qk, d_v),
        shared_limit=hopper.TILE_BYTES,
        holds_q=_is_light(plan, f) or (quick and not f["by_tile"] and not _by_pair(plan)),
        uneven=plan.graph["mask"].expr is not sympy.true,
        seldom=_rescales_seldom(plan, f, d_v),
        quick=quick,
    )
    return slots


@dataclass(frozen=True)
class KeyedValue:
    """A value of each key that the consumers read from shared memory. `type` is an expression of the kernel; `store` is
    what is stored, and `load` makes of it what the stages call `name`; `always`: do tiles that the mask leaves whole
    need it, too?"""

    name: str
    number: int
    type: str
    store: str
    load: str
    always: bool


@dataclass(frozen=True)
class KeyedValues:
    """Values of each key, which the warp that loads computes one tile ahead: `block_lines` once a block of queries,
    `lines` for the keys of a tile."""

    values: tuple[KeyedValue, ...]
    block_lines: tuple[str, ...]
    lines: tuple[str, ...]


def keyed_values(
    plan: Plan, streamed: list[Streamed], outer: list[str], weigh: list[str], visible: list[str]
) -> KeyedValues:
    """What is read a key, of which the stages `weigh` need some. A thread of a matmul's tile has a quarter of all of a
    tile's keys, and would wait for a load of each; a warp that loads has each once, and time to wait."""
    known = {s.name: s for s in streamed}
    needed = [n for n in free_names(weigh) if n in known]
    anyway = free_names([line for line in weigh if line not in visible])
    values: list[KeyedValue] = []
    for name in needed:
        value = known[name]
        integers = [i for i in sorted(value.inputs) if plan.core.input(i).dtype == "int"]
        wide = " or ".join(f"{i.upper()}_PTR.dtype.element_ty.primitive_bitwidth == 64" for i in integers)
        kind, store, load = {
            "float": ("gl.float32", name, ""),
            "int": (f"gl.int64 if {wide} else gl.int32", name, ""),
            "bool": ("gl.int32", f"gl.where({name}, 1, 0)", " != 0"),
        }[value.type]
        values.append(KeyedValue(name, len(values), kind, store, load, name in anyway))
    lines = [f"{s.name} = {s.text}" for s in streamed] if needed else []
    lines = [*needed_by(lines, weigh), *lines]
    return KeyedValues(tuple(values), tuple(needed_by(lines, outer)), tuple(lines))


def needed_by(lines: list[str], before: list[str]) -> list[str]:
    """Those of the statements `before` that `lines` need, in their order."""
    found: list[str] = []
    for line in reversed(before):
        if line.partition(" = ")[0] in free_names([*found, *lines]):
            found.insert(0, line)
    return found


def _boxed(tile: MapTile) -> dict[str, Any]:
    """A map's tile as the template copies it: `at` are coordinates of its dimensions but the last two; one that is
    the same for all has a stride of 0."""
    names = {"b": "batch", "h": "head", "h_kv": "head_kv"}
    at = [f"gl.where(stride_{tile.input}_{d} == 0, 0, {names[i]})" for d, i in enumerate(tile.at)]
    return {"name": tile.name, "input": tile.input, "upper": tile.input.upper(), "text": in_gluon(tile.text), "at": at}


def refuse(plan: Plan) -> None:
    """UnsupportedError where Gluon has no kernel for a variant."""
    if len(plan.parts) > 1:
        raise UnsupportedError(
            f"Gluon kernels have one score a pair, and '{plan.graph.name}' has several branches",
            remedy="use backend='triton'",
        )
    if plan.graph.value is not None:
        raise UnsupportedError(
            f"Gluon kernels load v for itself, and that of '{plan.graph.name}' is part of k",
            remedy="use backend='triton'",
        )
    if not SimilaritySlots(plan).plain_dot:
        raise UnsupportedError(
            f"Gluon kernels multiply q with k, and the similarity of '{plan.graph.name}' is made in another way",
            remedy="use backend='triton'",
        )
    if plan.only_triton:
        raise UnsupportedError(plan.only_triton, remedy="use backend='triton'")


def _by_pair(plan: Plan) -> bool:
    """Is anything read a pair?"""
    return any(level(r) == Level.PAIR for r in plan.core.reads)


def _is_light(plan: Plan, f: dict[str, Any]) -> bool:
    """Do the stages leave registers free? What is read a key, or differs by key, stays in them through the loop. A mask
    that hides weights, not scores, has both at once: there is room beside them where a row has no statistics."""
    reads = {level(r) for r in plan.core.reads}
    few = bool(f["vanishes"]) or not (f["moves"] or f["sums"] or f["count_seen"])
    return few and not f["by_tile"] and not reads & {Level.COL, Level.PAIR}


def _lags(plan: Plan, f: dict[str, Any]) -> bool:
    """May a row's maximum and its sum stay with the four lanes that have the row, and the maximum lag behind? So it is
    where the weights are a softmax's of the tile that the maximum is of: made of nothing else that a row has, but for
    what its score adds to all of a tile, and of what all rows of a head have, as a sink is."""
    if not f["vanishes"] or len(f["moves"]) != 1 or len(f["sums"]) != 1 or f["count_seen"] or len(f["raises"]) != 1:
        return False
    (maximum, moved), total, (tile, unit, offset) = f["moves"][0], f["sums"][0], f["raises"][0]
    known = {tile, unit, maximum, moved, ROW_OFFSET, offset, *_of_head(f["outer"])}
    return (
        tile.isidentifier()
        and f["sum_lines"] == [f"{total} = {total} * {f['acc_rescale']} + tl.sum(p, 1)"]
        and set(free_names([*f["weight_lines"], *f["rescale_lines"]])) <= known
        and any_shift_serves(plan.online, [e for _, e in plan.stored])
    )


def _of_head(outer: list[str]) -> set[str]:
    """What the statements `outer` set that no row differs in."""
    by_row: set[str] = {"q_idx", "q_in_tile"}
    same: set[str] = set()
    for line in outer:
        target = line.partition(" = ")[0]
        (by_row if by_row & set(free_names([line])) else same).add(target)
    return same


def _rescales_seldom(plan: Plan, f: dict[str, Any], d_v: int) -> bool:
    """Is the accumulator so wide beside a tile's weights that it is worth a branch to rescale it, and may it be?"""
    plain = _is_light(plan, f) and f["score"] == "qk"
    wide = sum(c.width for c in chunks(d_v)) >= (_WIDE_OF_PLAIN if plain else _WIDE_OUTPUT)
    return wide and f["vanishes"] and bool(f["sums"]) and any_shift_serves(plan.online, [e for _, e in plan.stored])


def kernel_arguments(plan: Plan, pointers: list[str], scan: bool, common: tuple[str, ...]) -> list[str]:
    """A kernel's arguments that hold no tile, in the order of its signature: `pointers`, bounds, inputs, `common`."""
    names = [*pointers, *(["BOUNDS_PTR"] if scan else [])]
    for d in plan.core.inputs:
        names.append(f"{d.name.upper()}_PTR")
        for i, _ in enumerate(d.pattern):
            names += [f"stride_{d.name}_{i}", f"size_{d.name}_{i}"]
    names += [s.name for s in plan.graph.scalars]
    return [*names, *(["DISTANCES_PTR"] if plan.tables.formulas else []), *common]


def tile_slots(bounds: BoundLines) -> dict[str, Any]:
    """The slots of the tiles that a program goes through: how they are found, in Gluon, by every one of its warps."""
    return {
        "tiles": [in_gluon(line) for line in bounds.setup],
        "mixed": [in_gluon(line) for line in bounds.mixed],
        "full": [in_gluon(line) for line in bounds.full],
        "scan": bounds.scan,
    }


def translated(value: Any) -> Any:
    """Lines, and texts of expressions, in Gluon; whatever else is in a slot as it is."""
    if isinstance(value, str):
        return in_gluon(value)
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return [in_gluon(line) for line in value]
    return value
