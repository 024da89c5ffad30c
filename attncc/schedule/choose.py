"""Choose the schedule of an op: a measured one, else a shipped one, else the cost model's first choice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from attncc import resources
from attncc.errors import warn
from attncc.schedule import decode, hopper
from attncc.schedule.cache import Cache, bucket, cache_key
from attncc.schedule.candidates import candidates
from attncc.schedule.cost import expected_us, ranked
from attncc.schedule.device import Device
from attncc.schedule.memory import shared_memory
from attncc.schedule.problem import KERNELS, Backend, Kernel, KernelSchedule, Problem, Schedule
from attncc.schedule.spills import with_known_spills

# What a row of a shipped table may ask of a problem; what it leaves out fits every problem, but for branches: those are
# other kernels, and a row that says nothing of them is of one.
MATCHED = ("digest", "dtype", "precision", "d_qk", "d_v", "group", "q_bucket", "kv_bucket", "branches")


def choose(problem: Problem, device: Device, cache: Cache | None = None, backend: Backend | None = None) -> Schedule:
    """The schedule for `problem` on `device`, with its origin: "tuned" from `cache`, "shipped", or "model".

    `backend` is the one that the caller asks for, or None for that of `backend_of`; where Gluon has no kernel, Triton's
    is taken. Kernels of a measured schedule that are in another backend are replaced by the model's choice; but where
    the backend is left to us, none of a schedule for which both raced, as for every tuned one. Nothing is measured and
    nothing compiled; but what was not measured for this very formula is left for the next candidate where `cache` says
    that its kernel spills. ScheduleError if no tiling of a kernel fits.
    """
    tuned = _tuned(problem, device, cache)
    if tuned is not None and backend is None:
        return tuned
    found, matched = (tuned, frozenset({"digest"})) if tuned is not None else _shipped(problem, device, backend)
    if found is not None and "q_bucket" in matched and backend is None:
        return found
    problem = with_known_spills(problem, device, cache)
    if found is None:
        found = Schedule(
            forward=first_choice("forward", problem, device, backend),
            dkdv=first_choice("dkdv", problem, device, backend),
            dq=first_choice("dq", problem, device),
            pair=first_choice("pair", problem, device) if problem.pairs else None,
            origin="model",
        )
    for kernel in _IN_GLUON:
        wanted, _ = backend_of(kernel, problem, device, backend)
        if found.of(kernel).backend != wanted:
            found = replace(found, origin="model", **{kernel: first_choice(kernel, problem, device, wanted)})
    for name in KERNELS if "digest" not in matched else ():
        if problem.spilled(name, found.of(name)):
            other = first_choice(name, problem, device, found.of(name).backend)
            found = replace(found, origin=found.origin, **{name: other})
    return found


#: the kernels that Gluon has
_IN_GLUON: tuple[Literal["forward", "dkdv"], ...] = ("forward", "dkdv")


def first_choice(
    kernel: Kernel, problem: Problem, device: Device, backend: Backend | None = "triton"
) -> KernelSchedule:
    """The candidate that the model predicts to be the fastest, in the backend of `backend_of`."""
    backend, _ = backend_of(kernel, problem, device, backend)
    if device.is_interpreter:
        return candidates(kernel, problem, device, backend)[0]
    return ranked(kernel, problem, device, backend)[0][0]


def _dealt(found: Schedule, problem: Problem, device: Device) -> Schedule:
    """A measured schedule with the splits for this batch, which no key tells from others."""
    if not found.forward.splits:
        return found
    return replace(found, forward=decode.with_best_splits(found.forward, problem, device))


def _for_few_rows(found: Schedule, problem: Problem, device: Device) -> Schedule:
    """A schedule of a table that says nothing of lengths: it is of calls with many rows, and where there are few, the
    model's forward splits the keys."""
    if found.forward.splits or not (decode.suits(problem) or decode.leaves_idle(problem, device)):
        return found
    forward = first_choice("forward", problem, device)
    return replace(found, forward=forward, origin="model") if forward.splits else found


