"""Sums over the head dimension that are not matmuls, such as sum_d(v_a[h] * tanh(q_vec + k_vec)).

Each tile of pairs loops over the components. An iteration loads one component of the tile's queries and keys, a vector
each, and adds the summand of every pair to the tile of sums, so that nothing has an entry per component of every pair.
The backward repeats the loop with the cotangent of the sums, and accumulates the gradients of the components of q, of k
and of inputs. Registers cannot be indexed: to add a vector to one column of an accumulator, a kernel compares the
indices of all columns. Hence accumulators are narrow (`WIDEST`), each with a loop over its own components. A scratch
row in memory would need no comparison but a barrier per iteration, because threads that hold copies of a row's sum
would read what one of them has written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import sympy

from attncc.codegen.lower import Leaf, Lowering
from attncc.codegen.plan import Plan
from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc
from attncc.ir.levels import Level
from attncc.ir.text import formula
from attncc.ir.vocabulary import Read
from attncc.passes.calculus import derivative
from attncc.passes.fold import lower_exp
from attncc.passes.similarity import Loop

#: columns of an accumulator of a loop's gradients: comparing their numbers costs a fraction of the pairs' own work
WIDEST = 32
#: the values of one iteration over the components
_LEAVES = {
    sym.COMPONENT.name: Leaf("d_idx", Level.PROGRAM),
    sym.Q_VEC.name: Leaf("q_d", Level.ROW),
    sym.K_VEC.name: Leaf("k_d", Level.COL),
}
#: functions whose values are finite wherever their arguments are
_TAME = (
    *(sympy.Add, sympy.Mul, voc.tanh, voc.sigmoid, voc.relu, voc.step, voc.sign, voc.absolute),
    *(voc.maximum, voc.minimum, voc.where, voc.sin, voc.cos, voc.erf, voc.silu, voc.gelu),
    *(voc.softplus, voc.to_float, Read),
)


def cotangent(loop: Loop) -> sympy.Symbol:
    """The cotangent of a loop's sum, one value per pair of a tile."""
    return sympy.Symbol(f"d{loop.name}", real=True)


def slope(loops: Iterable[Loop], wrt: sympy.Expr) -> sympy.Expr:
    """One pair's contribution to the gradient of `wrt`, a component of q_vec or k_vec or a read: the derivative of each
    loop's summand times the cotangent of its sum."""
    total = sympy.S.Zero
    for loop in loops:
        by = derivative(loop.summand, wrt)
        if by == 0:
            continue
        part = cotangent(loop) * by
        # a hidden pair's cotangent is 0, and must stay so where the slope is infinite
        total += part if _is_tame(by) else voc.where(sympy.Ne(cotangent(loop), 0), part, sympy.S.Zero)
    return total


def _is_tame(expr: Any) -> bool:
    """Whether the value is finite for all finite values of its symbols."""
    if not expr.args:
        return True
    power = expr.is_Pow and expr.exp.is_Integer and expr.exp > 0
    known = power or isinstance(expr, _TAME) or bool(expr.is_Boolean or expr.is_Relational)
    return known and all(_is_tame(a) for a in expr.args)


def loop_slots(
    plan: Plan, loops: tuple[Loop, ...], rows_first: bool, kernel: Lowering, base: Mapping[str, Leaf]
) -> dict[str, Any] | None:
    """Slots of the loop that computes the sums of a tile of pairs; None without `loops`."""
    if not loops:
        return None
    scope = _scope(plan, rows_first, kernel, base)
    summands = [lower_exp(loop.summand) for loop in loops]
    scope.count(summands)
    for loop, summand in zip(loops, summands, strict=True):
        scope.body.append(f"{loop.name} += {scope.tile(summand)}")
    return {
        "sums": [(loop.name, formula(loop.summand)) for loop in loops],
        "rows": "BLOCK_M" if rows_first else "BLOCK_N",
        "cols": "BLOCK_N" if rows_first else "BLOCK_M",
        **_loop(scope, summands),
    }


def gradient_slots(
    plan: Plan,
    loops: tuple[Loop, ...],
    rows_first: bool,
    gradients: Iterable[tuple[str, sympy.Expr, bool]],
    kernel: Lowering,
    base: Mapping[str, Leaf],
) -> dict[str, Any] | None:
    """Slots of the loops over a tile of cotangents of the sums: the contribution to dQ (rows_first) or dK, and to the
    inputs of `gradients`: (name, cotangent per pair, whether it has an entry per component). None if all are 0."""
    tile, vector = ("q", sym.Q_VEC) if rows_first else ("k", sym.K_VEC)
    found = lower_exp(slope(loops, vector))
    others = [(name, lower_exp(expr), by_component) for name, expr, by_component in gradients]
    if found == 0 and not others:
        return None
    leaves = {cotangent(loop).name: Leaf(cotangent(loop).name, Level.PAIR) for loop in loops}
    scope = _scope(plan, rows_first, kernel, {**base, **leaves})
    exprs = [found, *(expr for _, expr, _ in others)]
    # a power is written as products of its base, which therefore gets a name
    scope.count([*exprs, *(power.base for e in exprs for power in e.atoms(sympy.Pow))])
    if found != 0:
        scope.body.append(f"d{tile}_d = tl.sum({scope.tile(found)}, 1)")
    wanted = []
    for name, expr, by_component in others:
        branch = scope.branch()
        text = branch.tile(expr)
        lines = [*branch.body, f"{name}_d = tl.sum({text}, 1)"]
        wanted.append({"name": name, "by_component": by_component, "lines": lines})
    return {"tile": tile, "flows": found != 0, "wanted": wanted, **_loop(scope, exprs)}


def band_slots(
    plan: Plan, loop: Loop, read: Read, tile: str, kernel: Lowering, base: Mapping[str, Leaf]
) -> dict[str, Any]:
    """Slots of a loop over components, given a `tile` of cotangents of a loop's sum: each pair's contribution to the
    gradient of a table of distances, one component at a time."""
    found = lower_exp(slope((loop,), read))
    scope = _scope(plan, True, kernel, {**base, cotangent(loop).name: Leaf(tile, Level.PAIR)})
    scope.count([found, *(power.base for power in found.atoms(sympy.Pow))])
    value = scope.tile(found)
    return {"value": value, **_loop(scope, [found])}


def _scope(plan: Plan, rows_first: bool, kernel: Lowering, base: Mapping[str, Leaf]) -> Lowering:
    """A lowering for the body of a loop, whose new names differ from those of the kernel's lowering."""
    running = frozenset(_LEAVES)
    leaves = {**base, **_LEAVES}
    return Lowering(plan.core, leaves, rows_first, running=running, helpers=kernel.helpers, _names=kernel._names)


def _loop(scope: Lowering, exprs: Iterable[Any]) -> dict[str, Any]:
    """Slots that all loops have: the lines before the loop, its body, and whether it reads q and k."""
    used = frozenset().union(*(e.free_symbols for e in exprs))
    return {"before": scope.outer, "lines": scope.body, "reads_q": sym.Q_VEC in used, "reads_k": sym.K_VEC in used}
