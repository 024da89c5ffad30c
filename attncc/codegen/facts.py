"""The facts about a plan that calls need. They are cached on disk, so that later processes run no pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import sympy

from attncc.codegen.loads import is_map
from attncc.codegen.offsets import split_distances
from attncc.ir import symbols as sym
from attncc.ir.levels import Level, level
from attncc.ir.vocabulary import Read
from attncc.passes.counts import pair_costs
from attncc.passes.differentiate import DP
from attncc.passes.distances import Tables
from attncc.passes.fold import S, lower_exp
from attncc.passes.stream import Sweep, renamed
from attncc.passes.work import PairCosts
from attncc.schedule.problem import SimilarityWork, WarpWork

if TYPE_CHECKING:
    from attncc.codegen.plan import InputGradient, Plan
    from attncc.codegen.similarity import SimilaritySlots

#: the cost model's number of sweeps over the keys in the search for an implicit value
TYPICAL_TURNS = 8
#: integer operations that take as long as one pair's load from a table of distances: a quarter of a clock, because the
#: lanes of a warp read about eight rows of the table
GATHER = 16
#: tiles of registers for a load per pair: a 64-bit pointer, which counts as two, and the loaded value
GATHERED_TILES = 3
_PAIR_NAMES = frozenset({S.name, DP.name, "qk"})


@dataclass(frozen=True)
class Facts:
    """`stored`: names of the row statistics that the forward writes; `results`: names of all its results after `out`;
    `saved`: names of the results that the backward reads, if there is one. The costs, `sweeps` and `only_triton` are as
    in `KernelCosts`; `pairs` is as in `Problem`. `component`, `component_backward`: the work of a pair, forward and
    backward, for each component of a sum over the head dimension that is not a matmul.
    """

    stored: tuple[str, ...]
    results: tuple[str, ...]
    saved: tuple[str, ...]
    has_backward: bool
    forward: PairCosts
    backward: PairCosts
    mask: PairCosts
    component: PairCosts
    component_backward: PairCosts
    vectors: int
    rows: int
    distances: bool
    nested: bool
    similarity: SimilarityWork
    packs_heads: bool
    whole_rows: str
    pairs: bool
    sweeps: int
    only_triton: str
    warps: WarpWork

    def to_json(self) -> dict[str, Any]:
        """A plain dict for the cache."""
        names = {name: list(getattr(self, name)) for name in _NAMES}
        return {**asdict(self), **names, "kind": "facts"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> Self | None:
        """The inverse of `to_json`; None if `data` is not its result."""
        try:
            known = {name: data[name] for name in cls.__dataclass_fields__} if data is not None else {}
            costs = {name: PairCosts(**known[name]) for name in _COSTS}
            names = {name: tuple(known[name]) for name in _NAMES}
            work = {"similarity": SimilarityWork(**known["similarity"]), "warps": WarpWork(**known["warps"])}
            return cls(**{**known, **costs, **names, **work})
        except (KeyError, TypeError):
            return None


_NAMES = ("stored", "results", "saved")
_COSTS = ("forward", "backward", "mask", "component", "component_backward")


def facts_of(plan: Plan) -> Facts:
    """The facts of a plan, from its passes. UnsupportedError if its normalizer does not stream."""
    from attncc.codegen.similarity import KEY, QUERY, SimilaritySlots

    has_backward = plan.has_backward is None
    forward, backward, mask = _costs(plan)
    slots = SimilaritySlots(plan)
    gradients = slots.looped if has_backward else lambda _: ()
    made_q, made_k = (
        len(slots.own_accumulators(side)) + sum(g.vector for g in gradients(side)) for side in (QUERY, KEY)
    )
    by_pair = {r for x in plan.similarity.loops for r in x.summand.atoms(Read) if level(r) == Level.PAIR}
    looped = len(plan.similarity.loops) + GATHERED_TILES * len(by_pair)
    wide_q, wide_k = (len(slots.wide_reads(side)) for side in (QUERY, KEY))
    dots = len(plan.similarity.dots) + slots.has_dot
    similarity = SimilarityWork(dots, slots.plain_dot, made_q, made_k, wide_q, wide_k, looped)
    component, component_backward = _component_costs(plan, slots) if looped else (PairCosts(), PairCosts())
    return Facts(
        stored=tuple(name for name, _ in plan.stored),
        results=plan.results,
        saved=plan.saved if has_backward else (),
        has_backward=has_backward,
        forward=forward,
        backward=backward,
        mask=mask,
        component=component,
        component_backward=component_backward,
        vectors=len({x for part in plan.parts for x in _streamed(part, Level.COL)}),
        rows=sum(len(part.backward.pair_rows) + plan.needs_delta for part in plan.parts) if has_backward else 0,
        distances=bool(plan.tables.formulas)
        or any(split_distances(part.folded.score) != part.folded.score for part in plan.parts),
        nested=has_backward and not plan.one_loop,
        similarity=similarity,
        packs_heads=plan.packs_heads,
        whole_rows=plan.whole_rows,
        pairs=has_backward and (bool(slots.bands) or any(g.kind in ("tile", "band") for g in plan.gradients)),
        sweeps=sum(_turns(sweep) for part in plan.parts for sweep in part.online.before),
        only_triton=plan.only_triton,
        warps=_warps(plan, has_backward),
    )


def _warps(plan: Plan, has_backward: bool) -> WarpWork:
    from attncc.codegen.forward import vanishes
    from attncc.codegen.hopper_backward import no_backward, passes_on
    from attncc.codegen.lower import Leaf, Lowering
    from attncc.codegen.pairs import base_leaves
    from attncc.codegen.slopes import slope_of

    def by_row(part: Plan, slope: Any) -> bool:
        """Whether the slope has a factor per row, besides those that make it a multiple of the weight."""
        leaves = base_leaves(part, {name: Leaf(name, Level.ROW) for name in part.saved_names})
        own = set(sympy.Mul.make_args(part.folded.apply(part.backward.weight)))
        factors = sympy.Mul.make_args(slope)
        beside = [f for f in factors if f not in own] if own <= set(factors) else factors
        return any(Lowering(part.core, leaves).level_of(f) == Level.ROW for f in beside)

    slopes = [slope_of(part) for part in plan.parts] if has_backward else [None]
    return WarpWork(
        vanishes=all(map(vanishes, plan.parts)),
        slope=None not in slopes,
        slope_by_row=any(by_row(part, x) for part, x in zip(plan.parts, slopes, strict=True) if x is not None)
        if has_backward
        else False,
        columns=sum(g.kind == "col" for g in plan.gradients) if has_backward else 0,
        columns_apart=sum(_is_apart(plan, g) for g in plan.gradients if g.kind == "col") if has_backward else 0,
        tables=plan.tables.count,
        asked=len({x for part in plan.parts for x in _streamed(part, Level.ROW)}),
        maps=sum(is_map(r, part.core) for part in plan.parts for r in part.folded.score.atoms(Read)),
        branches=len(plan.parts),
        passes_on=has_backward and passes_on(plan),
        means=has_backward and bool(plan.columns),
        no_backward=no_backward(plan) if has_backward else "",
    )


def _is_apart(plan: Plan, gradient: InputGradient) -> bool:
    """Whether a gradient that is summed per key needs a further value of each pair to be kept until dp is ready."""
    from attncc.codegen.pair_exprs import of_k, over_ds
    from attncc.codegen.slopes import keeps_a_tile

    if gradient in of_k(plan, [g for g in plan.gradients if g.kind == "col"]):
        return False
    ratio = over_ds(plan, gradient)
    return keeps_a_tile(plan.parts[gradient.part], gradient.expr) if ratio is None else ratio.has(sym.QK)


def _streamed(part: Plan, of: Level) -> list[Any]:
    """A part's values per query, or per key, that take a warp some time: reads of inputs, and logarithms of indices."""
    logarithms = part.folded.score.atoms(sympy.log)
    return [x for x in (*part.core.reads, *logarithms) if level(x) == of]


