"""A plan and its head dimensions to the source of a module: kernels, and the host code that launches them."""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Iterable
from typing import Any, get_args

from attncc.codegen.backward import dkdv_slots, dq_slots, settles_delta
from attncc.codegen.bounds import BoundLines
from attncc.codegen.chunks import Chunk, chunks, value_chunks
from attncc.codegen.components import WIDEST
from attncc.codegen.decode import decode_slots
from attncc.codegen.forward import forward_slots
from attncc.codegen.hopper import hopper_forward_slots
from attncc.codegen.hopper_backward import by_row, finish_slots, hopper_backward_slots
from attncc.codegen.hopper_decode import hopper_decode_slots
from attncc.codegen.hopper_dq import hopper_dq_slots
from attncc.codegen.indices import collect_lines, input_arguments, nested_reads
from attncc.codegen.kernels import bounds_slots, distance_slots, pair_slots, summary_slots, table_slots
from attncc.codegen.names import coded
from attncc.codegen.pairs import base_leaves
from attncc.codegen.plan import Plan
from attncc.codegen.row_cotangents import cotangent_slots
from attncc.codegen.similarity import KEY, QUERY, SimilaritySlots, term_slots
from attncc.codegen.statements import in_gluon
from attncc.ir import symbols as sym
from attncc.ir.graph import VariantGraph
from attncc.ir.levels import Level, level_of_name
from attncc.ir.text import formula, to_text
from attncc.passes.tiles import TilePlan
from attncc.resources import path
from attncc.schedule.problem import MAX_CHUNK, Backend, Form
from attncc.version import __version__


@functools.cache
def environment() -> Any:
    """The templates of both backends, a jinja2.Environment."""
    from attncc.codegen.templates import environment_of  # a process that finds its sources in the cache needs no Jinja

    return environment_of([path("templates") / backend for backend in get_args(Backend)])


