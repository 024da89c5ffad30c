"""Template slots of the Gluon kernels for Hopper: those of the Triton kernels, divided among specialized warps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import sympy
import triton

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
#: the fewest columns of an accumulator that is rescaled in a branch, which may skip it; and the same if scores are
#: plain q k. On an H200 the branch saves a tenth of a tile's time at 256 columns, up to a twentieth at 128; ALiBi took
#: a fiftieth more at 128
_WIDE_OUTPUT, _WIDE_OF_PLAIN = 192, 128
#: the release of Triton, which compiles the kernels
_TRITON = tuple(int(n) for n in triton.__version__.split(".")[:2])


def hopper_forward_slots(plan: Plan, d_qk: int, d_v: int, shared_key: bool = False) -> dict[str, Any]:
    """Slots of hopper_forward.py.j2: those of forward.py.j2 in Gluon, and the names that each function takes.

    - `weigh`: the stages of one tile, a function of the running row statistics `state`. It returns the tile's weights,
      the factor that rescales the accumulator, and the new statistics;
    - `loads`, `attends`: the kernel's arguments that the loading warp and the computing warpgroups need;
    - `branches`: the slots of each of several branches; with one branch, they are among the kernel's slots.
    """
    refuse(plan)
    if not hopper.whole_branches(d_qk, len(plan.parts)):
        raise UnsupportedError(
            f"Gluon kernels copy whole tiles of a branch, and the {d_qk} columns of q of '{plan.graph.name}' are none",
            remedy="use backend='triton'",
        )
    qk_chunks = chunks(d_qk, len(plan.parts), shared_key)
    f = forward_slots(plan, qk_chunks, hopper=True, tables=plan.score_tables)
    chains = [{**f, **chain, "shown": chain["visible"], "visible": chain["show"]} for chain in f.pop("chains")]
    shown = {chain["shown"]: chain["show"] for chain in reversed(chains)}
    for chain in chains:
        chain["visible"] = shown[chain["shown"]]
        chain["weigh"] = _weigh_lines(chain)
    visible = [line for chain in chains for line in chain["visible"]]
    weigh = [line for chain in chains for line in chain["weigh"]]
    keyed = keyed_values(plan, f.pop("streamed"), f["outer"], weigh, visible)
    bounds = f["bounds"]
    tiles = [*bounds.setup, "i = 0", *bounds.mixed, *bounds.full]
    final = []
    for chain in chains:
        final += [*chain["final_lines"], f"final = {chain['final']}", f"alive = {chain['alive']}", *chain["stores"]]
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
    quick = all(_lags(part, chain) for part, chain in zip(plan.parts, chains, strict=True))
    quick = quick and len({bool(chain["raises"][0][2]) for chain in chains}) == 1
    own = [_branch_slots(chain, keyed, quick) for chain in chains]
    light = all(_is_light(part, chain) for part, chain in zip(plan.parts, chains, strict=True))
    seldom = all(_rescales_seldom(part, chain, d_v) for part, chain in zip(plan.parts, chains, strict=True))
    slots = {**{key: translated(value) for key, value in f.items()}, **own[0]}
    for part, branch in zip(plan.parts, own, strict=True):
        branch["chunks"] = tuple(c for c in qk_chunks if c.branch == part.branch)
    slots.update(
        branches=own if len(own) > 1 else [],
        by_tile=any(chain["by_tile"] for chain in chains),
        maps=maps,
        keyed=[*keyed.values],
        keyed_block=[in_gluon(line) for line in keyed.block_lines],
        keyed_lines=[in_gluon(line) for line in keyed.lines],
        arguments=arguments,
        loads=[n for n in arguments if n in loads],
        attends=[n for n in arguments if n in attends],
        **tile_slots(bounds),
        out_in_q=hopper.out_in_q(d_qk, d_v, len(plan.parts)),
        shared_limit=hopper.TILE_BYTES,
        holds_q=light or (quick and not any(chain["by_tile"] for chain in chains) and not _by_pair(plan)),
        uneven=plan.masks != (sympy.true,),
        seldom=seldom,
        awaits_late=seldom and (_is_wide(d_v) or not any(chain["sign_lines"] for chain in chains)),
        quick=quick,
    )
    slots["whole_first"] = _has_whole_tiles_first(slots)
    return slots


def _has_whole_tiles_first(f: dict[str, Any]) -> bool:
    """Whether tiles that a mask leaves whole come first. No matmul overlaps the first tile's arithmetic, so a mask
    there costs its full latency. But scores that read distances grow towards the diagonal: starting at the far end, the
    row maximum would change at every tile. Stages other than a softmax of the scores, and several branches, were not
    measured. Triton 3.9 needs more registers for this order: causal attention spilled 120 bytes at D=128 and softcap
    168 bytes, against 8 in the other order."""
    if _TRITON >= (3, 9):
        return False
    return f["quick"] and not (f["by_tile"] or f["keyed"] or f["maps"] or f["branches"])


def _weigh_lines(chain: dict[str, Any]) -> list[str]:
    """The stages of a tile, in the order in which they run."""
    lines = [*chain["score_lines"], f"s{chain['tag']} = {chain['score']}", *chain["peak_lines"], *chain["visible"]]
    lines += [*chain["max_lines"], *chain["weight_lines"], *chain["hide"], *chain["rescale_lines"]]
    return [*lines, *chain["sum_lines"], *chain["sign_lines"]]


def _branch_slots(chain: dict[str, Any], keyed: KeyedValues, quick: bool) -> dict[str, Any]:
    """The slots of one branch, in Gluon: its stages, its running row statistics, and the lines that finish its rows."""
    tag = chain["tag"]
    state = [(m, f"tl.full([ROWS], {chain['negative']}, tl.float32, layout=BY_ROW)") for m, _ in chain["moves"]]
    state += [(s, "tl.zeros([ROWS], tl.float32, layout=BY_ROW)") for s in chain["sums"]]
    if chain["count_seen"]:
        state.append((f"seen{tag}", "tl.zeros([ROWS], tl.int32, layout=BY_ROW)"))
    names = [name for name, _ in state]
    own = {f"qk{tag}", "phase", *names, *(value.name for value in keyed.values)}
    if quick:
        (maximum, _), total = chain["moves"][0], chain["sums"][0]
        state = [(maximum, f"tl.full_like(none, {chain['negative']})"), (total, "tl.zeros_like(none)")]
    slots = {key: translated(value) for key, value in chain.items() if key not in _OF_KERNEL}
    if quick:
        tile, _, offset = chain["raises"][0]
        if offset:
            name = f"{ROW_OFFSET}{tag}"
            at = next(i for i, line in enumerate(slots["max_lines"]) if line.startswith(f"{name} = "))
            slots["max_lines"].insert(at + 1, f"{name} = _of_lanes({name}, {maximum})")
        slots["weight_lines"] = [
            re.sub(r"(\w+)\[:, None\]", rf"_spread(\1, {tile})", line) for line in slots["weight_lines"]
        ]
    slots.update(
        state=[(name, in_gluon(start)) for name, start in state],
        taken=[n for n in free_names(chain["weigh"]) if n not in own],
        given=[f"p{tag}", *([chain["acc_rescale"]] if chain["acc_rescale"] else []), *names],
        final=in_gluon(chain["final"].removesuffix("[:, None]")) if chain["final"] else None,
        final_by_row=bool(chain["final"]) and (chain["guard"] or chain["final"].endswith("[:, None]")),
    )
    return slots


#: slots that only the kernel has, not its branches
_OF_KERNEL = ("bounds", "streamed", "maps", "weigh")


@dataclass(frozen=True)
class KeyedValue:
    """A value of each key (in the kernel of dK and dV, of each query) that the computing warpgroups read from shared
    memory. `type`: its dtype there, as text of the
    kernel; `store`: the expression that is stored; `load`: the suffix that turns what is loaded into the value that the
    stages call `name`; `always`: whether tiles that the mask leaves whole need it, too."""

    name: str
    number: int
    type: str
    store: str
    load: str
    always: bool


@dataclass(frozen=True)
class KeyedValues:
    """Values of each key, which the loading warp computes one tile ahead: with `block_lines` once per block of queries,
    and with `lines` for the keys of each tile."""

    values: tuple[KeyedValue, ...]
    block_lines: tuple[str, ...]
    lines: tuple[str, ...]


def keyed_values(
    plan: Plan, streamed: list[Streamed], outer: list[str], weigh: list[str], visible: list[str]
) -> KeyedValues:
    """The values of `streamed` that the stages `weigh` need per key. In the layout of a matmul's result each thread
    holds a quarter of the tile's keys, and would wait for a load of each. The loading warp loads each key once, and has
    time to wait."""
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
    """The statements among `before` that `lines` depend on, in their order."""
    found: list[str] = []
    for line in reversed(before):
        if line.partition(" = ")[0] in free_names([*found, *lines]):
            found.insert(0, line)
    return found


def _boxed(tile: MapTile) -> dict[str, Any]:
    """A map's tile as the template copies it. `at`: coordinates of all dimensions but the last two; 0 along a broadcast
    dimension, which has a stride of 0."""
    names = {"b": "batch", "h": "head", "h_kv": "head_kv"}
    at = [f"gl.where(stride_{tile.input}_{d} == 0, 0, {names[i]})" for d, i in enumerate(tile.at)]
    return {"name": tile.name, "input": tile.input, "upper": tile.input.upper(), "text": in_gluon(tile.text), "at": at}


def refuse(plan: Plan) -> None:
    """UnsupportedError if Gluon has no kernel for a variant."""
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
    """Whether any input is read per pair."""
    return any(level(r) == Level.PAIR for r in plan.core.reads)


def _is_light(plan: Plan, f: dict[str, Any]) -> bool:
    """Whether the stages leave registers free. They do not if values are read per key, or differ by key, because these
    stay in registers through the loop. If the mask hides weights instead of scores, both are live at once, for which
    there is room only without row statistics."""
    reads = {level(r) for r in plan.core.reads}
    few = bool(f["vanishes"]) or not (f["moves"] or f["sums"] or f["count_seen"])
    return few and not f["by_tile"] and not reads & {Level.COL, Level.PAIR}


def _lags(plan: Plan, f: dict[str, Any]) -> bool:
    """Whether each of the four lanes that share a row may keep a maximum and a sum of its own, with a maximum that lags
    behind. This requires that the weights are a softmax of the same scores that the maximum is taken of, and depend on
    no other row value, except one added to all scores of a tile and values shared by all rows of a head, such as a
    sink."""
    if not f["vanishes"] or len(f["moves"]) != 1 or len(f["sums"]) != 1 or f["count_seen"] or len(f["raises"]) != 1:
        return False
    (maximum, moved), total, (tile, unit, offset) = f["moves"][0], f["sums"][0], f["raises"][0]
    known = {tile, unit, maximum, moved, plan.own(ROW_OFFSET), offset, *_of_head(f["outer"])}
    return (
        tile.isidentifier()
        and f["sum_lines"] == [f"{total} = {total} * {f['acc_rescale']} + tl.sum({plan.own('p')}, 1)"]
        and set(free_names([*f["weight_lines"], *f["rescale_lines"]])) <= known
        and any_shift_serves(plan.online, [e for _, e in plan.stored])
    )


def _of_head(outer: list[str]) -> set[str]:
    """The names that the statements `outer` set to the same value for all rows of a head."""
    by_row: set[str] = {"q_idx", "q_in_tile"}
    same: set[str] = set()
    for line in outer:
        target = line.partition(" = ")[0]
        (by_row if by_row & set(free_names([line])) else same).add(target)
    return same


def _rescales_seldom(plan: Plan, f: dict[str, Any], d_v: int) -> bool:
    """Whether rescaling of the accumulator may be skipped, and the accumulator is so wide, compared with the weights of
    a tile, that a branch for this pays."""
    plain = _is_light(plan, f) and f["score"] == plan.own("qk")
    return (
        _is_wide(d_v, _WIDE_OF_PLAIN if plain else _WIDE_OUTPUT)
        and f["vanishes"]
        and bool(f["sums"])
        and any_shift_serves(plan.online, [e for _, e in plan.stored])
    )


def _is_wide(d_v: int, least: int = _WIDE_OUTPUT) -> bool:
    """Whether the accumulator has `least` columns or more. From _WIDE_OUTPUT on, it is best awaited after a tile's
    exponentials; at 128 also, if scores are plain q k and weights have no signs (with signs, cog took 1.03 of the
    time)."""
    return sum(c.width for c in chunks(d_v)) >= least


def kernel_arguments(
    plan: Plan, pointers: list[str], scan: bool, common: tuple[str, ...], tables: bool = True
) -> list[str]:
    """A kernel's arguments other than tiles, in the order of its signature: `pointers`, bounds, inputs, `common`.
    `tables`: whether the kernel reads functions of the distance from a table, if the plan has one."""
    names = [*pointers, *(["BOUNDS_PTR"] if scan else [])]
    for d in plan.core.inputs:
        names.append(f"{d.name.upper()}_PTR")
        for i, _ in enumerate(d.pattern):
            names += [f"stride_{d.name}_{i}", f"size_{d.name}_{i}"]
    names += [s.name for s in plan.graph.scalars]
    return [*names, *(["DISTANCES_PTR"] if tables and plan.tables.formulas else []), *common]


def tile_slots(bounds: BoundLines) -> dict[str, Any]:
    """The slots that enumerate a program's tiles, in Gluon; each of its warps computes them for itself."""
    return {
        "tiles": [in_gluon(line) for line in bounds.setup],
        "mixed": [in_gluon(line) for line in bounds.mixed],
        "full": [in_gluon(line) for line in bounds.full],
        "scan": bounds.scan,
    }


def translated(value: Any) -> Any:
    """A slot's lines or text of an expression translated to Gluon; any other value unchanged."""
    if isinstance(value, str):
        return in_gluon(value)
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return [in_gluon(line) for line in value]
    return value