def _turns(sweep: Sweep) -> int:
    """How many times a sweep goes over the keys."""
    return TYPICAL_TURNS if sweep.root is not None else 1


def _component_costs(plan: Plan, slots: SimilaritySlots) -> tuple[PairCosts, PairCosts]:
    """The work of a pair for each component of the sums that are computed by a loop: in the forward, and in one kernel
    of the backward."""
    from attncc.codegen.components import cotangent, slope

    loops = plan.similarity.loops
    sums = pair_costs([lower_exp(x.summand) for x in loops], frozenset())
    once = _gathered(replace(sums, fma=sums.fma + len(loops)))
    turns = 1 + sum(_turns(sweep) for part in plan.parts for sweep in part.online.before)
    forward = _total([once] * turns)
    if plan.has_backward is not None:
        return forward, forward
    # the kernel of dQ usually computes those of inputs, too; each is summed along the row, then put into its column
    names = frozenset(cotangent(x).name for x in loops)
    gradients = [slope(slots.flowing_loops, sym.Q_VEC), *(g.expr for g in slots.gradients if g.looped)]
    found = pair_costs([lower_exp(e) for e in gradients if e != 0], names)
    again = _gathered(replace(found, fma=found.fma + 2 * len(gradients)))
    return forward, _total([once, again])


