"""A sweep's best schedules as a table that attncc ships: schedules/tuned/<device>/*.json."""

from __future__ import annotations

import json
from typing import Any

from attncc.schedule.cache import bucket
from attncc.schedule.problem import KERNELS, KernelSchedule, Schedule

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
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


def text(rows: list[dict[str, Any]]) -> str:
    """A table as a file: one row a line."""
    return "[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n"
