"""The expressions that a backward kernel computes for one part of a plan: the weight, ds, and cotangents of reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from attncc.codegen.offsets import PLACE, split_distances
from attncc.codegen.plan import InputGradient, Plan
from attncc.codegen.similarity import SimilaritySlots
from attncc.codegen.slopes import by_side, over_raw
from attncc.ir import symbols as sym
from attncc.ir.levels import Level, level
from attncc.ir.vocabulary import Read, attached
from attncc.passes.differentiate import DELTA, DP
from attncc.passes.distances import INDICES, Tables
from attncc.passes.fold import S
from attncc.passes.magnitudes import WEIGHT, over_weight

#: the cotangent of the score's dot product, by its name in a kernel
DS = sympy.Symbol("ds", real=True)


@dataclass(frozen=True)
class PairExprs:
    """The expressions that a backward kernel computes for one part, in the unit of its score.

    - `score`: one expression, or none if it is inlined in the weight;
    - `dsums`: cotangents of qk (`ds`) and of other sums over the head dimension, by their names in the kernel;
    - `dreads`, `names`: cotangents of reads that are summed, and the names of their tiles;
    - `inlined`: substitutions that other expressions of this kernel need to match these."""

    score: list[Any]
    weight: Any
    dsums: dict[str, Any]
    dreads: list[Any]
    names: list[str]
    inlined: dict[Any, Any]


def pair_exprs(
    part: Plan,
    gradients: list[InputGradient],
    in_loop: bool,
    one_scale: bool,
    by_tile: bool,
    tables: Tables,
    slope_apart: bool,
) -> PairExprs:
    """The expressions of one part. one_scale: all parts have the same scale of dqk, so that ds leaves it out, and the
    parts may share an accumulator. slope_apart: as in `_Weighed`."""
    folded, backward = part.folded, part.backward
    weight = folded.apply(backward.weight)
    place = PLACE if by_tile else INDICES
    score = tables.apart(folded.score, place)
    score = split_distances(score) if by_tile else score
    sums = {f"d{s.name}": e for s, e in backward.dsums}
    if SimilaritySlots(part).has_dot:
        sums = {part.own("ds"): backward.dqk if one_scale else backward.dqk * backward.dqk_scale, **sums}
    names = list(sums) if in_loop else []
    summed = [g for g in gradients if not g.row_only]

    def cotangent(expr: Any) -> Any:
        over = over_weight(expr, backward.weight)
        return tables.apart(over_raw(part, expr if over is None else over), place).xreplace({WEIGHT: weight})

    def of_score(expr: Any) -> Any:
        signed = by_side(part, expr) if slope_apart else None
        return cotangent(expr) if signed is None else tables.apart(signed, place)

    dsums, dreads = [of_score(sums[name]) for name in names], [cotangent(g.expr) for g in summed]
    weight_alone = sympy.Dummy("weight")
    outer = weight
    others = [e.xreplace({weight: weight_alone}) for e in (*dsums, *dreads)]
    inlined = in_loop and score.is_Add and not any(S in e.free_symbols for e in others)
    if inlined:
        # only the weight reads the score: their values per row, or per column, can be added before the broadcast
        whole = weight.xreplace({S: score})
        weight, *others = (whole, *(e.xreplace({weight_alone: whole}) for e in others))
        dsums, dreads = others[: len(names)], others[len(names) :]
    return PairExprs(
        [] if inlined else [part.tagged(score)],
        part.tagged(weight),
        dict(zip(names, map(part.tagged, dsums), strict=True)),
        [part.tagged(e) for e in dreads],
        [f"{g.name}_tile" for g in summed],
        {outer: weight, S: score} if inlined else {outer: weight},
    )


def over_ds(plan: Plan, gradient: InputGradient) -> Any | None:
    """The ratio of a gradient's cotangent to ds, for a read with an entry per key or per distance; None if there is
    none that is the same for all pairs of a query, or of a key. For a sum per key the ratio may have a factor q k.

    There is no ratio either if ds has a factor that the cotangent lacks and that may be 0, such as a head's
    temperature: ds would be 0 where the cotangent is not."""
    own = gradient.own and gradient.kind != "col"
    if gradient.kind not in ("band", "col") or own or len(plan.parts) > 1 or plan.backward.dqk == 0:
        return None
    over, under = list(sympy.Mul.make_args(gradient.expr)), []
    for factor in sympy.Mul.make_args(plan.backward.dqk):
        if factor in over:
            over.remove(factor)
        elif -factor in over:  # delta - dp, for dp - delta
            over.remove(-factor)
            over.append(sympy.S.NegativeOne)
        else:
            under.append(factor)
    ratio = sympy.Mul(*over) / sympy.Mul(*under)
    beside = ratio.xreplace({sym.QK: sympy.S.One}) if gradient.kind == "col" and ratio.is_Mul else ratio
    return ratio if all(_never_zero(plan, f) for f in under) and level(beside) != Level.PAIR else None


def _never_zero(plan: Plan, factor: Any) -> bool:
    """Whether `factor` is a number, or the reciprocal of a value that depends only on positions, lengths and terms of
    the similarity. The reciprocal of an input may be 0, because an input may be infinite."""
    inputs = {r.input for r in factor.atoms(Read)} - plan.similarity.own
    return bool(factor.is_number or (factor.is_Pow and factor.exp.is_number and factor.exp < 0 and not inputs))


def of_k(plan: Plan, gradients: Sequence[InputGradient]) -> dict[InputGradient, Any]:
    """For gradients of terms of the similarity, which are passed on to dK: the factor by which each sum over all
    queries is a multiple of k . dK. A cotangent has such a factor if it is q k times ds times a value per key. {}
    unless all of them have one."""
    own = [g for g in gradients if g.own]
    ratios = [over_ds(plan, g) for g in own]
    found = {
        g: ratio / sym.QK
        for g, ratio in zip(own, ratios, strict=True)
        if ratio is not None and sym.QK in sympy.Mul.make_args(ratio) and sym.H not in g.read.free_symbols
    }
    by_key = all(
        level(rest) in (Level.PROGRAM, Level.COL) and sym.H not in rest.free_symbols for rest in found.values()
    )
    return found if len(found) == len(own) and by_key else {}


def write_over_ds(
    plan: Plan,
    part: Plan,
    exprs: PairExprs,
    gradients: list[InputGradient],
    tables: Tables,
    place: tuple[Any, Any, Any],
) -> None:
    """Write the cotangents of `gradients` as multiples of ds, if they are (see `over_ds`)."""
    for gradient in gradients:
        ratio = over_ds(plan, gradient)
        if ratio is not None:
            exprs.dreads[exprs.names.index(f"{gradient.name}_tile")] = tables.apart(over_raw(part, ratio), place) * DS


def share_of(part: Plan) -> Any | None:
    """The weight of a pair without the reduction's factor, if the weights of a row sum to 1 because they are a function
    of the pair divided by its row sum; else None."""
    weight, sums = part.core["weight"].expr, [stage for stage in part.core.stages if stage.op == "sum"]
    if not any(weight == stage.expr / sympy.Symbol(stage.name, real=True) for stage in sums):
        return None
    factors = list(sympy.Mul.make_args(part.backward.weight))
    for factor in sympy.Mul.make_args(attached(part.core["out"].expr.coeff(sym.V_VEC).diff(sym.WEIGHT))):
        if factor != 1 and factor not in factors:
            return None
        factors = [f for f in factors if f != factor]
    return sympy.Mul(*factors)


def grows_with_place(part: Plan) -> bool:
    """Whether the score has powers of positions above 1. Then even the largest weights may have exponents in the
    thousands."""
    score = part.core["score"].expr
    alone = score.xreplace({read: sympy.Dummy() for read in score.atoms(Read)})
    powers = (p for p in alone.atoms(sympy.Pow) if p.exp.is_number and p.exp > 1)
    return any({sym.Q_IDX, sym.KV_IDX} & p.base.free_symbols for p in powers)


@dataclass(frozen=True)
class Settles:
    """How a part's `gradients` are corrected from the stored to the exact delta: the names of the stored `delta`, of
    the `exact` one, and of the `tile` whose row sum is the exact one. `shares`: the name of the sum of weights that the
    exact delta is divided by, or "". That sum differs from 1 by the rounding of exponents, which may be in the
    thousands if they grow with positions (`grows_with_place`)."""

    delta: str
    exact: str
    tile: str
    shares: str
    gradients: tuple[InputGradient, ...]


def settle_delta(
    part: Plan, exprs: PairExprs, moved: tuple[InputGradient, ...], tables: Tables, place: tuple[Any, Any, Any]
) -> Settles:
    """The correction of the gradients `moved` to the exact delta. The sums that it needs are added to `exprs`: each
    gradient's derivative by delta, the exact delta, and the weights that it may be divided by."""
    for gradient in moved:
        slope = tables.apart(over_raw(part, gradient.expr.diff(DELTA)), place)
        exprs.dreads.append(part.tagged(slope.xreplace(exprs.inlined)))
        exprs.names.append(f"{gradient.name}_by_delta_tile")
    share = share_of(part) if grows_with_place(part) else None
    shares = "" if share is None else part.own("weight_sum")
    found = Settles(part.own("delta"), part.own("exact_delta"), part.own("out_dot_tile"), shares, moved)
    exprs.dreads.append(exprs.weight * DP)
    exprs.names.append(found.tile)
    if share is not None:
        exprs.dreads.append(part.tagged(part.folded.apply(share).xreplace(exprs.inlined)))
        exprs.names.append(f"{shares}_tile")
    return found
