"""Template slots of the Gluon backward for Hopper: those of dkdv.py.j2, cut into functions for specialized warps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from attncc.codegen.backward import dkdv_slots, over_ds, saw_a_key, summed_by_key
from attncc.codegen.chunks import Chunk, chunks
from attncc.codegen.hopper import kernel_arguments, keyed_values, refuse, tile_slots, translated
from attncc.codegen.launch import EVEN_REGISTERS
from attncc.codegen.lower import Lowering
from attncc.codegen.pairs import base_leaves
from attncc.codegen.plan import InputGradient, Plan
from attncc.codegen.similarity import SimilaritySlots
from attncc.codegen.statements import free_names, in_gluon, set_names
from attncc.errors import UnsupportedError
from attncc.passes.reverse import DELTA
from attncc.schedule.hopper import out_in_q
from attncc.schedule.hopper_backward import (
    NARROW,
    ROWS,
    STRIPS_BESIDE,
    holds_keys,
    queries,
    shares_keys,
    stages_beside_keys,
    summed_apart,
    wide,
)

#: where the queries and the keys of a tile lie, which no strip keeps
_PLACES = frozenset({"q_idx", "kv_idx", "q_in_tile", "tile_shift"})
#: arguments of the kernel that its warps may need, besides the variant's inputs
_COMMON = ("scale", "heads", "q_len", "kv_len", "GROUP", "SPLITS", "WIDE", "FAST_MATH")


@dataclass(frozen=True)
class Piece:
    """A part of a tile of dQ that a warpgroup computes at once: `width` columns from `start` on, which are those of a
    chunk of k from its column `offset` on."""

    chunk: int
    offset: int
    start: int
    width: int
    whole: bool


def pieces(qk_chunks: tuple[Chunk, ...], widest: int) -> tuple[Piece, ...]:
    """The columns of dQ in pieces of at most `widest`: with 64, one a warpgroup of two, or of a third one after the
    other, as where heads are wide.

    Operands are cut at 128 bytes alone, where their layouts in shared memory repeat."""
    found = []
    for c in qk_chunks:
        width = min(c.width, widest)
        for offset in range(0, c.width, width):
            found.append(Piece(c.index, offset, c.start + offset, width, width == c.width))
    return tuple(found)


def hopper_backward_slots(
    plan: Plan, d_qk: int, d_v: int, shared_key: bool = False, strips: int = 0, deals: bool = False
) -> dict[str, Any]:
    """Slots of hopper_backward.py.j2, of hopper_backward_own.py.j2 or hopper_backward_wide.py.j2 where heads are wide,
    or of hopper_backward_branches.py.j2: those of dkdv.py.j2 in Gluon, and which names each function is handed.

    `loads`, `adds` and `grads` name the kernel's arguments that the warps need which load, which add to dQ and which
    compute. `asked`: what is read a query, which the warp that loads has early. `alive`: has a row seen any key?
    `alike`: do all blocks see the same tiles? `rotates`: does each begin with its own of them? `in_turn`: where dQ is
    summed, can programs take turns? `claims`: does who comes first to a tile of dQ store it, so that nobody writes
    zeros before?
    `wide`: has dQ a kernel of its own? `shares`: do both warpgroups have the same keys? `branches`: the chains of
    several, each with the chunks of q and the rows that are its own; with one, its slots are those of the kernel.
    `alive`: for each delta, has a row seen any key?
    `passed_on`: for each chunk of k what terms of the similarity add to dK, when all queries of a head are through, or
    those of all heads where `sums_of_k` has their sums in multiples of k . dK;
    `late_rows`, `late_asked`: what the queries have that is read again for ds;
    `strips`: in how many is a tile weighed, if any; `late`: does dp come after that? `kept`: what a strip keeps until
    then; `places_slope`: does ds ask where queries and keys lie?
    `deals`: have programs block after block? `rounds`: do two of their warps round dQ of finished heads?
    `leaves_values`: is the slot of values left as soon as they are read,
    since dV can go by way of the keys'? `stages_beside_keys`: with how many tiles of queries have those two slots?
    `bands`: gradients with an entry a distance, which are summed there, of `band_queries` at once; `frugal`: are
    registers scarce, so that the warp that loads stores dK and dV, too, and where keys lie is computed at each tile?
    """
    _refuse(plan)
    if queries(d_qk, d_v, plan.facts.warps) is None:
        raise UnsupportedError(
            f"the Gluon backward of '{plan.graph.name}' shares dQ out between two warpgroups, and cannot do so with "
            f"heads of {d_qk}{f' in {len(plan.parts)} branches' if len(plan.parts) > 1 else ''}",
            remedy="use backend='triton'",
        )
    qk_chunks = chunks(d_qk, len(plan.parts), shared_key)
    is_wide, third = wide(d_qk, d_v), summed_apart(d_qk, d_v, plan.facts.warps)
    shares = shares_keys(d_qk, d_v, plan.facts.warps)
    bands = summed_by_distance(plan, d_qk, d_v)
    k = dkdv_slots(plan, qk_chunks, by_tile=True, hopper=True, streams=not shares, bands=bands)
    for name in ("gradients", "summed"):
        k[name] = [g for g in k[name] if g not in bands]
    if shares and k["gradients"]:
        raise UnsupportedError(
            f"the Gluon backward for heads of {d_qk} and {d_v} has two warpgroups at the queries of a key, and "
            f"'{plan.graph.name}' sums over them",
            remedy="use backend='triton'",
        )
    if bands:
        k["helpers"] |= {"_by_distance"}
    chains = k.pop("chains")
    branches = _branches(plan, chains, qk_chunks) if len(chains) > 1 else []
    bounds = k["bounds"]
    tiles = [*bounds.setup, "i = 0", *bounds.mixed, *bounds.full]
    place = ["n = kv_len + heads + GROUP + SPLITS", *(["n = q_len"] if shares else [])]
    wanted = tuple(f"WANT_{g.name.upper()}" for g in (*k["gradients"], *bands))
    pointers = [
        "KEY_SUMS_PTR",
        "ADDED_PTR",
        *(f"{name.upper()}_PTR" for name in plan.columns),
        *(f"{g.name.upper()}_PTR" for g in (*k["gradients"], *bands)),
    ]
    show = [line for chain in chains for line in chain["show"]]
    own, unmasked, hide = [], [], []
    for chain in chains:
        weighed = [*chain["score_lines"], f"s{chain['tag']} = {chain['score']}", *chain["weight_lines"]]
        own += [*weighed, *chain["show"], *chain["grad_lines"]]
        unmasked += [*weighed, *chain["grad_lines"]]
        hide += chain["hide"]
    asked = keyed_values(plan, k.pop("streamed"), [*k["outer"], *k["by_head"]], [*own, *hide], show)
    passed = [line for lines in k["passed_on"] for line in lines]
    own += [*k["outer"], *k["by_head"], *passed, *k["final_lines"]]
    own += [f"n = {chain['dqk_scale']}" for chain in chains]
    wants_q_idx = "q_idx" in free_names(unmasked) or bool(hide)
    # strips are weighed one after the other, so what the cotangents take of a strip has a name of its own
    early = {"qk", "s", *k["saved"], *(x.name for x in asked.values if x.always)}
    early |= set_names([*chains[0]["score_lines"], *chains[0]["weight_lines"]])
    sloped = free_names(chains[0]["grad_lines"])
    late_rows = [name for name in k["saved"] if name in sloped]
    late_asked = [x for x in asked.values if x.always and x.name in sloped]
    early -= {*late_rows, *(x.name for x in late_asked)}
    late = free_names([*chains[0]["grad_lines"], *(show if hide else ()), *hide])
    around = free_names([*k["outer"], *k["by_head"], *passed, *k["final_lines"]])
    arguments = kernel_arguments(plan, pointers, bool(bounds.scan), _COMMON)
    adds, grads = free_names([*place, *tiles]), free_names([*place, *tiles, *own])
    loads = free_names([*place, *tiles, *asked.block_lines, *asked.lines])
    slots = {key: translated(value) for key, value in {**k, **chains[0]}.items()}
    alike = plan.masks == (sympy.true,)
    dealt = deals and not (is_wide or strips or branches or bands)
    rounds = dealt and not third
    parts = pieces(qk_chunks, 2 * NARROW if is_wide else NARROW)
    slots.update(
        arguments=arguments,
        wanted=wanted,
        loads=[n for n in arguments if n in loads],
        adds=[n for n in arguments if n in adds or n == "q_len"],
        grads=[n for n in arguments if n in grads or n in pointers],
        **tile_slots(bounds),
        asked=asked.values,
        asked_head=[in_gluon(line) for line in asked.block_lines],
        asked_lines=[in_gluon(line) for line in asked.lines],
        wants_q_idx=wants_q_idx,
        wants_kv_idx="kv_idx" in free_names(unmasked) or bool(hide),
        keeps_kv_idx=not (strips or bands) or "kv_idx" in around or bool(k["gradients"] or plan.columns),
        keeps_kv_in_tile=not bands or "kv_in_tile" in around,
        strips=strips,
        halvings=strips.bit_length() - 1,
        late=strips > STRIPS_BESIDE,
        passed_on=[[in_gluon(line) for line in lines] for lines in k["passed_on"]] if passes_on(plan) else [],
        sums_of_k=[(name, in_gluon(text)) for name, text in k["sums_of_k"]],
        late_rows=late_rows,
        late_asked=late_asked,
        kept=[name for name in late if name in early],
        places_slope=not _PLACES.isdisjoint(late),
        branches=branches,
        alive=[saw_a_key(part) for part in plan.parts],
        in_turn=takes_turns(plan, d_qk, d_v),
        wide=is_wide,
        shares=shares,
        third=third,
        claims=not is_wide and not third,
        rotates=not is_wide and not third and alike,
        alike=alike,
        bands=bands,
        band_queries=ROWS // max(strips, 1),
        frugal=bool(strips or bands) or (is_wide and not shares),
        held=not (strips or bands) and holds_keys(d_qk, d_v, plan.facts.warps),
        registers=(EVEN_REGISTERS[2], EVEN_REGISTERS[3]),
        pieces=parts,
        deals=dealt,
        rounds=rounds,
        scales=rounds and finish_slots(plan, d_qk, d_v)["scale"] == "scale",
        leaves_values=dealt and not third and out_in_q(d_qk, d_v),
        stages_beside_keys=stages_beside_keys(d_qk, d_v, len(k["rows"]) + len(asked.values)),
    )
    return slots


def _branches(plan: Plan, chains: list[dict[str, Any]], qk_chunks: tuple[Chunk, ...]) -> list[dict[str, Any]]:
    """What each branch does with a tile, in Gluon. Branches with the same mask each look at it: what one sees in tiles
    that the mask cuts, others do not know in all of them."""
    shown = {chain["visible"]: chain["show"] for chain in reversed(chains)}
    found = []
    for part, chain in zip(plan.parts, chains, strict=True):
        slots = {key: translated(value) for key, value in {**chain, "show": shown[chain["visible"]]}.items()}
        slots["saved"] = [part.own(name) for name in part.backward.pair_rows]
        slots["delta"] = part.own("delta") if plan.needs_delta else ""
        slots["chunks"] = tuple(c for c in qk_chunks if c.branch == part.branch)
        found.append(slots)
    return found


def finish_slots(plan: Plan, d_qk: int, d_v: int, rounded: bool = False) -> dict[str, Any]:
    """Slots of hopper_finish.py.j2: what the sums of dQ are multiplied by, in Triton, the pieces they come in, and the
    queries of a tile; `rounded`: has dkdv_kernel rounded some of them?"""
    lowering = Lowering(plan.core, base_leaves(plan, {}))
    scales = {part.backward.dqk_scale for part in plan.parts}  # branches with scales of their own have them in ds
    scale = lowering.emit(scales.pop() if len(scales) == 1 else sympy.S.One)
    lines = [*lowering.outer, *lowering.body]
    return {
        "lines": lines,
        "scale": scale,
        "helpers": lowering.helpers,
        "pieces": pieces(chunks(d_qk, len(plan.parts)), NARROW),
        "claims": not summed_apart(d_qk, d_v, plan.facts.warps),
        "queries": queries(d_qk, d_v, plan.facts.warps),
        "rounded": rounded,
    }


def summed_by_distance(plan: Plan, d_qk: int, d_v: int) -> list[InputGradient]:
    """Gradients with an entry a distance between query and key, as a relative bias has, that the kernel adds up, in any
    order, where it sums dQ so: whole tiles of ds are there anyway."""
    return [] if wide(d_qk, d_v) else by_distance(plan)


def by_distance(plan: Plan) -> list[InputGradient]:
    """The gradients with an entry a distance for which ds is all that is needed."""
    return [g for g in plan.gradients if g.kind == "band" and over_ds(plan, g) is not None]


def takes_turns(plan: Plan, d_qk: int, d_v: int) -> bool:
    """Do programs add to a tile of dQ one after the other where that order must be fixed? Where each visits an unbroken
    run of tiles, it counts those that come before it."""
    return len(plan.over_queries.segments) == 1 and not wide(d_qk, d_v)


def by_row(plan: Plan) -> list[str]:
    """The inputs whose gradients are sums over the keys of a row, which the kernel of dQ has."""
    elsewhere = summed_by_key(plan)
    rows = (g for g in plan.gradients if g.kind in ("program", "row") and g not in elsewhere and not g.own)
    return list(dict.fromkeys(g.read.input for g in rows))


def passes_on(plan: Plan) -> bool:
    """Do terms of the similarity, which a query and a key have each, have gradients of their own? Then dK has a part
    that is made of k when all queries are through, and dQ its own kernel, which does the like."""
    return any(g.own for g in plan.gradients)


def no_backward(plan: Plan) -> str:
    """Why a variant that has a forward in Gluon has no backward there; empty where it has one."""
    if any(part.backward.cotangents for part in plan.parts):
        return "the gradient needs a sweep over the keys first, which Gluon kernels have not"
    terms = SimilaritySlots(plan)
    if plan.columns and (len(plan.parts) > 1 or terms.gradients):
        return "the gradient needs a sweep over the queries first, beside branches or terms of the similarity"
    if plan.core is not plan.graph and (not terms.plain_dot or terms.gradients):
        return "the Gluon backward multiplies q with k alone, and this similarity has more"
    if any(part.graph.has_dot and part.backward.dqk == 0 for part in plan.parts):
        return "q and k have no gradient, and the Gluon backward is about making theirs"
    if _sums_the_exact_delta(plan):
        return "an input has gradients by key and by query, for which the kernel of dQ finds the exact delta first"
    return ""


def _sums_the_exact_delta(plan: Plan) -> bool:
    """Would the kernel of dQ leave its exact delta to that of dK and dV, as `settles_delta` says?"""
    of_delta = [(g.kind, g.read.input) for g in plan.gradients if not (g.row_only or g.own) and g.expr.has(DELTA)]
    return any(("col", name) in of_delta for kind, name in of_delta if kind in ("program", "row"))


def _refuse(plan: Plan) -> None:
    refuse(plan)
    reason = no_backward(plan)
    if reason:
        raise UnsupportedError(f"'{plan.graph.name}': {reason}", remedy="use backend='triton'")