def _gathered(costs: PairCosts) -> PairCosts:
    """The same costs with loads counted as operations, because loads in a loop over components are not prefetched."""
    return PairCosts(costs.fma, costs.sfu, costs.int + GATHER * costs.loads)


def _sweep_costs(plan: Plan, sweep: Sweep) -> PairCosts:
    folded, maxima = plan.folded, sweep.max_symbols
    to_new = {m: renamed(m) for m in maxima}
    exprs = [folded.apply_online(r.term.xreplace(to_new), maxima) for r in sweep.sums]
    exprs += [folded.maximum_of(g) for _, g in sweep.maxes]
    if sweep.root is not None:
        exprs += [folded.apply(e) for e in (sweep.root.term, sweep.root.term.diff(sym.UNKNOWN))]
    found = pair_costs([folded.score, *exprs], _PAIR_NAMES)
    return replace(found, fma=found.fma + len(exprs))


def _costs(plan: Plan) -> tuple[PairCosts, PairCosts, PairCosts]:
    """The work of a pair: forward, backward, mask. Branches add up, and equal masks count once."""
    found = [_part_costs(part) for part in plan.parts]
    if len(found) == 1:
        return found[0]
    forward, backward, mask = (_total(costs) for costs in zip(*found, strict=True))
    return forward, backward, mask if len(plan.masks) > 1 else found[0][2]


def _total(costs: Iterable[PairCosts]) -> PairCosts:
    found = tuple(costs)
    return PairCosts(*(sum(getattr(c, name) for c in found) for name in PairCosts.__dataclass_fields__))


def _read(tables: Tables) -> int:
    """The number of table entries that Triton's kernels read per pair."""
    return len(tables.formulas) - len(tables.read.unused)


def _part_costs(plan: Plan) -> tuple[PairCosts, PairCosts, PairCosts]:
    online, folded = plan.online, plan.folded
    to_new = {m: renamed(m) for m in online.max_symbols}
    terms = [folded.apply_online(r.term.xreplace(to_new), online.max_symbols) for r in (online.numerator, *online.sums)]
    operands = [folded.maximum_of(g) for _, g in online.maxes]
    # one more operation for each running maximum and sum, and for the conversion of the weight to 16 bits
    forward = pair_costs([plan.score_tables.apart(folded.score), *terms, *operands], _PAIR_NAMES)
    fma = forward.fma + len(operands) + len(online.sums) + 1
    forward = replace(forward, fma=fma, tables=_read(plan.score_tables))
    for sweep in online.before:
        forward = _total([forward, *[_sweep_costs(plan, sweep)] * _turns(sweep)])
    backward = forward
    if plan.has_backward is None:
        raw = {sym.RAW_SCORE: plan.core["raw_score"].expr}
        score = split_distances(plan.tables.apart(folded.score))
        exprs = [score, folded.apply(plan.backward.weight), folded.apply(plan.backward.dqk.xreplace(raw))]
        exprs += [folded.apply(e.xreplace(raw)) for _, e in (*plan.backward.dsums, *plan.backward.dreads)]
        cost = pair_costs(map(plan.tables.apart, exprs), _PAIR_NAMES)
        backward = replace(cost, fma=cost.fma + 2, tables=_read(plan.tables))
    mask = pair_costs([plan.graph["mask"].expr], _PAIR_NAMES)
    return forward, backward, replace(mask, fma=mask.fma + 1, int=mask.int + 1)
