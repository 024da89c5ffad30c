"""Measured schedules as a table that attncc ships: schedules/tuned/<device>/*.json. Of a sweep, the best of each cell;
of the regret suite, the best where the model's first choice loses to it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from attncc.schedule.cache import bucket
from attncc.schedule.problem import KERNELS, KernelSchedule, Schedule
from bench.regret import Measured, card, cell_of, of_direction
from bench.regret_cells import first_choices, problem_of

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_SHAPE = ("case", "B", "Hq", "Hkv", "M", "N", "Dqk", "Dv", "dtype")
_FIELDS = ("block_m", "block_n", "num_warps", "num_stages")


def table(data: dict[str, Any], *, any_variant: bool = False, any_shape: bool = False) -> list[dict[str, Any]]:
    """One row a cell of a sweep file; `any_variant` leaves the formula out of what a row must match, `any_shape` the
    lengths and the heads that share a key head.

    ValueError for a cell whose sweep is incomplete, and for two cells that one row would stand for.
    """
    cells: dict[str, dict[str, Any]] = {}
    for row in data["rows"]:
        if "error" in row:
            raise ValueError(f"the sweep of {row['case']} failed: {row['error']}")
        match = {
            **({} if any_variant else {"digest": row["digest"]}),
            "dtype": _DTYPES[row["dtype"]],
            "d_qk": row["Dqk"],
            "d_v": row["Dv"],
        }
        if not any_shape:
            match |= {"group": row["Hq"] // row["Hkv"], "q_bucket": bucket(row["M"]), "kv_bucket": bucket(row["N"])}
        cell = cells.setdefault(json.dumps(match), {"match": match, "best": {}})
        if row["kernel"] in cell["best"]:
            raise ValueError(f"two sweeps of {row['kernel']} match {match}: sweep them apart")
        cell["best"][row["kernel"]] = KernelSchedule(*(row["best"][field] for field in _FIELDS))
    for cell in cells.values():
        if missing := set(KERNELS) - set(cell["best"]):
            raise ValueError(f"no {', '.join(sorted(missing))} was swept for {cell['match']}")
    return [
        {"match": cell["match"], "schedule": Schedule(**cell["best"], origin="shipped").to_json()}
        for cell in cells.values()
    ]


def corrections(data: dict[str, Any], least: float = 0.02) -> list[dict[str, Any]]:
    """One row for each variant and shape of a regret file in which a first choice of the model as it is now loses more
    than `least`: the best of both directions. Shapes without a backward have none: their splits are dealt by call."""
    device = card(data["gpu"])
    shapes: dict[str, dict[str, dict[str, Any]]] = {}
    for row in data["rows"]:
        if "error" not in row:
            shapes.setdefault(json.dumps([row[name] for name in _SHAPE]), {})[row["mode"]] = row
    found = []
    for modes in shapes.values():
        if set(modes) != {"forward", "backward"}:
            continue
        if max(of_direction(row, device).share for row in modes.values()) <= least:
            continue
        row = modes["forward"]
        problem = problem_of(cell_of(row))
        first = first_choices(problem, device)
        best = {"forward": Measured.of(row).best_kernels()[0]}
        kernels = Measured.of(modes["backward"]).best_kernels()
        best |= dict(zip(("dkdv", "dq"), kernels, strict=False))  # Gluon's makes dQ, too: the model's dq stays
        match = {
            "digest": problem.digest,
            "dtype": problem.dtype,
            "d_qk": problem.d_qk,
            "d_v": problem.d_v,
            "group": problem.group,
            "q_bucket": bucket(problem.q_len),
            "kv_bucket": bucket(problem.kv_len),
        }
        schedule = replace(first, **best, pair=None, origin="shipped")
        found.append({"match": match, "schedule": schedule.to_json()})
    return found
