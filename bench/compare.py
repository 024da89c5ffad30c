"""The heart of the speed suites: one case at one shape, checked, then timed beside its peers in the same process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

import attncc as ac
from attncc.schedule.device import device_of
from attncc.schedule.problem import Backend
from bench.case import Case, Shape, Tensors
from bench.check import against_peer, against_reference
from bench.ours import brief, limits, schedule_of, tilings
from bench.peers import Attend, fa4, flex, has_fa4, sdpa, triton
from bench.record import Results
from bench.run import Run
from bench.timing import Timing, race

MODES = ("forward", "backward")
Builder = Callable[[Case, Shape, Tensors], Attend]


def standard_peers(case: Case) -> dict[str, Builder]:
    """FlexAttention, the SDPA, and FlashAttention-4 if installed, as far as they can say what the case says."""
    peers: dict[str, Builder] = {}
    if case.flex is not None:
        peers["flex"] = flex
    if case.sdpa is not None:
        peers["fa2"] = lambda case, shape, inputs: sdpa("fa2", case, shape)
        peers["cudnn"] = lambda case, shape, inputs: sdpa("cudnn", case, shape)
        if has_fa4():
            peers["fa4"] = lambda case, shape, inputs: fa4(case)
    return peers


def own_triton() -> dict[str, Builder]:
    """Our Triton kernels as a peer, on a GPU where the scheduler takes others."""
    return {"triton": triton} if device_of(torch.device("cuda")).gluon else {}


#: whose kernels come compiled: nothing to do ahead
COMPILED = ("fa2", "cudnn")


def contestant(
    case: Case, shape: Shape, name: str, peers: Mapping[str, Builder], backend: Backend | None = None
) -> Any:
    """In another process: what "attncc", or a peer by name, compiles into the caches; of ours, the errors of its
    check."""
    gc.collect()
    torch.cuda.empty_cache()  # processes share the GPU's memory
    if name == "attncc":
        return against_reference(ac.compile(case.variant, plan="parallel", backend=backend), case, shape)
    operands, inputs = shape.tensors(), case.inputs(shape, "cuda")
    out = peers[name](case, shape, inputs)(*operands)
    # as it is timed: FlexAttention compiles another backward where the graph is not kept
    torch.autograd.grad(out, operands, torch.randn_like(out), retain_graph=True)
    return {}


def figures(shape: Shape, area: int, mode: str, timing: Timing) -> dict[str, float]:
    """One contestant's entry in a row."""
    tflops = shape.flops(area, mode) / timing.ms / 1e9
    return {"ms": float(f"{timing.ms:.5g}"), "tflops": float(f"{tflops:.4g}"), "spread": round(timing.spread, 4)}


def compare(
    run: Run,
    results: Results,
    case: Case,
    shape: Shape,
    *,
    peers: Mapping[str, Builder] | None = None,
    label: Mapping[str, Any] | None = None,
    backend: Backend | None = None,
    checked: dict[str, float] | None = None,
    rounds: int = 3,
    rep_ms: int = 80,
) -> list[dict[str, Any]]:
    """Check a case, then time forward and backward of attncc and its peers; one row a mode.

    A peer that cannot run the case (unsupported shape, out of memory) gets an "error" entry. Gradients are on in the
    forward too, as in training. Ratios are of TFLOP/s, so they also hold where a peer's shape had to be smaller.
    `backend`: that of our kernels, else the scheduler's choice. `checked`: the errors of a check that was made ahead,
    in another process, of the same call. `rounds` and `rep_ms` are those of `race`.
    """
    head = {"case": case.name, **shape.row(), **(label or {})}
    try:
        op = ac.compile(case.variant, plan="parallel", backend=backend)
        check = against_reference(op, case, shape) if checked is None else checked
        peers = standard_peers(case) if peers is None else peers
        return _timed(results, op, case, shape, peers, head, check, partial(race, rounds=rounds, rep_ms=rep_ms))
    except Exception as error:  # a broken case must cost its own rows, not those of the cases after it
        run.fail(results, f"{case.name} {shape}", error, **head)
        return []
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _timed(
    results: Results,
    op: Any,
    case: Case,
    shape: Shape,
    peers: Mapping[str, Builder],
    head: dict[str, Any],
    check: dict[str, float],
    race: Callable[[Mapping[str, Callable[[], object]]], dict[str, Timing]],
) -> list[dict[str, Any]]:
    operands = shape.tensors()
    inputs = case.inputs(shape, "cuda")
    attend: dict[str, Attend] = {"attncc": lambda *operands: op(*operands, **inputs)}
    broken: dict[str, str] = {}
    outs = {"attncc": attend["attncc"](*operands)}
    grad = torch.randn_like(outs["attncc"])
    for name, build in peers.items():
        try:
            attend[name] = build(case, shape, inputs)
            outs[name] = attend[name](*operands)
            torch.autograd.grad(outs[name], operands, grad, retain_graph=True)
        except Exception as error:
            outs.pop(name, None)
            broken[name] = f"{type(error).__name__}: {str(error)[:200]}"
    errors = {"reference": check}
    for name in ("flex", "two flex", "triton"):
        if name in outs:
            errors[name] = against_peer(outs["attncc"], outs[name], operands, grad, name)

    forward = {name: partial(attend[name], *operands) for name in outs}
    backward = {
        name: partial(torch.autograd.grad, out, operands, grad, retain_graph=True) for name, out in outs.items()
    }
    area = case.area(shape.m, shape.n)
    schedule = schedule_of(op, *operands, **inputs)
    rows = []
    for mode, timings in zip(MODES, (race(forward), race(backward)), strict=True):
        entries: dict[str, dict[str, Any]] = {n: figures(shape, area, mode, t) for n, t in timings.items()}
        ours = entries.pop("attncc")
        ratio = {n: round(ours["tflops"] / e["tflops"], 3) for n, e in entries.items()}
        entries |= {name: {"error": error} for name, error in broken.items()}
        ours["schedule"] = tilings(schedule, mode)
        ours["limits"] = limits(op, mode, *operands, **inputs)
        row = {**head, "mode": mode, "area": area, "attncc": ours, "peers": entries, "ratio": ratio, "check": errors}
        rows.append(results.add(**row))
    return rows


def table(run: Run, title: str, rows: list[dict[str, Any]], sizes: tuple[str, ...] = ("M", "Dqk")) -> None:
    """Print comparison rows: TFLOP/s of each contestant, and ours over each peer's."""
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    columns = ["case", *sizes, "mode", "attncc", *names, *(f"/{name}" for name in names), "schedule"]

    def tflops(entry: dict[str, Any] | None) -> str:
        return "" if entry is None else f"{entry['tflops']:.0f}" if "tflops" in entry else "cannot"

    lines = []
    for row in rows:
        ratios = [f"{row['ratio'][name]:.2f}" if name in row["ratio"] else "" for name in names]
        values = [tflops(row["attncc"]), *(tflops(row["peers"].get(name)) for name in names)]
        lines.append(
            [
                row["case"],
                *(str(row[s]) for s in sizes),
                row["mode"],
                *values,
                *ratios,
                brief(row["attncc"]["schedule"]),
            ]
        )
    run.show(title, columns, lines)
