"""A plan and a call's sizes as the scheduler's problem."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from attncc.codegen.plan import Plan
from attncc.codegen.similarity import SimilaritySlots
from attncc.ir import symbols as sym
from attncc.ir.levels import Level, level
from attncc.passes.counts import live_tiles, pair_costs
from attncc.passes.differentiate import DP
from attncc.passes.fold import S
from attncc.passes.stream import renamed
from attncc.schedule.problem import Dtype, KernelCosts, PairCosts, Precision, Problem

_PAIR_NAMES = frozenset({S.name, DP.name, "qk"})


def problem_of(
    plan: Plan, sizes: Mapping[str, int], dtype: Dtype, precision: Precision, scalars: Mapping[str, Any]
) -> Problem:
    """The problem of one call. `sizes` has b, h, h_kv, q_idx, kv_idx, d_qk, d_v; an empty dimension counts as 1."""
    size = {name: max(n, 1) for name, n in sizes.items()}
    live = live_tiles(plan.over_keys, plan.graph, size["h"], size["q_idx"], size["kv_idx"], scalars)
    nested = plan.has_backward is None and not plan.one_loop
    vectors = len({r for part in plan.parts for r in part.core.reads if level(r) == Level.COL})
    similarity = SimilaritySlots(plan)
    costs = KernelCosts(
        *_costs(plan),
        live=lru_cache(maxsize=None)(live),
        vectors=vectors,
        nested=nested,
        dots=len(plan.similarity.dots) + similarity.has_dot,
        plain_dot=similarity.plain_dot,
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
    )


def _costs(plan: Plan) -> tuple[PairCosts, PairCosts, PairCosts]:
    """The work of a pair: forward, backward, mask. Branches add up, and equal masks count once."""
    found = [_part_costs(part) for part in plan.parts]
    if len(found) == 1:
        return found[0]
    forward, backward, mask = (_total(costs) for costs in zip(*found, strict=True))
    return forward, backward, mask if len(plan.masks) > 1 else found[0][2]


def _total(costs: Iterable[PairCosts]) -> PairCosts:
    found = tuple(costs)
    return PairCosts(*(sum(getattr(c, name) for c in found) for name in ("fma", "sfu", "int", "loads")))


def _part_costs(plan: Plan) -> tuple[PairCosts, PairCosts, PairCosts]:
    online, folded = plan.online, plan.folded
    to_new = {m: renamed(m) for m in online.max_symbols}
    terms = [folded.apply_online(r.term.xreplace(to_new), online.max_symbols) for r in (online.numerator, *online.sums)]
    operands = [folded.maximum_of(g) for _, g in online.maxes]
    # one more a running maximum, a sum, and the conversion of the weight for its matmul
    forward = pair_costs([folded.score, *terms, *operands], _PAIR_NAMES)
    extra = len(operands) + len(online.sums) + 1
    forward = PairCosts(forward.fma + extra, forward.sfu, forward.int, forward.loads)
    backward = forward
    if plan.has_backward is None:
        raw = {sym.RAW_SCORE: plan.core["raw_score"].expr}
        exprs = [folded.score, folded.apply(plan.backward.weight), folded.apply(plan.backward.dqk.xreplace(raw))]
        exprs += [folded.apply(e.xreplace(raw)) for _, e in (*plan.backward.dsums, *plan.backward.dreads)]
        cost = pair_costs(exprs, _PAIR_NAMES)
        backward = PairCosts(cost.fma + 2, cost.sfu, cost.int, cost.loads)
    mask = pair_costs([plan.graph["mask"].expr], _PAIR_NAMES)
    return forward, backward, PairCosts(mask.fma + 1, mask.sfu, mask.int + 1, mask.loads)
