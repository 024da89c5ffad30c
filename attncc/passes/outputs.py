"""Auxiliary outputs as light passes over the pairs, given the row statistics that the forward stored.

A pass recomputes the tiles for the outputs of one domain: the score, the weight from the stored rows (as in the
backward), and the outputs' pair expressions. It needs no v and no M x N buffer, and visits only the tiles that the mask
and the common condition of its reductions leave.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc
from attncc.ir.graph import VariantGraph
from attncc.ir.outputs import Domain, Output, Reduction
from attncc.passes.differentiate import normal_form
from attncc.passes.stream import stream

#: log(weight) is never below this: the log of the smallest normal float32
LOG_TINY = -126 * voc.LN2
TINY = 2.0**-126


@dataclass(frozen=True)
class Weight:
    """The final weight of a pair, over the score and stored rows: (symbol, expression at the end of the forward)."""

    rows: tuple[tuple[sympy.Symbol, sympy.Expr], ...]
    expr: sympy.Expr

    @property
    def log(self) -> sympy.Expr:
        """log(weight), never below LOG_TINY; computed without a logarithm if the weight is an exponential."""
        factors = sympy.Mul.make_args(self.expr)
        rest = [f for f in factors if not isinstance(f, sympy.exp)]
        exponent = sympy.Add(*(f.args[0] for f in factors if isinstance(f, sympy.exp)))
        if rest:
            exponent += sympy.log(voc.maximum(sympy.Mul(*rest), sympy.Float(TINY)))
        return voc.maximum(exponent, sympy.Float(LOG_TINY))

    def of(self, expr: sympy.Basic) -> sympy.Basic:
        """A pair expression over WEIGHT in terms of the score and the stored rows."""
        return expr.xreplace({sympy.log(sym.WEIGHT): self.log}).xreplace({sym.WEIGHT: self.expr})


def final_weight(graph: VariantGraph) -> Weight:
    """The weight without the reduction's factor. Raises UnsupportedError as `stream`."""
    plain = [
        replace(stage, expr=sym.WEIGHT * sym.V_VEC) if stage.name == "out" else stage for stage in graph.core.stages
    ]
    normal = normal_form(stream(graph.changed(stages=plain, outputs=())))
    return Weight(normal.saved, normal.numerator * normal.scale)


@dataclass(frozen=True)
class Named:
    """One reduction of one output. `name` is its name in kernels, where no other name starts with it."""

    name: str
    output: str
    reduction: Reduction


@dataclass(frozen=True)
class Pass:
    """One light pass: all reductions over one domain. `mask` holds for every visible pair that any of them includes."""

    domain: Domain
    reductions: tuple[Named, ...]
    mask: sympy.Basic

    @property
    def uses_weight(self) -> bool:
        """Whether the weight is needed, or only the score."""
        return any(sym.WEIGHT in e.free_symbols for n in self.reductions for e in (n.reduction.expr, n.reduction.when))


def named(outputs: tuple[Output, ...]) -> tuple[Named, ...]:
    """Every reduction of the outputs, in a fixed order."""
    found = []
    for output in outputs:
        for i, reduction in enumerate(output.reductions):
            found.append(Named(f"y_{output.name}_{i}", output.name, reduction))
    return tuple(found)


def passes(graph: VariantGraph) -> tuple[Pass, ...]:
    """One pass for each domain that the graph's outputs reduce over."""
    by_domain: dict[Domain, list[Named]] = {}
    domains = {output.name: output.domain for output in graph.outputs}
    for entry in named(graph.outputs):
        by_domain.setdefault(domains[entry.output], []).append(entry)
    mask = graph["mask"].expr
    return tuple(
        Pass(domain, tuple(entries), sympy.And(mask, sympy.Or(*(_of_places(n.reduction.when) for n in entries))))
        for domain, entries in by_domain.items()
    )


def _of_places(when: sympy.Basic) -> sympy.Basic:
    """The part of a condition that depends only on positions, and not on scores or weights: it bounds the tiles to
    visit."""
    scores = {sym.WEIGHT, sym.SCORE, sym.RAW_SCORE}
    return sympy.And(*(c for c in sympy.And.make_args(when) if not c.free_symbols & scores))
