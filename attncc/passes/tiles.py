"""Which tiles a mask leaves whole, cuts, or empties, as closed forms over the ends of a block of queries (or of keys).

For a block of the outer axis, the pairs that the mask shows lie in a few ranges of the inner axis. A mask of indices
and scalars gives those ranges in closed form, one for each term of its disjunctive normal form. A mask that reads 1-D
integer inputs (documents, token types) is scanned, term by term, with the same interval arithmetic on the minimum and
maximum of each block. A condition on other inputs along one axis (a gate that is not 0) is scanned as 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import sympy

from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc
from attncc.ir.levels import Level, level
from attncc.ir.vocabulary import Read
from attncc.passes.intervals import Box, Interval, Truth, Unknown, interval, nothing_known, truth

#: first and last index of the block, on the outer and on the inner axis; both ends included
OUTER_LO, OUTER_HI = sympy.Symbol("outer_lo", integer=True), sympy.Symbol("outer_hi", integer=True)
INNER_LO, INNER_HI = sympy.Symbol("inner_lo", integer=True), sympy.Symbol("inner_hi", integer=True)

_MAX_TERMS = 4


class BlockMin(sympy.Function):
    """The smallest value of a 1-D integer read, or of a condition as 0 or 1, over a block."""

    is_integer = True
    is_extended_real = True


class BlockMax(sympy.Function):
    """The largest value of a 1-D integer read, or of a condition as 0 or 1, over a block."""

    is_integer = True
    is_extended_real = True


@dataclass(frozen=True)
class Range:
    """A range of the inner axis, both ends included. It is empty where hi < lo."""

    lo: sympy.Expr
    hi: sympy.Expr


@dataclass(frozen=True)
class Segment:
    """The inner indices that may be visible to some of the block (`live`), and those visible to all of it (`full`, or
    None). scan: conditions on a single tile that narrow both, if the mask reads inputs along the inner axis."""

    live: Range
    full: Range | None
    may: sympy.Basic
    must: sympy.Basic
    scan: Truth | None = None


@dataclass(frozen=True)
class TilePlan:
    """The tiles of one block of the outer axis.

    segments: a few ranges whose union contains every visible pair; their scans are conditions over the block minima and
    maxima of `summaries` (reads and conditions along the inner axis) and of `outer_reads`.
    """

    inner: sympy.Symbol
    outer: sympy.Symbol
    segments: tuple[Segment, ...]
    summaries: tuple[sympy.Expr, ...]
    outer_reads: tuple[sympy.Expr, ...]

    @property
    def scanned(self) -> bool:
        """Whether tiles must be scanned one by one, because the mask depends on the values of inputs."""
        return any(s.scan is not None for s in self.segments)

    @property
    def by_head(self) -> bool:
        """Whether the bounds of a block differ between heads."""
        exprs = [e for s in self.segments for e in _expressions(s)]
        return any({sym.H, sym.H_KV} & e.free_symbols for e in exprs)


def tile_plan_of(masks: Sequence[sympy.Basic], inner: sympy.Symbol) -> TilePlan:
    """`tile_plan` of the union of the masks. If they differ, no tile counts as whole, because each masks for itself."""
    if len(masks) == 1:
        return tile_plan(masks[0], inner)
    plan = tile_plan(sympy.Or(*masks), inner)
    segments = (
        replace(s, full=None, must=sympy.false, scan=s.scan and Truth(s.scan.may, sympy.false)) for s in plan.segments
    )
    return replace(plan, segments=tuple(segments))


def tile_plan(mask: sympy.Basic, inner: sympy.Symbol) -> TilePlan:
    """Bounds on `inner` (q_idx or kv_idx) for a block of the other axis."""
    outer = sym.Q_IDX if inner == sym.KV_IDX else sym.KV_IDX
    length = sym.KV_LEN if inner == sym.KV_IDX else sym.Q_LEN
    terms = disjunction(mask)
    box: dict[sympy.Symbol, Interval] = {outer: Interval(OUTER_LO, OUTER_HI)}
    if terms is None:
        segments: tuple[Segment, ...] = (Segment(Range(sympy.S.Zero, length - 1), None, sympy.true, sympy.false),)
    else:
        segments = tuple(_segment(term, inner, outer, length, box) for term in terms)
    full_box = {**box, inner: Interval(INNER_LO, INNER_HI)}
    reads, unknown = _block_bounds(outer, inner), _block_truth(outer, inner)
    scans = [truth(sympy.And(*term), full_box, reads, unknown) for term in terms or [(mask,)]]
    # interval arithmetic adds to the closed forms only for inputs along the inner axis
    segments = tuple(
        replace(s, scan=scan if _reads_along([scan], inner) else None) for s, scan in zip(segments, scans, strict=True)
    )
    summaries = _reads_along([s.scan for s in segments if s.scan is not None], inner)
    outer_reads: dict[sympy.Expr, None] = {}
    for expr in (e for s in segments for e in _expressions(s)):
        for function in sorted(expr.atoms(BlockMin, BlockMax), key=str):
            if outer in function.args[0].free_symbols:
                outer_reads.setdefault(function.args[0])
    return TilePlan(inner, outer, segments, summaries, tuple(outer_reads))


def _expressions(segment: Segment) -> list[sympy.Basic]:
    full = [segment.full.lo, segment.full.hi] if segment.full else []
    scan = [segment.scan.may, segment.scan.must] if segment.scan else []
    return [segment.live.lo, segment.live.hi, *full, segment.may, segment.must, *scan]


def _reads_along(scans: Sequence[Truth], axis: sympy.Symbol) -> tuple[sympy.Expr, ...]:
    found: dict[sympy.Expr, None] = {}
    for expr in (e for scan in scans for e in (scan.may, scan.must)):
        for function in sorted(expr.atoms(BlockMin, BlockMax), key=str):
            if axis in function.args[0].free_symbols:
                found.setdefault(function.args[0])
    return tuple(found)


def _block_bounds(*axes: sympy.Symbol) -> Callable[[Read], Interval | None]:
    """Bounds of a read that runs along one axis: its block minimum and maximum."""

    def bounds(read: Read) -> Interval | None:
        along = read.free_symbols & {sym.Q_IDX, sym.KV_IDX}
        if not read.is_integer or len(along) != 1 or not along <= set(axes) or level(read) == Level.PAIR:
            return None
        return Interval(BlockMin(read), BlockMax(read))

    return bounds


def _block_truth(*axes: sympy.Symbol) -> Unknown:
    """Whether a condition on inputs along one axis holds somewhere, and everywhere, in a block."""

    def known(condition: sympy.Basic) -> Truth:
        along = condition.free_symbols & {sym.Q_IDX, sym.KV_IDX}
        if len(along) != 1 or not along <= set(axes) or not condition.atoms(Read):
            return nothing_known(condition)
        value = voc.to_int(condition)
        return Truth(BlockMax(value) > 0, BlockMin(value) > 0)

    return known


def disjunction(mask: sympy.Basic) -> list[tuple[sympy.Basic, ...]] | None:
    """The mask as an OR of ANDs of atoms; an empty AND holds everywhere. None if that would take too many terms."""
    expanded = _distribute(sympy.to_nnf(mask, simplify=False))
    return [(sympy.false,)] if expanded == [] else expanded


def _distribute(mask: sympy.Basic) -> list[tuple[sympy.Basic, ...]] | None:
    if mask is sympy.true:
        return [()]
    if mask is sympy.false:
        return []
    if isinstance(mask, sympy.Or):
        parts = [_distribute(a) for a in sorted(mask.args, key=str)]
        if any(p is None for p in parts):
            return None
        result = [term for p in parts for term in p or []]
    elif isinstance(mask, sympy.And):
        result = [()]
        for a in sorted(mask.args, key=str):
            part = _distribute(a)
            if part is None:
                return None
            result = [x + y for x in result for y in part]
            if len(result) > _MAX_TERMS:
                return None
    else:
        return [(mask,)]
    return result if len(result) <= _MAX_TERMS else None


def _segment(
    atoms: tuple[sympy.Basic, ...], inner: sympy.Symbol, outer: sympy.Symbol, length: sympy.Expr, box: Box
) -> Segment:
    live_lo: list[sympy.Expr] = []
    live_hi: list[sympy.Expr] = []
    full_lo: list[sympy.Expr] = [sympy.S.Zero]
    full_hi: list[sympy.Expr] = [length - 1]
    may: list[sympy.Basic] = []
    must: list[sympy.Basic] = []
    whole = True
    reads = _block_bounds(outer)
    for atom in atoms:
        if inner not in atom.free_symbols:
            known = truth(atom, box, reads, _block_truth(outer))
            may.append(known.may)
            must.append(known.must)
            continue
        positive = _divisors(atom)
        solved = solve(atom.xreplace(positive), inner)
        if solved is None:
            whole = False
            continue
        back = {dummy: divisor for divisor, dummy in positive.items()}
        given = sympy.And(*(divisor > 0 for divisor in positive))
        must.append(given)
        for side, bound in solved:
            b = interval(bound, box, reads)
            if b is None:
                whole = False
                continue
            lo, hi = b.lo.xreplace(back), b.hi.xreplace(back)
            if side == "lo":
                live_lo.append(_where(given, lo, sympy.S.Zero))
                full_lo.append(hi)
            else:
                live_hi.append(_where(given, hi, length - 1))
                full_hi.append(lo)
    live = Range(_fold(voc.maximum, live_lo, sympy.S.Zero), _fold(voc.minimum, live_hi, length - 1))
    full = Range(_fold(voc.maximum, full_lo[1:], sympy.S.Zero), _fold(voc.minimum, full_hi[1:], length - 1))
    return Segment(live, full if whole else None, sympy.And(*may), sympy.And(*must))


def _divisors(atom: sympy.Basic) -> dict[sympy.Symbol, sympy.Dummy]:
    """The divisors in a condition that are symbols of unknown sign, such as a call's scalars, each with a positive
    stand-in. Bounds derived with the stand-ins hold only if the divisors are positive."""
    divisors = {f.args[1] for f in atom.atoms(voc.floordiv) if f.args[1].is_Symbol and not f.args[1].is_positive}
    return {d: sympy.Dummy(d.name, integer=True, positive=True) for d in sorted(divisors, key=str)}


def _where(given: sympy.Basic, bound: sympy.Expr, otherwise: sympy.Expr) -> sympy.Expr:
    return bound if given is sympy.true else voc.where(given, bound, otherwise)


def _fold(op: type[sympy.Function], bounds: list[sympy.Expr], limit: sympy.Expr) -> sympy.Expr:
    """The bounds combined by `op`, and clamped to the axis by `limit`."""
    result = limit
    for b in dict.fromkeys(bounds):
        result = op(result, b)
    return result


def hides_what_lies_past_the_keys(mask: sympy.Basic) -> bool:
    """Whether the mask hides every kv_idx >= kv_len from every q_idx < q_len, as causal does. Sound, not complete."""
    terms = disjunction(mask)
    return terms is not None and all(any(_ends_with_the_keys(a) for a in atoms) for atoms in terms)


def _ends_with_the_keys(atom: sympy.Basic) -> bool:
    for side, bound in solve(atom, sym.KV_IDX) or []:
        slope = sympy.diff(bound, sym.Q_IDX)
        if side == "hi" and slope.is_Number and slope.is_nonnegative:
            room = sympy.expand(sym.KV_LEN - 1 - bound.subs(sym.Q_IDX, sym.Q_LEN - 1))
            if room.is_nonnegative:
                return True
    return False


def solve(atom: sympy.Basic, inner: sympy.Symbol) -> list[tuple[str, sympy.Expr]] | None:
    """An integer comparison as bounds on `inner`: ("lo" | "hi", expression), both inclusive. None if it is not of
    that form."""
    if not isinstance(atom, sympy.core.relational.Relational) or isinstance(atom, sympy.Unequality):
        return None
    difference = sympy.expand(atom.lhs - atom.rhs)
    if not difference.is_integer:
        return None
    if isinstance(atom, sympy.Equality):
        lo = _solve_le(difference, inner)
        hi = _solve_le(-difference, inner)
        return lo + hi if lo is not None and hi is not None else None
    sign, slack = {
        sympy.LessThan: (1, 0),
        sympy.StrictLessThan: (1, 1),
        sympy.GreaterThan: (-1, 0),
        sympy.StrictGreaterThan: (-1, 1),
    }[type(atom)]
    return _solve_le(sign * difference + slack, inner)


def _solve_le(difference: sympy.Expr, inner: sympy.Symbol) -> list[tuple[str, sympy.Expr]] | None:
    """Solve difference <= 0 for `inner`."""
    with_inner = [t for t in sympy.Add.make_args(difference) if inner in t.free_symbols]
    if len(with_inner) != 1:
        return None
    rest = sympy.expand(difference - with_inner[0])
    number, core = with_inner[0].as_coeff_Mul()
    if not number.is_Integer:
        return None
    # number * core <= -rest
    divisor = abs(number)
    if number > 0:
        side, bound = "hi", voc.floordiv(-rest, divisor)
    else:
        side, bound = "lo", -voc.floordiv(-rest, divisor)  # the ceiling of rest / divisor
    while core != inner:
        if isinstance(core, voc.floordiv) and core.args[1].is_positive and inner not in core.args[1].free_symbols:
            block = core.args[1]
            bound = block * bound + (block - 1 if side == "hi" else 0)
            inside = sympy.expand(core.args[0])
            terms = [t for t in sympy.Add.make_args(inside) if inner in t.free_symbols]
            if len(terms) != 1:
                return None
            core = terms[0]
            bound = bound - (inside - core)
        else:
            return None
    return [(side, sympy.expand(bound))]