def backend_of(
    kernel: Kernel, problem: Problem, device: Device, asked: Backend | None = None
) -> tuple[Backend, str | None]:
    """The language that a kernel is taken in, and why it is not the other; no reason for Triton where that was asked.

    Gluon's, where it has a kernel and is asked for; where nothing is, if the device's file says that such kernels were
    measured there, and the model predicts it no slower than Triton's.
    """
    if asked == "triton" or kernel not in _IN_GLUON or device.is_interpreter:
        return "triton", None
    reason = hopper.refusal(kernel, problem, device)
    if reason is not None:
        return "triton", reason
    if asked == "gluon":
        return "gluon", None
    if kernel == "forward" and decode.suits(problem) and not problem.value_of_key:
        return "triton", "with few queries the keys are split, which Gluon does not"
    name = hopper.template(kernel, problem)
    if name not in device.gluon:
        return "triton", f"{device.name}.toml does not name {name} under gluon: not measured"
    gluon = _best_us(kernel, problem, device, "gluon")
    triton = _best_us(kernel, problem, device, "triton")
    if kernel == "dkdv" and not problem.costs.warps.passes_on:  # that of Gluon makes dQ, too
        triton += _best_us("dq", problem, device, "triton")
    times = f"predicted {gluon:.1f} us in Gluon, {triton:.1f} in Triton"
    return ("gluon" if gluon <= triton else "triton"), times


def _best_us(kernel: Kernel, problem: Problem, device: Device, backend: Backend) -> float:
    ks, prediction = ranked(kernel, problem, device, backend)[0]
    return expected_us(kernel, ks, prediction, problem, device)


def schedule_key(problem: Problem, device: Device) -> str:
    """The cache key of the schedule tuned for `problem` on `device`; lengths of one bucket share it."""
    return cache_key(kind="schedule", device=f"{device.card}/{device.target}/{device.sms}", **_facts(problem))


def facts_of(problem: Problem, device: Device) -> dict[str, Any]:
    """What a cache entry says of the problem beside its sizes: what a row of a shipped table would match."""
    facts = _facts(problem)
    if problem.dtype != "fp32":  # precision is that of float32 operands
        del facts["precision"]
    return {"device": device.card, "match": facts}


def shipped_row(value: Mapping[str, Any], least: float = 0.0) -> dict[str, Any] | None:
    """A cache entry as a row of a shipped table; None where it saves less than the share `least` of the time of the
    model's first choices, in either direction."""
    if _gain(value) < least:
        return None
    return {"match": value["match"], "schedule": {**value["schedule"], "origin": "shipped"}}


def _gain(value: Mapping[str, Any]) -> float:
    """What the tuned schedule saves of the time of the model's first choices, in the direction where that is more: the
    first trial of a kernel is of those, and of the backward's kernels it times the whole."""
    found = []
    for name, kernel in (("forward", "forward"), ("backward", "dkdv")):
        first = next((t["us"] for t in value.get("trials", []) if t["kernel"] == kernel), None)
        best = value.get("us", {}).get(name)
        if best is not None:
            found.append(1.0 if first is None else 1 - best / first)
    return max(found, default=0.0)


def sizes_of(problem: Problem) -> dict[str, int]:
    """The sizes at which a schedule was measured, as a cache entry has them."""
    return {name: getattr(problem, name) for name in ("batch", "heads", "kv_heads", "q_len", "kv_len")}


def _tuned(problem: Problem, device: Device, cache: Cache | None) -> Schedule | None:
    """The measured schedule in `cache`, if there is one for this very variant."""
    if cache is None or not problem.digest:
        return None
    value = cache.get(schedule_key(problem, device))
    if value is None:
        return None
    what = f"the cached schedule of {problem.digest[:12]}"
    found = _usable(value.get("schedule"), problem, device, what, "tuned")
    return found if found is None or _measured_here(value, problem) else _dealt(found, problem, device)


