"""Template slots of the Gluon backward for Hopper: those of dkdv.py.j2, divided among specialized warps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from attncc.codegen.backward import dkdv_slots, saw_a_key, summed_by_key
from attncc.codegen.chunks import Chunk, chunks
from attncc.codegen.hopper import KeyedValues, kernel_arguments, keyed_values, refuse, tile_slots, translated
from attncc.codegen.launch import EVEN_REGISTERS
from attncc.codegen.lower import Lowering
from attncc.codegen.pair_exprs import over_ds
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

#: the positions of a tile's queries and keys, which are recomputed instead of kept for a strip
_PLACES = frozenset({"q_idx", "kv_idx", "q_in_tile", "tile_shift"})
#: arguments of the kernel that its warps may need, besides the variant's inputs
_COMMON = ("scale", "heads", "q_len", "kv_len", "GROUP", "SPLITS", "WIDE", "FAST_MATH")


@dataclass(frozen=True)
class Piece:
    """Columns of a tile of dQ that a warpgroup computes with one matmul: `width` columns of dQ from `start`, which are
    those of chunk number `chunk` of k from its column `offset`. `whole`: they are the whole chunk."""

    chunk: int
    offset: int
    start: int
    width: int
    whole: bool


def pieces(qk_chunks: tuple[Chunk, ...], widest: int) -> tuple[Piece, ...]:
    """The columns of dQ in pieces of at most `widest`. With 64, each of two warpgroups computes one piece, or a third
    warpgroup computes them one after the other, as the kernel for wide heads does.

    Operands are cut only at multiples of 128 bytes, where the swizzled layout in shared memory repeats."""
    found = []
    for c in qk_chunks:
        width = min(c.width, widest)
        for offset in range(0, c.width, width):
            found.append(Piece(c.index, offset, c.start + offset, width, width == c.width))
    return tuple(found)


def hopper_backward_slots(
    plan: Plan, d_qk: int, d_v: int, shared_key: bool = False, strips: int = 0, deals: bool = False
) -> dict[str, Any]:
    """Slots of the Gluon kernel of dK and dV: those of dkdv.py.j2 in Gluon, and the names that each function takes.

    The template is hopper_backward.py.j2; for wide heads hopper_backward_own.py.j2 or hopper_backward_wide.py.j2; for
    several branches hopper_backward_branches.py.j2. `strips` and `deals` are the arguments of `render`. The slots that
    dkdv.py.j2 does not have are

    - those of `_argument_slots`, `_strip_slots` and `_division_slots`;
    - `pieces`: the columns of dQ, divided as the warpgroups compute them;
    - `asked`: values per query that the loading warp reads ahead of their use;
    - `alive`: for each delta, the condition that its row has seen a key;
    - `branches`: the slots of each of several branches, with its own chunks of q and row statistics; empty with one
      branch, whose slots are the kernel's;
    - `passed_on`: for each chunk of k, lines that add the contribution of the similarity's terms to dK. They run after
      all queries of a head, or after all heads where `sums_of_k` gives the terms' sums as multiples of k . dK;
    - `bands`: gradients with an entry per distance that the kernel sums, `band_queries` queries at once;
    - `wants_q_idx`, `wants_kv_idx`: whether tiles that the mask leaves whole need the indices of their pairs, too;
    - `keeps_kv_idx`, `keeps_kv_in_tile`: whether these indices of keys stay in registers through the loop;
    - `held`: keys and values stay in registers, as left operands;
    - `frugal`: registers are scarce: the loading warp also stores dK and dV, and indices of keys are recomputed per
      tile;
    - `registers`: registers per thread at launch, with two and three warpgroups;
    - `stages_beside_keys`: the most tiles of queries in shared memory that leave room for a second tile of keys.
    """
    _refuse(plan, d_qk, d_v)
    qk_chunks = chunks(d_qk, len(plan.parts), shared_key)
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
    stages = _Stages.of(chains)
    before = [*k["outer"], *k["by_head"]]
    asked = keyed_values(plan, k.pop("streamed"), before, [*stages.lines, *stages.hide], stages.show)
    outside = [*before, *(line for lines in k["passed_on"] for line in lines), *k["final_lines"]]
    around = free_names(outside)
    computed = [*stages.lines, *outside, *(f"n = {chain['dqk_scale']}" for chain in chains)]
    slots = {key: translated(value) for key, value in {**k, **chains[0]}.items()}
    slots.update(
        **_argument_slots(plan, k, bands, shares, asked, computed),
        **tile_slots(k["bounds"]),
        **_strip_slots(k, chains[0], stages, asked, strips),
        **_division_slots(plan, d_qk, d_v, strips, deals and not (branches or bands)),
        pieces=pieces(qk_chunks, 2 * NARROW if wide(d_qk, d_v) else NARROW),
        asked=asked.values,
        asked_head=[in_gluon(line) for line in asked.block_lines],
        asked_lines=[in_gluon(line) for line in asked.lines],
        wants_q_idx="q_idx" in free_names(stages.unmasked) or bool(stages.hide),
        wants_kv_idx="kv_idx" in free_names(stages.unmasked) or bool(stages.hide),
        keeps_kv_idx=not (strips or bands) or "kv_idx" in around or bool(k["gradients"] or plan.columns),
        keeps_kv_in_tile=not bands or "kv_in_tile" in around,
        passed_on=[[in_gluon(line) for line in lines] for lines in k["passed_on"]] if passes_on(plan) else [],
        sums_of_k=[(name, in_gluon(text)) for name, text in k["sums_of_k"]],
        branches=branches,
        alive=[saw_a_key(part) for part in plan.parts],
        bands=bands,
        band_queries=ROWS // max(strips, 1),
        frugal=bool(strips or bands) or (wide(d_qk, d_v) and not shares),
        held=not (strips or bands) and holds_keys(d_qk, d_v, plan.facts.warps),
        registers=(EVEN_REGISTERS[2], EVEN_REGISTERS[3]),
        stages_beside_keys=stages_beside_keys(d_qk, d_v, len(k["rows"]) + len(asked.values)),
    )
    return slots


@dataclass(frozen=True)
class _Stages:
    """The stages of all branches as statements: `lines` of a tile that the mask cuts, `unmasked` of one that it leaves
    whole, `show` those that compute the mask, `hide` those that apply it to gradients."""

    lines: list[str]
    unmasked: list[str]
    show: list[str]
    hide: list[str]

    @classmethod
    def of(cls, chains: list[dict[str, Any]]) -> _Stages:
        found = cls([], [], [], [])
        for chain in chains:
            weighed = [*chain["score_lines"], f"s{chain['tag']} = {chain['score']}", *chain["weight_lines"]]
            found.lines.extend([*weighed, *chain["show"], *chain["grad_lines"]])
            found.unmasked.extend([*weighed, *chain["grad_lines"]])
            found.show.extend(chain["show"])
            found.hide.extend(chain["hide"])
        return found


def _argument_slots(
    plan: Plan, k: dict[str, Any], bands: list[InputGradient], shares: bool, asked: KeyedValues, lines: list[str]
) -> dict[str, Any]:
    """The kernel's `arguments` that hold no tile, and of those the ones that the warps need which load (`loads`), which
    add to dQ (`adds`) and which compute (`grads`, with all `lines`). `wanted`: flags, one per gradient of an input."""
    bounds = k["bounds"]
    tiles = [*bounds.setup, "i = 0", *bounds.mixed, *bounds.full]
    place = ["n = kv_len + heads + GROUP + SPLITS", *(["n = q_len"] if shares else [])]
    pointers = [
        "KEY_SUMS_PTR",
        "ADDED_PTR",
        *(f"{name.upper()}_PTR" for name in plan.columns),
        *(f"{g.name.upper()}_PTR" for g in (*k["gradients"], *bands)),
    ]
    arguments = kernel_arguments(plan, pointers, bool(bounds.scan), _COMMON)
    adds, grads = free_names([*place, *tiles]), free_names([*place, *tiles, *lines])
    loads = free_names([*place, *tiles, *asked.block_lines, *asked.lines])
    return {
        "arguments": arguments,
        "wanted": tuple(f"WANT_{g.name.upper()}" for g in (*k["gradients"], *bands)),
        "loads": [n for n in arguments if n in loads],
        "adds": [n for n in arguments if n in adds or n == "q_len"],
        "grads": [n for n in arguments if n in grads or n in pointers],
    }


def _strip_slots(
    k: dict[str, Any], chain: dict[str, Any], stages: _Stages, asked: KeyedValues, strips: int
) -> dict[str, Any]:
    """The slots of a tile that is weighed in `strips` of queries, one after the other; 0: all at once.

    - `late`: whether the matmul of dp begins only after all strips are weighed;
    - `kept`: the values of a strip that ds needs, which therefore have a name per strip;
    - `late_rows`, `late_asked`: row statistics, and values of `asked`, that are loaded again for ds instead;
    - `places_slope`: whether ds depends on the positions of queries or keys.
    """
    early = {"qk", "s", *k["saved"], *(x.name for x in asked.values if x.always)}
    early |= set_names([*chain["score_lines"], *chain["weight_lines"]])
    sloped = free_names(chain["grad_lines"])
    late_rows = [name for name in k["saved"] if name in sloped]
    late_asked = [x for x in asked.values if x.always and x.name in sloped]
    early -= {*late_rows, *(x.name for x in late_asked)}
    late = free_names([*chain["grad_lines"], *(stages.show if stages.hide else ()), *stages.hide])
    return {
        "strips": strips,
        "halvings": strips.bit_length() - 1,
        "late": strips > STRIPS_BESIDE,
        "late_rows": late_rows,
        "late_asked": late_asked,
        "kept": [name for name in late if name in early],
        "places_slope": not _PLACES.isdisjoint(late),
    }


def _division_slots(plan: Plan, d_qk: int, d_v: int, strips: int, deals: bool) -> dict[str, Any]:
    """How programs, and the warps of each, divide the work; `deals` is kept only where this kernel supports it.

    - `wide`: dQ has a kernel of its own; `third`: a third warpgroup computes dQ;
    - `shares`: both warpgroups have the same keys;
    - `alike`: all blocks of keys visit the same tiles; `rotates`: each block then starts at a different one;
    - `in_turn`: programs can add to dQ in a fixed order;
    - `claims`: the first program at a tile of dQ stores instead of adding, so that dQ is not zeroed before;
    - `deals`: the kernel is persistent: a program computes one block of keys after another;
    - `rounds`: two of its warps convert dQ of finished heads to 16 bits, multiplied by the scale if `scales`;
    - `leaves_values`: the values' shared memory is released after their last read, since dV can be staged in the keys'.
    """
    is_wide, third = wide(d_qk, d_v), summed_apart(d_qk, d_v, plan.facts.warps)
    alike = plan.masks == (sympy.true,)
    dealt = deals and not (is_wide or strips)
    rounds = dealt and not third
    return {
        "wide": is_wide,
        "third": third,
        "shares": shares_keys(d_qk, d_v, plan.facts.warps),
        "alike": alike,
        "rotates": not is_wide and alike,
        "in_turn": takes_turns(plan, d_qk, d_v),
        "claims": not is_wide and not third,
        "deals": dealt,
        "rounds": rounds,
        "scales": rounds and finish_slots(plan, d_qk, d_v)["scale"] == "scale",
        "leaves_values": dealt and not third and out_in_q(d_qk, d_v),
    }


def _branches(plan: Plan, chains: list[dict[str, Any]], qk_chunks: tuple[Chunk, ...]) -> list[dict[str, Any]]:
    """The slots of each branch, in Gluon. Each branch computes its mask, even if another has the same: the value from
    one branch is not available in the others, because it is computed only in tiles that the mask cuts."""
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
    """Slots of hopper_finish.py.j2, in Triton: the factor (`scale`) of the sums of dQ, the pieces that they are stored
    in, and the queries of a tile. `rounded`: whether dkdv_kernel has converted some of them to 16 bits already."""
    lowering = Lowering(plan.core, base_leaves(plan, {}))
    scales = {part.backward.dqk_scale for part in plan.parts}  # if they differ, ds already contains them
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
    """Gradients with an entry per distance between query and key, such as that of a relative bias, which the kernel of
    dK and dV sums if it sums dQ, too: whole tiles of ds are at hand there. The order of the sums is not fixed."""
    return [] if wide(d_qk, d_v) else by_distance(plan)


def by_distance(plan: Plan) -> list[InputGradient]:
    """The gradients with an entry per distance that are multiples of ds."""
    return [g for g in plan.gradients if g.kind == "band" and over_ds(plan, g) is not None]


def takes_turns(plan: Plan, d_qk: int, d_v: int) -> bool:
    """Whether programs can add to a tile of dQ in a fixed order. This takes an unbroken run of tiles per program: then
    each program can count the programs that precede it at a tile."""
    return len(plan.over_queries.segments) == 1 and not wide(d_qk, d_v)


def by_row(plan: Plan) -> list[str]:
    """The inputs whose gradients are sums over the keys of a row, which only the Triton kernel of dQ computes."""
    elsewhere = summed_by_key(plan)
    rows = (g for g in plan.gradients if g.kind in ("program", "row") and g not in elsewhere and not g.own)
    return list(dict.fromkeys(g.read.input for g in rows))


def passes_on(plan: Plan) -> bool:
    """Whether row or column terms of the similarity have gradients. Each kernel then adds their contribution after its
    loop: to dK computed from k, and to dQ, which has a kernel of its own, computed from q."""
    return any(g.own for g in plan.gradients)


def no_backward(plan: Plan) -> str:
    """Why a variant with a Gluon forward has no Gluon backward; "" if it has one."""
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
    """Whether the kernel of dK and dV would need the exact delta from the kernel of dQ, as in `settles_delta`."""
    of_delta = [(g.kind, g.read.input) for g in plan.gradients if not (g.row_only or g.own) and g.expr.has(DELTA)]
    return any(("col", name) in of_delta for kind, name in of_delta if kind in ("program", "row"))


def _refuse(plan: Plan, d_qk: int, d_v: int) -> None:
    """UnsupportedError if Gluon has no backward for a variant, or not for these head dimensions."""
    refuse(plan)
    reason = no_backward(plan)
    if reason:
        raise UnsupportedError(f"'{plan.graph.name}': {reason}", remedy="use backend='triton'")
    if queries(d_qk, d_v, plan.facts.warps) is None:
        raise UnsupportedError(
            f"the Gluon backward of '{plan.graph.name}' shares dQ out between two warpgroups, and cannot do so with "
            f"heads of {d_qk}{f' in {len(plan.parts)} branches' if len(plan.parts) > 1 else ''}",
            remedy="use backend='triton'",
        )
