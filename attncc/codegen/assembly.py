"""Assemble a module over all pairs: its kernels in order, the helpers they call, and the facts its host code needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from attncc.codegen.backward import dkdv_slots, dq_slots, settles_delta
from attncc.codegen.bounds import BoundLines
from attncc.codegen.chunks import Chunk, chunks, value_chunks
from attncc.codegen.columns import column_slots
from attncc.codegen.components import WIDEST
from attncc.codegen.decode import decode_slots
from attncc.codegen.forward import forward_slots
from attncc.codegen.hopper import hopper_forward_slots
from attncc.codegen.hopper_backward import by_row, finish_slots, hopper_backward_slots
from attncc.codegen.hopper_decode import hopper_decode_slots
from attncc.codegen.hopper_dq import hopper_dq_slots
from attncc.codegen.indices import collect_lines, nested_reads
from attncc.codegen.kernels import bounds_slots, distance_slots, pair_slots, summary_slots, table_slots
from attncc.codegen.pairs import base_leaves
from attncc.codegen.plan import Plan
from attncc.codegen.row_cotangents import cotangent_slots
from attncc.codegen.similarity import KEY, QUERY, SimilaritySlots, term_slots
from attncc.ir import symbols as sym
from attncc.ir.text import formula
from attncc.passes.tiles import TilePlan
from attncc.schedule.problem import MAX_CHUNK, Form

Slots = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """The sizes that a module is made for: the last dimensions of q, k and v and their tiles; `values`: heads of v per
    head of k. `d_k` is less than `d_qk` if branches of q share one k.
    """

    d_qk: int
    d_k: int
    d_v: int
    values: int
    qk_chunks: tuple[Chunk, ...]
    v_chunks: tuple[Chunk, ...]

    @classmethod
    def of(cls, plan: Plan, d_qk: int, d_k: int, d_v: int, values: int) -> Shape:
        graph = plan.graph
        widest = WIDEST if plan.similarity.loops and graph.value is None else MAX_CHUNK
        pieces = chunks(d_qk, graph.branches, shared_key=d_k != d_qk, value=graph.value, widest=widest)
        return cls(d_qk, d_k, d_v, values, pieces, value_chunks(d_v, values))

    @property
    def shared_key(self) -> bool:
        return self.d_k != self.d_qk


@dataclass
class Assembly:
    """A module's parts. `kernels`: templates with their slots, in order; `bounds`: kernels that find loop bounds, which
    run before all others; `helpers`, `in_warps`: names of the functions that Triton's and Gluon's kernels call; `host`:
    slots of the host code."""

    plan: Plan
    shape: Shape
    similarity: SimilaritySlots = field(init=False)
    kernels: list[tuple[str, Slots]] = field(default_factory=list)
    bounds: list[Slots] = field(default_factory=list)
    helpers: set[str] = field(default_factory=set)
    in_warps: set[str] = field(default_factory=set)
    host: Slots = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.similarity = SimilaritySlots(self.plan)

    def add(self, template: str, **slots: Any) -> None:
        """Append a kernel."""
        self.kernels.append((template, slots))


def assemble(
    plan: Plan,
    shape: Shape,
    forward_in: Form = "triton",
    backward: bool = False,
    hopper_backward: bool = False,
    tma: bool = False,
    strips: int = 0,
    deals: bool = False,
) -> Assembly:
    """The parts of a module; the arguments are those of `render`. `hopper_backward`: the kernel for dK and dV is in
    Gluon."""
    module = Assembly(plan, shape)
    _forward(module, forward_in)
    if backward:
        _backward(module, hopper_backward, tma, strips, deals)
    _tables(module, backward)
    _scans(module)
    return module


def _forward(module: Assembly, forward_in: Form) -> None:
    """The kernels of the similarity's row and column terms, then the forward in the form asked for."""
    plan, shape, hopper = module.plan, module.shape, "gluon" in forward_in
    base = base_leaves(plan, {})
    sides = [side for side in (QUERY, KEY) if module.similarity.terms(side)]
    terms = [term_slots(module.similarity, side, shape.qk_chunks, base) for side in sides]
    if forward_in == "gluon_decode":
        f = hopper_decode_slots(plan, shape.qk_chunks, shape.v_chunks)
    elif forward_in == "gluon":
        f = hopper_forward_slots(plan, shape.d_qk, shape.d_v, shared_key=shape.shared_key)
    elif forward_in == "decode":  # without tables by distance: they would be longer than what is read from them
        f = decode_slots(plan, shape.qk_chunks)
    else:
        f = forward_slots(plan, shape.qk_chunks, tables=plan.score_tables.read)
    module.helpers |= set(f["helpers"]).union(*(t["helpers"] for t in terms))
    if hopper:
        module.in_warps |= set(f["helpers"]) - {"_others_may_start"}
    else:
        module.helpers.add("_add_product")
    packed = f.get("packed", False)
    module.bounds += bounds_of(plan, "kv", plan.over_keys, f["bounds"], packed)
    for t in terms:
        module.add("terms.py.j2", t=t, graph=plan.graph)
    names = {"triton": "forward", "gluon": "hopper_forward", "decode": "decode", "gluon_decode": "hopper_decode"}
    module.add(f"{names[forward_in]}.py.j2", f=f)
    if "decode" in forward_in:
        module.add("merge.py.j2", f=f)
    module.host |= {
        "f": f,
        "forward_host": "decode_host.py.j2" if "decode" in forward_in else f"{names[forward_in]}_host.py.j2",
        "packs_heads": packed,
        "graph": plan.graph,
        "terms": terms,
        "term_names": "".join(f"{term.name}, " for t in terms for term in t["terms"]),
        "gradients": (),
        "vector_gradients": (),
        "saved": (),
        "pair": {},
        "tables": {},
        "nested_reads": False,
        "cotangents": [],
        "columns": None,
        "maps": bool(f.get("maps")),
    }