def render(
    plan: Plan,
    d_qk: int,
    d_v: int,
    backward: bool,
    tma: bool = False,
    forward_in: Form = "triton",
    d_k: int | None = None,
    values: int = 1,
    backward_in: Backend = "triton",
    strips: int = 0,
) -> str:
    """The module's source. Everything that depends on tensors' sizes or the schedule is an argument of its functions.

    tma: the backward loads tiles through descriptors, for GPUs with a tensor memory accelerator; forward_in: the
    language of the forward kernel, or "decode" and "gluon_decode" for those that split the keys; backward_in: that of
    the kernel for dK and dV, which in Gluon can sum dQ, too, and weighs a tile in so many `strips`, if any. `d_qk` is
    the last dimension of q; `d_k` that of k, where branches of q share it; `values`: heads of v for each head of k.
    """
    users = plan
    plan, called = coded(plan)
    graph, hopper, hopper_backward = plan.graph, "gluon" in forward_in, backward and backward_in == "gluon"
    d_k = d_qk if d_k is None else d_k
    looped = bool(plan.similarity.loops)
    tma = tma and not looped  # a component is a column, and loaded by pointers
    widest = WIDEST if looped and graph.value is None else MAX_CHUNK
    qk_chunks = chunks(d_qk, graph.branches, shared_key=d_k != d_qk, value=graph.value, widest=widest)
    v_chunks = value_chunks(d_v, values)
    names = [*(d.name for d in graph.inputs), *(s.name for s in graph.scalars)]
    context: dict[str, Any] = {
        "graph": plan.core,
        "hopper": hopper,
        "hopper_backward": hopper_backward,
        "d_qk": d_qk,
        "d_k": d_k,
        "d_v": d_v,
        "qk_chunks": qk_chunks,
        "k_chunks": tuple(c for c in qk_chunks if c.key == c.index),
        "v_chunks": v_chunks,
        "values": values,
        "value_of_key": graph.value is not None,
        "v_head": "h_kv" if values == 1 else f"(h_kv * {values})",
        "out_head": "h" if values == 1 else f"(h * {values})",
        "v_heads": "Hkv" if values == 1 else f"{values} * Hkv",
        "out_heads": "H" if values == 1 else f"{values} * H",
        "stored": plan.stored,
        "results": plan.results if backward else tuple(name for name, _ in plan.stored),
        "shares": plan.shares if backward else (),
        "deltas": tuple(part.own("delta") for part in plan.parts) if backward and plan.needs_delta else (),
        "backward": backward,
        "tma": tma and backward,
        "staging": staging(plan),
        "widths_qk": widths(qk_chunks),
        "widths_v": widths(v_chunks),
        "scalar_names": "".join(f', "{s.name}"' for s in graph.scalars),
        "call_params": "".join(f"{name}, " for name in names),
        "call_args": "".join(f"{name}, " for name in names),
        "input_args": input_arguments(plan.core),
        "wide": any_wide(plan.core),
        "user_args": input_arguments(graph),
        "user_wide": any_wide(graph),
        "takes_inputs": bool(plan.core.inputs),
        "renamed": {user: own for own, user in called.items() if own != user},
    }
    similarity, base = SimilaritySlots(plan), base_leaves(plan, {})
    terms = [term_slots(similarity, side, qk_chunks, base) for side in (QUERY, KEY) if similarity.terms(side)]
    if forward_in == "gluon_decode":
        f = hopper_decode_slots(plan, qk_chunks, v_chunks)
    elif hopper:
        f = hopper_forward_slots(plan, d_qk, d_v, shared_key=d_k != d_qk)
    else:
        decoding = forward_in == "decode"  # where tables by distance are longer than what is read of them
        f = decode_slots(plan, qk_chunks) if decoding else forward_slots(plan, qk_chunks, tables=plan.score_tables.read)
    helpers, in_warps = set(f["helpers"]), set(f["helpers"]) - {"_others_may_start"} if hopper else set()
    if not hopper:
        helpers.add("_add_product")
    bounds = _bounds(plan, "kv", plan.over_keys, f["bounds"], f.get("packed", False))
    forward = {"triton": "forward", "gluon": "hopper_forward", "decode": "decode", "gluon_decode": "hopper_decode"}[
        forward_in
    ]
    context["forward_host"] = "decode_host.py.j2" if "decode" in forward_in else f"{forward}_host.py.j2"
    kernels: list[tuple[str, dict[str, Any]]] = [("terms.py.j2", {"t": t, "graph": graph}) for t in terms]
    kernels.append((f"{forward}.py.j2", {"f": f}))
    if "decode" in forward_in:
        kernels.append(("merge.py.j2", {"f": f}))
    for t in terms:
        helpers |= t["helpers"]
    host: dict[str, Any] = {"f": f, "gradients": (), "vector_gradients": (), "saved": (), "pair": {}}
    host |= {
        "tables": {},
        "packs_heads": f.get("packed", False),
        "nested_reads": False,
        "cotangents": [],
        "graph": graph,
        "terms": terms,
        "term_names": "".join(f"{term.name}, " for t in terms for term in t["terms"]),
    }
    if backward:
        if hopper_backward:
            kv = hopper_backward_slots(plan, d_qk, d_v, shared_key=d_k != d_qk, strips=strips)
        else:
            kv = dkdv_slots(plan, qk_chunks, tma)
        dq = dq_slots(plan, qk_chunks, tma, elsewhere=kv["gradients"])
        dq["settles_delta"] = not hopper_backward and settles_delta(kv, dq)
        pair = {g.number: pair_slots(plan, qk_chunks, g) for g in plan.gradients if g.kind in ("tile", "band")}
        pair |= {band.number: table_slots(plan, qk_chunks, band) for band in similarity.bands}
        for slots in (kv, dq, *pair.values()):
            helpers |= slots["helpers"]
        for p in pair.values():
            p.update(_kept(plan, p["gradient"]))
        bounds += _bounds(plan, "q", plan.over_queries, kv["bounds"])
        if plan.needs_delta and not hopper_backward:
            kernels.append(("delta.py.j2", {}))
        swept = [cotangent_slots(plan, part, qk_chunks) for part in plan.parts if part.backward.cotangents]
        for slots in swept:
            helpers |= slots["helpers"]
            kernels.append(("cotangents.py.j2", {"k": slots}))
        if hopper_backward:
            in_warps |= kv["helpers"]
            weighing: tuple[str, ...] = ("hopper_backward_dq.py.j2", "hopper_backward.py.j2")
            if kv["branches"]:
                weighing = ("hopper_backward_dq.py.j2", "hopper_backward_branches.py.j2")
            if kv["wide"]:
                weighing = ("hopper_backward_wide.py.j2" if kv["shares"] else "hopper_backward_own.py.j2",)
            parts_of_backward = ("hopper_prepare.py.j2", "hopper_backward_load.py.j2", *weighing)
            kernels += [(template, {"f": kv}) for template in parts_of_backward]
            if kv["wide"]:
                last = host["rows_dq"] = hopper_dq_slots(plan, d_qk, d_v)
                in_warps |= last["helpers"]
                bounds += _bounds(plan, "dq", plan.over_keys, last["bounds"])
                kernels.append(("hopper_dq.py.j2", {"f": last}))
            else:
                last = finish_slots(plan, d_qk, d_v)
                kernels.append(("hopper_finish.py.j2", {"f": last}))
            helpers |= last["helpers"]
        else:
            kernels.append(("dkdv.py.j2", {"k": kv}))
        if not (hopper_backward and kv["wide"]) or by_row(plan):
            kernels.append(("dq.py.j2", {"k": dq}))
        for p in pair.values():
            kernels.append(("pair_grad.py.j2", {"k": p, "what": formula(p["gradient"].read)}))
        collects = collect_lines(plan, (*similarity.gradients, *similarity.bands))
        host.update(
            kv=kv,
            dq=dq,
            pair=pair,
            gradients=plan.gradients,
            vector_gradients=similarity.gradients,
            saved=plan.saved,
            collects=collects,
            shifts=any("_shifted(" in line for line in collects),
            nested_reads=nested_reads((*plan.gradients, *similarity.gradients, *similarity.bands)),
            cotangents=swept,
            by_row=by_row(plan),
        )
    host["maps"] = any(slots.get("maps") for slots in (f, *((kv, dq) if backward else ())))
    readers = [slots["tables"] for name, slots in host.items() if name in ("f", "kv", "dq", "rows_dq")]
    if any((*readers, *(p["tables"] for p in host["pair"].values()))):
        tables = plan.tables if backward else plan.score_tables
        host["tables"] = distance_slots(plan, tables)
        helpers |= host["tables"]["helpers"]
        kernels.insert(0, ("distances.py.j2", {"t": host["tables"], "graph": graph}))
    scans = []
    for u in bounds:
        for s in u["summaries"]:
            helpers |= s["slots"]["helpers"]
            scans.append(("summary.py.j2", {"graph": graph, "u": s["slots"], "name": f"{s['name']}_kernel"}))
        scans.append(("bounds.py.j2", {"graph": graph, "u": u["slots"], "name": f"{u['name']}_kernel"}))
    kernels = scans + kernels
    parts = [
        _header(users, d_qk, d_v, context["tma"], "_others_may_start" in helpers),
        _render("helpers.py.j2", context, helpers=helpers),
    ]
    if hopper or hopper_backward:
        parts[0] += "\n" + _render("gluon_compat.py.j2", context)  # its imports belong to the others
        parts.append(_render("gluon_helpers.py.j2", context))
        parts.append(in_gluon(_render("helpers.py.j2", context, helpers=in_warps)))
    parts += [_render(template, context, **slots) for template, slots in kernels]
    parts.append(_render("host.py.j2", context, bounds=bounds, **host))
    return tidy("\n\n\n".join(p.strip("\n") for p in parts) + "\n")