def _measured_here(value: dict[str, Any], problem: Problem) -> bool:
    """Whether the entry was measured at these sizes, or at a number of keys with the same schedule."""
    here, there = sizes_of(problem), value.get("sizes")
    if not isinstance(there, dict) or set(there) != set(here):
        return False
    keys = (decode.rounded_keys(sizes["q_len"], sizes["kv_len"]) for sizes in (here, there))
    return {**here, "kv_len": 0} == {**there, "kv_len": 0} and len(set(keys)) == 1


def _shipped(problem: Problem, device: Device, backend: Backend | None) -> tuple[Schedule | None, frozenset[str]]:
    """The row of the shipped tables that fits `problem` most narrowly, if any does, and what it matches on: for those
    that name lengths both backends raced, and where Gluon's won they say nothing to who asks for Triton's."""
    facts = _facts(problem)
    fitting = [
        (sum(name in row["match"] for name in MATCHED), number, row)
        for number, row in enumerate(_table(device.name))
        if all(facts.get(name, 1) == wanted for name, wanted in {"branches": 1, **row["match"]}.items())
        and not (backend == "triton" and _in_gluon(row["schedule"]))
    ]
    if not fitting:
        return None, frozenset()
    row = max(fitting, key=lambda entry: entry[:2])[2]
    found = _usable(row["schedule"], problem, device, f"a shipped schedule of {device.name}", "shipped")
    if found is None:
        return None, frozenset()
    matched = frozenset(row["match"])
    return (_dealt if "q_bucket" in matched else _for_few_rows)(found, problem, device), matched


def _in_gluon(schedule: Mapping[str, Any]) -> bool:
    """Whether a schedule in the table has a Gluon kernel."""
    return any(kernel is not None and kernel.get("backend") == "gluon" for kernel in map(schedule.get, _IN_GLUON))


def _usable(data: Any, problem: Problem, device: Device, what: str, origin: Any) -> Schedule | None:
    """The schedule in `data`, or None with a warning if it is malformed or would not fit the device."""
    try:
        found = replace(Schedule.from_json(data), origin=origin)
    except ValueError as error:
        warn(f"{what} is ignored: {error}")
        return None
    for kernel in KERNELS:
        needed = shared_memory(kernel, found.of(kernel), problem, device)
        if needed > device.smem_per_block:
            warn(
                f"{what} is ignored: its {kernel} kernel ({found.of(kernel)}) takes {needed:,} bytes of shared memory, "
                f"and {device.title} has {device.smem_per_block:,}"
            )
            return None
    if found.dkdv.backend == "gluon" and not hopper.has_backward(found.dkdv, problem, device):
        warn(f"{what} is ignored: the Gluon backward has no tiling {found.dkdv}")
        return None
    if found.pair is None and problem.pairs:
        found = replace(found, pair=first_choice("pair", problem, device))
    return found


def _facts(problem: Problem) -> dict[str, str | int]:
    """What keys and tables know of a problem."""
    return {
        "digest": problem.digest,
        "dtype": problem.dtype,
        "precision": problem.precision,
        "d_qk": problem.d_qk,
        "d_v": problem.d_v,
        "group": problem.group,
        "q_bucket": bucket(problem.q_len),
        "kv_bucket": bucket(problem.kv_len),
        **({"branches": problem.branches} if problem.branches > 1 else {}),
    }


@cache
def _table(device: str) -> tuple[dict[str, Any], ...]:
    """The rows of `schedules/tuned/<device>/*.json`, each {"match": {fact: value}, "schedule": {...}}."""
    rows: list[dict[str, Any]] = []
    for path in sorted((resources.path("schedules") / "tuned" / device).glob("*.json")):
        rows += read_table(path)
    return tuple(rows)


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of one shipped table; ValueError naming the file if a row is malformed."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    for row in rows:
        if not isinstance(row, dict) or set(row) != {"match", "schedule"} or not set(row["match"]) <= set(MATCHED):
            raise ValueError(f"{path}: a row is {{match, schedule}}, matching on {', '.join(MATCHED)}; got {row!r}")
        Schedule.from_json(row["schedule"])
    return list(rows)


def table_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A shipped table as a file: one row a line."""
    return "[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n" if rows else "[]\n"
