"""Comparisons with a row's own extreme, with a tolerance: a key attains the extreme if float32 cannot tell the
difference.

A kernel that compares a score with its maximum computes the score a second time, in another unit or order of summation,
so an exact `score >= row.max(score)` could be false even for the key that has the maximum.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
from sympy.core.relational import Relational

from attncc.ir import vocabulary as voc
from attncc.ir.graph import VariantGraph

#: two computations of one float32 score agree to this, relative to it
TIE = 1e-5


def with_ties(graph: VariantGraph) -> VariantGraph:
    """The graph with a tolerance in every comparison of a value with its own maximum over the row."""
    maxima = {sympy.Symbol(s.name, real=True): s.expr for s in graph.stages if s.op == "max"}
    known = {r: _roomy(r, maxima) for s in graph.stages for r in s.expr.atoms(Relational)} if maxima else {}
    changed = {r: e for r, e in known.items() if r != e}
    if not changed:
        return graph
    return graph.changed(stages=[replace(s, expr=s.expr.xreplace(changed)) for s in graph.stages])


def _roomy(relation: Any, maxima: dict[sympy.Symbol, sympy.Expr]) -> Any:
    """The comparison, with a tolerance if its two sides are equal at the maximum that it reads."""
    apart = relation.lhs - relation.rhs
    for symbol, value in maxima.items():
        if symbol in apart.free_symbols and sympy.expand(apart.xreplace({symbol: value})) == 0:
            room = TIE * voc.absolute(symbol)
            if isinstance(relation, sympy.Eq | sympy.Ne):
                close = voc.absolute(apart) <= room
                return close if isinstance(relation, sympy.Eq) else sympy.Not(close)
            # a comparison that holds for equal sides is widened, any other narrowed
            above = isinstance(relation, sympy.Le | sympy.Gt)
            return relation.func(apart, room if above else -room)
    return relation
