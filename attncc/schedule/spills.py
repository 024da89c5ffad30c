"""Observed spills of compiled kernels, which correct the estimate of registers (`schedule.registers`).

A kernel whose schedule was chosen by the model alone is inspected when it is compiled. If it spills, and not about as
much as the model expected, this is recorded in the cache; the next candidate is then preferred if the model predicts it
to be hardly slower. So a choice depends on what was recorded, in the same way for `attncc compile` and for calls;
neither compiles anything only to inspect it. A kernel that is another where the order of sums is fixed is recorded
apart: in Gluon, what makes dK and dV has further warps there, and spills more. On Hopper, the model may choose a kernel
although it expects a spill; if that one spills less than expected, other candidates that were expected to spill are
reconsidered, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from attncc.resources import fingerprint
from attncc.schedule.cache import Cache, cache_key
from attncc.schedule.cost import REGISTER_BYTES
from attncc.schedule.device import Device
from attncc.schedule.problem import KERNELS, Kernel, KernelSchedule, Problem, alike
from attncc.schedule.registers import spilled_registers

#: registers by which the estimate is off for tilings that it was fitted to
ABOUT = 4
Seen = Mapping[tuple[Kernel, KernelSchedule], int]
#: what an entry says: the bytes of a kernel, its tiling, and whether it is the kernel of ordered sums
Rows = dict[tuple[Kernel, KernelSchedule, bool], int]


def with_known_spills(problem: Problem, device: Device, cache: Cache | None) -> Problem:
    """The problem with what was seen of its kernels on such a device."""
    if cache is None or not problem.digest or device.is_interpreter:
        return problem
    value = cache.get(_key(problem, device))
    if value is None:
        return problem
    rows = _read(value).items()
    known = ((name, ks, count) for (name, ks, ordered), count in rows if ordered == _ordered(name, ks, problem))
    return replace(problem, spills=frozenset(known))


def note_spills(found: Seen, problem: Problem, device: Device, cache: Cache) -> bool:
    """Keep what compiled kernels spill, in bytes a thread, beside what is known, and say whether there is any; tilings
    that spill nothing, or about as much as was expected, are left out. One that took the place of another was taken
    for one that does not."""
    known = {kernel for kernel, _, _ in with_known_spills(problem, device, cache).spills}
    spilling = {
        (kernel, alike(ks), _ordered(kernel, ks, problem)): count
        for (kernel, ks), count in found.items()
        if count and (kernel in known or not _expected(count, spilled_registers(kernel, ks, problem, device)))
    }
    if not spilling or not problem.digest:
        return False

    def joined(value: Mapping[str, Any] | None) -> dict[str, Any]:
        known = _read(value) if value else {}
        rows = [
            {"kernel": kernel, "tiling": ks.to_json(), "ordered": ordered, "bytes": count}
            for (kernel, ks, ordered), count in sorted({**known, **spilling}.items(), key=str)
        ]
        return {"kind": "spills", "what": f"{problem.digest[:12]} {device.target}", "spills": rows}

    cache.update(_key(problem, device), joined)
    return True


def _expected(count: int, registers: int) -> bool:
    """Whether this many spilled bytes are what the estimate of registers predicted."""
    return registers > 0 and abs(count - REGISTER_BYTES * registers) <= REGISTER_BYTES * ABOUT


def _ordered(kernel: Kernel, ks: KernelSchedule, problem: Problem) -> bool:
    """Whether this kernel is not that of sums in a free order."""
    return problem.ordered and kernel == "dkdv" and ks.backend == "gluon"


def _read(value: Mapping[str, Any]) -> Rows:
    """The content of an entry; empty if it is malformed."""
    try:
        rows = [
            (row["kernel"], KernelSchedule.from_json(row["tiling"]), row["ordered"], row["bytes"])
            for row in value["spills"]
        ]
    except (KeyError, TypeError, ValueError):
        return {}
    return {
        (kernel, ks, ordered): count
        for kernel, ks, ordered, count in rows
        if kernel in KERNELS and type(ordered) is bool and type(count) is int
    }


def _key(problem: Problem, device: Device) -> str:
    """The key of recorded spills: the code, and everything compiled into it. Lengths are not."""
    return cache_key(
        kind="spills",
        code=fingerprint(),
        target=device.target,
        digest=problem.digest,
        dtype=problem.dtype,
        precision=problem.precision,
        d_qk=problem.d_qk,
        d_v=problem.d_v,
        group=problem.group,
        values=problem.values,
    )