def any_wide(graph: VariantGraph) -> str:
    """Whether any input is too large for 32-bit offsets, as the host finds out."""
    return f"_is_wide({', '.join(d.name for d in graph.inputs)})" if graph.inputs else "False"


def staging(plan: Plan) -> str:
    """What the loops over tiles say of their stages; nothing where the launch decides.

    A table that is read at a place which hangs on the score waits for a matmul. Triton's pipeliner would load it ahead
    as it does the tiles, and then gives up on Hopper, where it cannot predicate the matmul before it.
    """
    places = (symbol.name for read in plan.core.reads for place in read.index for symbol in place.free_symbols)
    return ", num_stages=1" if any(level_of_name(name) == Level.PAIR for name in places) else ""


def _render(template: str, context: dict[str, Any], **slots: Any) -> str:
    return environment().get_template(template).render({**context, **slots})


def _kept(plan: Plan, gradient: Any) -> dict[str, str]:
    """Whether the input tells batches (heads) apart: known from the index, and at run time from a size of 1."""
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


def _bounds(plan: Plan, axis: str, tile: TilePlan, lines: BoundLines, packed: bool = False) -> list[dict[str, Any]]:
    """The kernel that scans for the bounds of blocks over an inner axis, with its summaries; none for closed forms."""
    if not lines.scan:
        return []
    summaries = [
        {"name": f"summary_{axis}_{i}", "slots": summary_slots(plan, read, tile.inner)}
        for i, read in enumerate(tile.summaries)
    ]
    return [{"name": f"bounds_{axis}", "slots": bounds_slots(tile, lines, packed), "summaries": summaries}]


def widths(pieces: Iterable[Chunk]) -> str:
    """The widths of chunks, each once: a descriptor serves all chunks of one width."""
    return repr(tuple(dict.fromkeys(c.width for c in pieces)))


def _header(plan: Plan, d_qk: int, d_v: int, tma: bool, overlaps: bool) -> str:
    body = textwrap.indent(to_text(plan.graph), "    ")
    proof = "\n\n".join("\n".join(f"    {line}" for line in part.online.proof) for part in plan.parts)
    quotes = '"""'
    return (
        f"{quotes}Attention kernels for '{plan.graph.name}', head dimensions {d_qk} and {d_v}. "
        f"Generated by attncc {__version__}.\n\n{body}\n\nThe online form, as derived:\n\n{proof}\n{quotes}\n\n"
        "import torch\nimport triton\nimport triton.language as tl"
        + ("\nfrom triton.language.extra.cuda import gdc_launch_dependents, gdc_wait" if overlaps else "")
        + ("\nfrom triton.tools.tensor_descriptor import TensorDescriptor" if tma else "")
    )


def tidy(source: str) -> str:
    """No trailing blanks, and a blank line in a function only before a comment that opens a step."""
    lines = [line.rstrip() for line in source.split("\n")]
    kept: list[str] = []
    in_docstring = True
    for i, line in enumerate(lines):
        if not line and not in_docstring:
            following = next((x for x in lines[i + 1 :] if x), "")
            opens_step = following.startswith(("    #", "    meta =", "    keep_b"))
            if (following.startswith(" ") and not opens_step) or (opens_step and not kept[-1]):
                continue
        if in_docstring and line == "import torch":
            in_docstring = False
        kept.append(line)
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(kept))
