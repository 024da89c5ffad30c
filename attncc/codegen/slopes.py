"""Write cotangents of scores as slope * (dp - delta), or similar products: then of each pair only the slope occupies
registers until dp is ready."""

from __future__ import annotations

from typing import Any

import sympy

from attncc.codegen.lower import Lowering
from attncc.codegen.plan import Plan
from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc
from attncc.ir.levels import Level, level
from attncc.ir.vocabulary import Read
from attncc.passes.differentiate import DELTA, DP
from attncc.passes.fold import S
from attncc.passes.magnitudes import SIDE, ends_with, over_side, over_weight

#: the name of the factor of dp in the cotangent of a score
SLOPE = "slope"


def over_raw(part: Plan, expr: Any) -> Any:
    """A formula of the raw score, rewritten in terms of q k and the kernel's score."""
    return part.folded.apply(expr.xreplace({sym.RAW_SCORE: part.core["raw_score"].expr}))


def split_slope(dscore: Any) -> tuple[Any, Any] | None:
    """A score's cotangent as a product of its slope and a factor in which dp is the only value per pair; None if it is
    no such product."""
    late = [f for f in sympy.Mul.make_args(dscore) if {DP, DELTA} & f.free_symbols]
    if not late or any(_of_pair(f) for f in late):
        return None
    return dscore / sympy.Mul(*late), sympy.Mul(*late)


def _of_pair(late: Any) -> bool:
    """Whether an expression, term by term, depends on values of a pair other than dp."""
    terms = sympy.Add.make_args(late.xreplace({DP: sympy.Dummy("late")}))
    return any(_level(term) == Level.PAIR for term in terms)


def _level(expr: Any) -> Level:
    """The level of an expression of the kernel's score and the IR's names."""
    return Level.PAIR if {S, sym.QK} & expr.free_symbols else level(expr)


def split_branch_slope(part: Plan, dscore: Any) -> tuple[Any, Any] | None:
    """As `split_slope`, for a branch. The branch's factor multiplies dp, and so goes with the values per row or per
    key; the slope is the rest, a function of the score."""
    late = [f for f in sympy.Mul.make_args(dscore) if DP in f.free_symbols]
    of_pairs = {S, sym.QK, *map(part.tagged, (S, sym.QK))}
    if not late or any(f.free_symbols & of_pairs for f in late):
        return None
    number, slope = (dscore / sympy.Mul(*late)).as_coeff_Mul()
    return slope, number * sympy.Mul(*late)


def same_slope(part: Plan, dread: Any, dscore: Any) -> bool:
    """Whether `dread`, the cotangent of a branch's input, is a multiple of the slope of the branch's score."""
    found, own = split_branch_slope(part, dread), split_branch_slope(part, dscore)
    return found is not None and own is not None and found[0] == own[0]


def by_side(part: Plan, dscore: Any) -> Any | None:
    """If the cotangent of a score contains the sign of a value per pair: the cotangent as a multiple of a slope that
    has this sign; else None."""
    sums = frozenset(r.symbol for r in part.online.sums if r.term.is_nonnegative)
    found = None if part.tag else over_side(dscore, sums)
    return None if found is None else over_raw(part, found[0]) * over_raw(part, found[1])


def slope_of(part: Plan) -> Any:
    """The slope of a part's dp in the cotangent of its score, if it is one value per pair or row; else None."""
    backward = part.backward
    if over_weight(backward.dqk, backward.weight) is not None:
        return part.folded.apply(backward.weight)
    dscore = by_side(part, backward.dqk) or over_raw(part, backward.dqk)
    found = split_branch_slope(part, dscore) if part.tag else split_slope(dscore)
    if found is None or (_level(found[0]) == Level.PAIR and not (part.tag or _is_finite(found[1]))):
        return None
    return found[0]


def over_slope(
    part: Plan, dscore: Any, lowering: Lowering, weight: Any, others: list[Any]
) -> tuple[Any, str | None, list[Any]]:
    """A score's cotangent as a multiple of its slope's name; that name; and `others`, those rewritten, too, that are
    multiples of the slope. The slope is computed here, unless it is the weight.

    If the cotangent is no such multiple, or the slope's factor may not be finite, all stay as they are; the name is
    then that of a value with which the cotangent is 0, or None."""
    found = split_branch_slope(part, dscore) if part.tag else split_slope(dscore)
    if found is None:
        beside = dscore.xreplace({weight: sympy.S.One, DP: sympy.S.One})
        alone = lowering.level_of(beside) != Level.PAIR and ends_with(dscore, weight)
        return dscore, "p" if alone else None, others
    if lowering.level_of(found[0]) != Level.PAIR or not (part.tag or _is_finite(found[1])):
        return dscore, None, others
    slope, rest = found
    if part.tag and slope == weight:
        return dscore, "p", others
    bare, of_keys = _apart(slope)
    if not part.tag and (slope != weight or any(_over(e, slope) is None and _over(e, bare) for e in others)):
        slope, rest = bare, rest * of_keys
    name = part.own("p" if slope == weight else SLOPE)
    if slope != weight:
        lowering.assign(name, slope, Level.PAIR)
    by_name = sympy.Symbol(name, real=True)
    over = [e if (beside := _over(e, slope)) is None else by_name * beside for e in others]
    return by_name * rest.xreplace({SIDE: by_name}), "p" if slope == weight else name, over


def _apart(slope: Any) -> tuple[Any, Any]:
    """A slope without its factors per key, and the product of these. They take a register per row of keys, and are not
    needed in the value that is kept until dp is ready, which may then be the weight, or serve others."""
    of_keys = [f for f in sympy.Mul.make_args(slope) if _level(f) == Level.COL]
    return sympy.Mul(*(f for f in sympy.Mul.make_args(slope) if f not in of_keys)), sympy.Mul(*of_keys)


def keeps_a_tile(part: Plan, cotangent: Any) -> bool:
    """Whether this cotangent needs a value per pair to be kept until dp is ready, besides the slope of the score."""
    slope = slope_of(part)
    if slope is None:
        return True
    expr = over_raw(part, cotangent)
    found = (_over(expr, s) for s in (slope, _apart(slope)[0]))
    return all(rest is None or _of_pair(rest) for rest in found)


def _over(expr: Any, slope: Any) -> Any | None:
    """`expr` divided by the slope; None if it is no multiple of the slope, or the quotient may not be finite."""
    factors = list(sympy.Mul.make_args(expr))
    for factor in sympy.Mul.make_args(slope):
        if factor not in factors:
            return None
        factors.remove(factor)
    rest = sympy.Mul(*factors)
    return rest if _is_finite(rest) else None


def _is_finite(expr: Any) -> bool:
    """Whether the value is finite for finite inputs, even in fully masked rows, whose stored statistics may be infinite
    and whose denominators may be 0."""
    if isinstance(expr, voc.sign | voc.step | Read) or expr.is_number:
        return True
    if expr.is_Symbol:
        return expr in (DELTA, sym.Q_IDX) or _level(expr) != Level.ROW
    if isinstance(expr, voc.where):
        return all(map(_is_finite, expr.args[1:]))
    if expr.is_Pow:
        return bool(expr.exp.is_Integer and expr.exp > 0) and _is_finite(expr.base)
    return (expr.is_Add or expr.is_Mul or isinstance(expr, voc.maximum | voc.minimum | voc.absolute)) and all(
        map(_is_finite, expr.args)
    )
