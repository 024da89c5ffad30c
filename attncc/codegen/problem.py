"""From a plan and the sizes of a call to the scheduler's `Problem`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from attncc.codegen.plan import Plan
from attncc.passes.counts import live_tiles
from attncc.passes.work import LiveTiles
from attncc.schedule.problem import Dtype, KernelCosts, Precision, Problem


def problem_of(
    plan: Plan,
    sizes: Mapping[str, int],
    dtype: Dtype,
    precision: Precision,
    scalars: Mapping[str, Any],
    ordered: bool = False,
) -> Problem:
    """The problem of one call. `sizes` has b, h, h_kv, q_idx, kv_idx, d_qk, d_v; an empty dimension counts as 1.
    `ordered`: every sum has a fixed order."""
    size = {name: max(n, 1) for name, n in sizes.items()}
    facts = plan.facts
    costs = KernelCosts(
        facts.forward.plus(facts.component, size["d_qk"]),
        facts.backward.plus(facts.component_backward, size["d_qk"]),
        facts.mask,
        live=_live(plan, size, scalars),
        vectors=facts.vectors,
        rows=facts.rows,
        # float32 kernels keep the distances whole (codegen/offsets.py)
        distances=facts.distances and dtype != "fp32",
        nested=facts.nested,
        similarity=facts.similarity,
        sweeps=facts.sweeps,
        only_triton=facts.only_triton,
        packs_heads=facts.packs_heads,
        whole_rows=facts.whole_rows,
        warps=facts.warps,
    )
    return Problem(
        dtype=dtype,
        precision=precision,
        batch=size["b"],
        heads=size["h"],
        kv_heads=size["h_kv"],
        q_len=size["q_idx"],
        kv_len=size["kv_idx"],
        d_qk=size["d_qk"],
        d_v=size["d_v"],
        costs=costs,
        digest=plan.graph.core.digest,
        branches=plan.graph.branches,
        pairs=facts.pairs,
        values=max(size.get("h_v", size["h_kv"]) // size["h_kv"], 1),
        value_of_key=plan.graph.value is not None,
        ordered=ordered,
    )


def _live(plan: Plan, size: Mapping[str, int], scalars: Mapping[str, Any]) -> Callable[[int, int], LiveTiles]:
    """A function that counts live tiles. It analyzes the mask at its first call; known schedules need none."""
    counts: list[Callable[[int, int], LiveTiles]] = []

    @cache
    def live(block_m: int, block_n: int) -> LiveTiles:
        if not counts:
            counts.append(live_tiles(plan.over_keys, plan.graph, size["h"], size["q_idx"], size["kv_idx"], scalars))
        return counts[0](block_m, block_n)

    return live