def _backward(module: Assembly, hopper: bool, tma: bool, strips: int, deals: bool) -> None:
    """The kernels of the backward, in order: row statistics, dK and dV, dQ, gradients with an entry per pair."""
    plan, shape, similarity = module.plan, module.shape, module.similarity
    if hopper:
        kv = hopper_backward_slots(plan, shape.d_qk, shape.d_v, shape.shared_key, strips, deals)
    else:
        kv = dkdv_slots(plan, shape.qk_chunks, tma)
    dq = dq_slots(plan, shape.qk_chunks, tma, elsewhere=kv["gradients"])
    dq["settles_delta"] = not hopper and settles_delta(kv, dq)
    pair = {g.number: pair_slots(plan, shape.qk_chunks, g) for g in plan.gradients if g.kind in ("tile", "band")}
    pair |= {band.number: table_slots(plan, shape.qk_chunks, band) for band in similarity.bands}
    for p in pair.values():
        p.update(_kept(plan, p["gradient"]))
    swept = [cotangent_slots(plan, part, shape.qk_chunks) for part in plan.parts if part.backward.cotangents]
    columns = column_slots(plan, shape.qk_chunks) if plan.columns else None
    for slots in (kv, dq, *pair.values(), *swept, *([columns] if columns else [])):
        module.helpers |= slots["helpers"]
    module.bounds += bounds_of(plan, "q", plan.over_queries, kv["bounds"])

    if plan.needs_delta and (columns or not hopper):
        module.add("delta.py.j2")
    for slots in swept:
        module.add("cotangents.py.j2", k=slots)
    if columns:
        module.add("columns.py.j2", k=columns)
    if hopper:
        _hopper_backward(module, kv)
    else:
        module.add("dkdv.py.j2", k=kv)
    if not (hopper and kv["wide"]) or by_row(plan):
        module.add("dq.py.j2", k=dq)
    for p in pair.values():
        module.add("pair_grad.py.j2", k=p, what=formula(p["gradient"].read))

    collects = collect_lines(plan, (*similarity.gradients, *similarity.bands))
    module.host |= {
        "kv": kv,
        "dq": dq,
        "pair": pair,
        "gradients": plan.gradients,
        "vector_gradients": similarity.gradients,
        "saved": plan.saved,
        "collects": collects,
        "shifts": any("_shifted(" in line for line in collects),
        "nested_reads": nested_reads((*plan.gradients, *similarity.gradients, *similarity.bands)),
        "cotangents": swept,
        "columns": columns,
        "by_row": by_row(plan),
        "maps": any(slots.get("maps") for slots in (module.host["f"], kv, dq)),
    }


