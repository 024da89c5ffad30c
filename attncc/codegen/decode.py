"""Template slots of the split-KV kernels: the forward over a part of the keys, and the merge of the parts.

The query heads of a group see the same keys, so they are rows of one tile: h varies by row there, as q_idx does. A part
ends with the unfinished state of its loop. The merge rescales each state to the joint maxima, by the factors that
rescale it inside the loop, adds the states, and finishes the row once, sinks included.
"""

from __future__ import annotations

from typing import Any

from attncc.codegen.chunks import Chunk
from attncc.codegen.forward import NEGATIVE, end_slots, forward_slots
from attncc.codegen.lower import Leaf, Lowering
from attncc.codegen.pairs import base_leaves, take
from attncc.codegen.plan import Plan
from attncc.errors import UnsupportedError
from attncc.ir.levels import Level
from attncc.passes.fold import exp2
from attncc.passes.reverse import first_at, ties
from attncc.passes.stream import renamed

#: with the heads of a group packed into a tile, the query head is a value per row
_BY_ROW = {"h": Leaf("h", Level.ROW)}
#: in the merge a program has one row, so its vectors run along the parts of the keys
_ONE_ROW = {"q_idx": Leaf("q_idx", Level.PROGRAM)}


def decode_slots(plan: Plan, qk_chunks: tuple[Chunk, ...], fades: bool = False) -> dict[str, Any]:
    """Slots of decode.py.j2, those of forward.py.j2 among them, and under `merge` those of merge.py.j2. `fades`: as in
    `forward_slots`.

    UnsupportedError if partial results over the keys cannot be merged."""
    if plan.whole_rows:
        raise UnsupportedError(
            f"the keys of '{plan.graph.name}' cannot be dealt to several programs: {plan.whole_rows}",
            remedy="give a schedule without splits",
        )
    f = forward_slots(plan, qk_chunks, own=_BY_ROW if plan.packs_heads else {}, fades=fades)
    counts_seen = [bool(x["count_seen"]) for x in f["chains"]]
    states = [name for x, seen in zip(f["chains"], counts_seen, strict=True) for name in _states(x, seen)]
    merge = _merge_slots(plan, counts_seen, states)
    return {
        **f,
        "packed": plan.packs_heads,
        "states": states,
        "merge": merge,
        "helpers": f["helpers"] | merge["helpers"] | {"_others_may_start"},
    }


def _states(chain: dict[str, Any], counts_seen: bool) -> list[str]:
    """The row statistics that a part of the keys passes to the merge, besides its accumulator."""
    return [*(m for m, _ in chain["moves"]), *chain["sums"], *([f"seen{chain['tag']}"] if counts_seen else [])]


def _merge_slots(plan: Plan, counts_seen: list[bool], states: list[str]) -> dict[str, Any]:
    """Slots of merge.py.j2: the factors that rescale each part's state to the joint maxima, and lines that finish a
    row."""
    parts: dict[str, Leaf] = {}
    joint: dict[str, Leaf] = {}
    for part in plan.parts:
        for m in part.online.max_symbols:
            name, new = part.own(m.name), part.own(renamed(m).name)
            parts |= {name: Leaf(f"{name}_part", Level.ROW), new: Leaf(new, Level.PROGRAM)}
            joint[name] = Leaf(name, Level.PROGRAM)
            joint |= {part.own(s.name): Leaf(part.own(s.name), Level.PROGRAM) for s in (first_at(m), ties(m))}
        joint |= {part.own(r.symbol.name): Leaf(part.own(r.symbol.name), Level.PROGRAM) for r in part.online.sums}
    scaling = Lowering(plan.core, base_leaves(plan, {**_ONE_ROW, **parts}), running=frozenset(parts))
    chains = [_merge_chain(part, scaling, states, seen) for part, seen in zip(plan.parts, counts_seen, strict=True)]
    leaves, helpers = base_leaves(plan, {**_ONE_ROW, **joint}), scaling.helpers
    after = Lowering(plan.core, leaves, running=frozenset(joint), helpers=helpers, _names=scaling._names)
    for chain, part in zip(chains, plan.parts, strict=True):
        end = end_slots(part, after)
        chain.update({**end, "final_lines": [*_outer(after), *end["final_lines"]]})
    return {"chains": chains, "outer": scaling.outer, "negative": NEGATIVE, "helpers": scaling.helpers}


def _merge_chain(part: Plan, scaling: Lowering, states: list[str], counts_seen: bool) -> dict[str, Any]:
    """Slots that merge one branch's partial results over parts of the keys."""
    online, folded, own = part.online, part.folded, part.own
    rescales = [
        part.tagged(folded.apply_online(r.rescale, online.max_symbols)) for r in (online.numerator, *online.sums)
    ]
    factors: dict[Any, str] = {}
    lines: list[str] = []
    for rescale in rescales:
        if rescale != 1 and rescale not in factors:
            factors[rescale] = own("alpha" if not factors else f"alpha_{len(factors)}")
            text = scaling.emit(rescale)
            lines += take(scaling)
            if not isinstance(rescale, exp2):  # as in the loop: a part that saw nothing has no maximum to scale from
                text = f"tl.where({own(online.max_symbols[0].name)}_part > {NEGATIVE}, {text}, 0.0)"
            lines.append(f"{factors[rescale]} = {text}")
    maxima = [(own(m.name), own(renamed(m).name)) for m in online.max_symbols]
    # a maximum stored with its position keeps the first part's position that attains it; ties add up over the parts
    kept = dict(part.stored)
    places = [
        (own(first_at(m).name), own(ties(m).name), own(m.name), own(renamed(m).name))
        for m in online.max_symbols
        if first_at(m).name in kept
    ]
    sums = [(own(r.symbol.name), factors.get(e)) for r, e in zip(online.sums, rescales[1:], strict=True)]
    seen = own("seen") if counts_seen else None
    named = [
        *(m for m, _ in maxima),
        *(s for s, _ in sums),
        *(n for first, count, *_ in places for n in (first, count)),
    ]
    named += [seen] if seen else []
    return {
        "tag": part.tag,
        "moves": maxima,
        "sums": sums,
        "places": places,
        "seen": seen,
        "at": {name: states.index(name) for name in named},
        "rescale_lines": lines,
        "acc_factor": factors.get(rescales[0]),
    }


def _outer(lowering: Lowering) -> list[str]:
    """Remove and return the lines that need none of the joint state, which go before those that do."""
    lines = list(lowering.outer)
    lowering.outer.clear()
    return lines
