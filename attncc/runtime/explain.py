"""Collect the facts behind `attncc explain`: derived forms, live tiles, and the choice among candidates.

`facts` collects them, `explain` formats them; the text contains nothing else.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from attncc.codegen.components import slope
from attncc.codegen.hopper_backward import by_row, summed_by_distance, takes_turns
from attncc.codegen.plan import Plan
from attncc.codegen.problem import problem_of
from attncc.codegen.similarity import SimilaritySlots
from attncc.errors import InputError, UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir.formulas import stage_texts
from attncc.ir.graph import VariantGraph
from attncc.ir.text import formula
from attncc.ir.vocabulary import Root
from attncc.passes.columns import Column
from attncc.passes.phases import Made
from attncc.runtime.explain_linear import linear_facts
from attncc.runtime.explain_outputs import output_facts
from attncc.runtime.explain_text import text_of
from attncc.schedule import decode
from attncc.schedule.cache import Cache
from attncc.schedule.choose import backend_of, choose, first_choice
from attncc.schedule.cost import Prediction, predict, ranked
from attncc.schedule.device import Device
from attncc.schedule.hopper_backward import deals, wide
from attncc.schedule.memory import shared_memory
from attncc.schedule.problem import KERNELS, Backend, Dtype, Kernel, KernelSchedule, Precision, Problem, Schedule
from attncc.schedule.registers import registers
from attncc.schedule.spills import with_known_spills

#: candidates of a kernel that are shown
SHOWN = 5
#: what else an explanation takes by name
_OPTIONS = ("q_len", "kv_len", "batch", "heads", "kv_heads", "d_qk", "d_v", "dtype", "target")


def sizes_of(
    q_len: int = 8192,
    kv_len: int | None = None,
    batch: int = 1,
    heads: int = 16,
    kv_heads: int | None = None,
    d_qk: int = 128,
    d_v: int | None = None,
    graph: VariantGraph | None = None,
) -> dict[str, int]:
    """The sizes of a call by their names in a formula; what is None is as large as its counterpart.

    `d_qk` is that of one branch of `graph`. Where v is part of k, d_v is given, and k is longer by 64 at least.
    """
    if graph is not None and graph.value is not None:
        d_qk, d_v = max(d_qk, graph.value + 64), graph.value
    d_v = d_qk if d_v is None else d_v
    d_qk *= graph.branches if graph is not None else 1
    return {
        "b": batch,
        "h": heads,
        "h_kv": heads if kv_heads is None else kv_heads,
        "q_idx": q_len,
        "kv_idx": q_len if kv_len is None else kv_len,
        "d_qk": d_qk,
        "d_v": d_v,
    }


def kernels_of(plan: Plan) -> tuple[Kernel, ...]:
    """The kernels of a variant whose time counts: all that are launched but the reductions around them."""
    if plan.has_backward is not None:
        return ("forward",)
    return (*KERNELS, "pair") if plan.facts.pairs else KERNELS


def facts(
    plan: Plan,
    sizes: Mapping[str, int],
    dtype: Dtype,
    device: Device,
    scalars: Mapping[str, Any] | None = None,
    precision: Precision = "ieee",
    cache: Cache | None = None,
    shown: int = SHOWN,
    schedule: Schedule | None = None,
    backend: Backend | None = None,
    ordered: bool = False,
) -> dict[str, Any]:
    """Everything `explain` says, as plain JSON values. `sizes` is that of `sizes_of`; times are in microseconds.

    Nothing is compiled or measured. `schedule` is one that the user fixed, else `cache` may have a tuned one; `backend`
    is that of `choose`; `ordered`: every sum has a fixed order. Scalars that are not given have their defaults.
    UnsupportedError for a variant without a plan, InputError for a scalar that the variant has not, ScheduleError if no
    tiling fits the device.
    """
    graph = plan.graph
    known = {s.name: s.default for s in graph.scalars}
    numbers = {**known, **(scalars or {})}
    unknown = sorted(set(numbers) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], [*known, *_OPTIONS], n=1)
        remedy = f"did you mean '{near[0]}'?" if near else None
        raise InputError(f"'{graph.name}' has no scalar '{unknown[0]}'", remedy=remedy)
    problem = with_known_spills(problem_of(plan, sizes, dtype, precision, numbers, ordered), device, cache)
    given = schedule is not None
    schedule = schedule or choose(problem, device, cache, backend)
    in_gluon = schedule.dkdv.backend == "gluon" and plan.has_backward is None
    bands = summed_by_distance(plan, sizes["d_qk"], sizes["d_v"]) if in_gluon else []
    return {
        "name": graph.name,
        "digest": graph.digest,
        "device": {"name": device.name, "title": device.title, "target": device.target},
        "sizes": dict(sizes),
        "scalars": numbers,
        "dtype": dtype,
        "stages": stage_texts(plan.given),
        "made": dict(map(_made, plan.made)),
        "passes": max(part.online.passes for part in plan.parts),
        "sweeps": [_sweep(part, number) for part in plan.parts for number in range(len(part.online.before))],
        "proof": [f"{_of(part)}{line}" for part in plan.parts for line in part.online.proof],
        "merge": {part.own(n): formula(f) for part in plan.parts for n, f in part.online.merge().items()},
        "backward": _backward(plan),
        "linear": linear_facts(plan.given, sizes, dtype, device),
        "outputs": output_facts(graph),
        "origin": schedule.origin,
        "kernels": {
            kernel: _kernel(kernel, _tiling(schedule, kernel, problem, device), problem, device, shown, backend, given)
            for kernel in kernels_of(plan)
        },
        "dq_apart": by_row(plan) if in_gluon else None,
        "dq_passed_on": problem.costs.warps.passes_on,
        "dq_in_turn": takes_turns(plan, sizes["d_qk"], sizes["d_v"]),
        "ordered": ordered,
        "dealt": schedule.dkdv.backend == "gluon" and not bands and deals(schedule.dkdv, problem),
        "by_distance": [str(g.read.input) for g in bands],
        "dq_of_rows": schedule.dkdv.backend == "gluon" and wide(sizes["d_qk"], sizes["d_v"]),
    }


def _made(made: Made) -> tuple[str, str]:
    """An input that another op makes, and what it is."""
    weight = stage_texts(made.graph)["normalizer"]
    if made.transposed:
        return f"{made.name}[b, h, kv_idx]", f"the lse of {weight}, of which queries are keys and keys are queries"
    return f"{made.name}[b, h, q_idx]", "whether the row sees no key"


def _sweep(part: Plan, number: int) -> dict[str, Any]:
    """What a pass before the last one completes, and why it must."""
    sweep = part.online.before[number]
    found = {m.name: f"row.max({formula(g)})" for m, g in sweep.maxes}
    found |= {r.symbol.name: f"row.sum({formula(r.term)})" for r in sweep.sums}
    if sweep.root is not None:
        root = sweep.root
        found[root.symbol.name] = formula(Root(root.term, root.rest, root.lo, root.hi))
    return {
        "pass": f"{_of(part)}pass {number + 1} of {part.online.passes}",
        "completes": found,
        "reason": sweep.reason,
        "proof": list(sweep.proof),
    }


def _tiling(schedule: Schedule, kernel: Kernel, problem: Problem, device: Device) -> KernelSchedule:
    """A kernel's tiling; a user's schedule may leave the pair kernel to the model."""
    return first_choice(kernel, problem, device) if kernel == "pair" and not schedule.pair else schedule.of(kernel)


def _of(part: Plan) -> str:
    """Whose a line is, where there are several branches."""
    return f"branch {part.tag.removeprefix('_')}: " if part.tag else ""


def _backward(plan: Plan) -> dict[str, Any]:
    if plan.has_backward is not None:
        return {"none": str(plan.has_backward)}
    gradients: dict[str, list[str]] = {}
    for g in plan.gradients:
        expr = plan.parts[g.part].tagged(g.expr)
        gradients.setdefault(f"d{formula(g.read)}", []).append(f"{_SUMMED[g.kind]} of {formula(expr)}")
    for v in SimilaritySlots(plan).gradients:
        if v.looped:
            gradients.setdefault(f"d{formula(v.read)}", []).append(f"{_SUMMED[v.kind]} of {formula(v.expr)}")
    if len(plan.parts) > 1:
        return {"branches": [_part_backward(part) for part in plan.parts], "inputs": gradients}
    return {**_part_backward(plan), "inputs": gradients}


def _part_backward(part: Plan) -> dict[str, Any]:
    backward = part.backward
    delta = "row.sum(dout*out)" + (" - dlse" if part.has_lse and not part.tag else "")
    needs_delta = backward.needs_delta or backward.sweep_needs_delta
    return {
        "parts": {part.own(s.name): f"row.sum({formula(part.tagged(e))})" for s, e in backward.parts},
        "cotangents": {part.own(s.name): formula(part.tagged(e)) for s, e in backward.cotangents},
        "columns": {c.symbol.name: _column_text(c) for c in backward.columns},
        "saved": {part.own(symbol.name): formula(expr) for symbol, expr in backward.saved},
        "weight": formula(part.tagged(backward.weight)),
        "dqk": formula(part.tagged(backward.dqk_scale * backward.dqk)),
        "delta": delta if needs_delta else None,
        "looped": _looped(part),
    }


def _column_text(column: Column) -> str:
    """What the sweep over the queries makes for each key."""
    value, share = formula(column.value), formula(column.share)
    return f"col.sum(({value})*share), share = {share}" if column.normed else f"col.sum({value})"


def _looped(part: Plan) -> dict[str, str]:
    """What sums over the head dimension pass on that are a loop; empty where there are none."""
    slots = SimilaritySlots(part)
    loops = slots.flowing_loops
    if not loops:
        return {}
    cotangents = {s: e for s, e in part.backward.dsums if s in {x.symbol for x in loops}}
    vectors = {"dq_vec": slope(loops, sym.Q_VEC), "dk_vec": slope(loops, sym.K_VEC)}
    return {f"d{s.name}": formula(e) for s, e in cotangents.items()} | {n: formula(e) for n, e in vectors.items()}


_SUMMED = {
    "program": "sum over queries and keys",
    "row": "sum over keys",
    "col": "sum over queries",
    "band": "sum over the pairs of one distance",
    "tile": "one entry a pair",
}


def _kernel(
    kernel: Kernel,
    chosen: KernelSchedule,
    problem: Problem,
    device: Device,
    shown: int,
    backend: Backend | None,
    given: bool,
) -> dict[str, Any]:
    """`given`: the user fixed the schedule, so that nobody chose its language."""
    full, mixed, total = decode.visited(kernel, chosen, problem)
    order = ranked(kernel, problem, device, _compared(kernel, chosen, device, backend))
    entries = [(ks, prediction) for ks, prediction in order[:shown]]
    # those that were compiled and left are the first ones that a reader asks for
    entries += [(ks, prediction) for ks, prediction in order[shown:] if problem.spilled(kernel, ks)][:shown]
    if chosen not in [ks for ks, _ in entries]:
        entries.append((chosen, predict(kernel, chosen, problem, device)))
    return {
        "chosen": chosen.to_json(),
        "backend": chosen.backend,
        "why_backend": None if given else _why_backend(kernel, problem, device, backend),
        "tiles": {"full": full, "mixed": mixed, "empty": total - full - mixed, "total": total},
        "candidates": [_candidate(kernel, ks, p, problem, device, ks == chosen) for ks, p in entries],
        "considered": len(order),
    }


def _compared(kernel: Kernel, chosen: KernelSchedule, device: Device, backend: Backend | None) -> Backend | None:
    """The language of the candidates that were compared; None for both."""
    return None if backend is None and kernel in device.gluon else backend or chosen.backend


def _why_backend(kernel: Kernel, problem: Problem, device: Device, backend: Backend | None) -> str | None:
    """Why a kernel is in its language, where another was asked for or could have been taken."""
    if backend is None and device.target != "sm_90":
        return None
    return backend_of(kernel, problem, device, backend)[1]


def _candidate(
    kernel: Kernel, ks: KernelSchedule, prediction: Prediction, problem: Problem, device: Device, chosen: bool
) -> dict[str, Any]:
    return {
        "schedule": ks.to_json(),
        "chosen": chosen,
        "us": prediction.us,
        "limit": prediction.limit,
        "terms": dict(prediction.terms),
        "shared_bytes": shared_memory(kernel, ks, problem, device),
        "registers_estimate": min(registers(kernel, ks, problem, device), device.regs_per_thread_max),
        "spilled_bytes": problem.spilled(kernel, ks),
    }


def explain(
    plan: Plan,
    sizes: Mapping[str, int],
    dtype: Dtype,
    device: Device,
    scalars: Mapping[str, Any] | None = None,
    precision: Precision = "ieee",
    cache: Cache | None = None,
    shown: int = SHOWN,
    schedule: Schedule | None = None,
    backend: Backend | None = None,
    ordered: bool = False,
) -> str:
    """The facts as text, for people. Arguments and errors are those of `facts`."""
    return text_of(facts(plan, sizes, dtype, device, scalars, precision, cache, shown, schedule, backend, ordered))


def explained_device(target: str | None) -> Device:
    """The device that a command or method means: `target`, else this machine's GPU, else the H100."""
    from attncc.schedule.device import device_for, device_of

    if target is not None:
        device = device_for(target)
        if device.is_interpreter:
            raise UnsupportedError("there is nothing to predict for the interpreter", remedy="name a GPU")
        return device
    import torch  # seconds, and only to look for a GPU

    return device_of("cuda") if torch.cuda.is_available() else device_for("h100")