def _hopper_backward(module: Assembly, kv: Slots) -> None:
    """Gluon's kernels: the preparation; dK and dV, with sums of dQ unless heads are wide; then dQ of wide heads, or the
    conversion of its sums."""
    plan, shape = module.plan, module.shape
    weighing: tuple[str, ...] = ("hopper_backward_dq.py.j2", "hopper_backward.py.j2")
    if kv["branches"]:
        weighing = ("hopper_backward_dq.py.j2", "hopper_backward_branches.py.j2")
    if kv["wide"]:
        weighing = ("hopper_backward_wide.py.j2" if kv["shares"] else "hopper_backward_own.py.j2",)
    if kv["rounds"]:
        weighing = (weighing[0], "hopper_backward_round.py.j2", weighing[1])
    for template in ("hopper_prepare.py.j2", "hopper_backward_load.py.j2", *weighing):
        module.add(template, f=kv)
    module.in_warps |= kv["helpers"]
    if kv["wide"]:
        last = module.host["rows_dq"] = hopper_dq_slots(plan, shape.d_qk, shape.d_v)
        module.in_warps |= last["helpers"]
        module.bounds += bounds_of(plan, "dq", plan.over_keys, last["bounds"])
        module.add("hopper_dq.py.j2", f=last)
    else:
        last = finish_slots(plan, shape.d_qk, shape.d_v, kv["rounds"])
        module.add("hopper_finish.py.j2", f=last)
    module.helpers |= last["helpers"]


def _tables(module: Assembly, backward: bool) -> None:
    """The kernel that writes tables by distance, before all others, if any kernel reads them."""
    plan, host = module.plan, module.host
    readers = [host[name]["tables"] for name in ("f", "kv", "dq", "rows_dq") if name in host]
    if any((*readers, *(p["tables"] for p in host["pair"].values()))):
        host["tables"] = distance_slots(plan, plan.tables if backward else plan.score_tables)
        module.helpers |= host["tables"]["helpers"]
        module.kernels.insert(0, ("distances.py.j2", {"t": host["tables"], "graph": plan.graph}))


def _scans(module: Assembly) -> None:
    """The kernels that find loop bounds, before all others; each follows the kernels of its summaries."""
    scans: list[tuple[str, Slots]] = []
    for u in module.bounds:
        for s in u["summaries"]:
            module.helpers |= s["slots"]["helpers"]
            slots = {"graph": module.plan.graph, "u": s["slots"], "name": f"{s['name']}_kernel"}
            scans.append(("summary.py.j2", slots))
        scans.append(("bounds.py.j2", {"graph": module.plan.graph, "u": u["slots"], "name": f"{u['name']}_kernel"}))
    module.kernels = scans + module.kernels


def bounds_of(plan: Plan, axis: str, tile: TilePlan, lines: BoundLines, packed: bool = False) -> list[Slots]:
    """The kernel that scans for the loop bounds of blocks along the inner `axis`, with its summaries; [] if the bounds
    have a closed form."""
    if not lines.scan:
        return []
    summaries = [
        {"name": f"summary_{axis}_{i}", "slots": summary_slots(plan, read, tile.inner)}
        for i, read in enumerate(tile.summaries)
    ]
    return [{"name": f"bounds_{axis}", "slots": bounds_slots(tile, lines, packed), "summaries": summaries}]


def _kept(plan: Plan, gradient: Any) -> dict[str, str]:
    """Whether the input has an entry per batch (`keep_b`) and per head (`keep_h`), as host code: known from the index,
    except that a dimension of size 1 is broadcast."""
    read, result = gradient.read, {}
    decl = plan.graph.input(read.input)
    for key, symbols in (("keep_b", {sym.B}), ("keep_h", {sym.H, sym.H_KV})):
        dims = [i for i, e in enumerate(read.index) if e.free_symbols & symbols]
        if not dims:
            result[key] = "False"
        elif all(read.index[i].is_Symbol and read.index[i].name == decl.pattern[i] for i in dims):
            result[key] = " and ".join(f"{read.input}.shape[{i}] > 1" for i in dims)
        else:
            result[key] = "True"
    return result
