"""The similarity as kernels compute it: row and column terms become inputs of a core variant, computed by a small
kernel. Terms that are neither these nor matmuls become a loop over the components of each tile of pairs.

A term such as sum_d(k_vec**2) is one value per key, however many queries see it. The core variant reads it like any
input with an entry per key, and differentiates it like one. The gradient of q (and likewise of k, and of every vector
input in the terms) is then

    dq_vec = d/dq_vec [ sum_i F_i * f_i(q_vec) + sum_t dterm_t * e_t(q_vec) ]

per component, where dot_i = sum_d(f_i * g_i), F_i is the row sum of ddot_i * g_i over the keys, e_t is the summand of
the row term t, and dterm_t its cotangent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from attncc.errors import UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir.graph import InputDecl, Stage, VariantGraph
from attncc.ir.levels import Level, level
from attncc.ir.similarity import by_distance, gathered, kind_of, sides
from attncc.ir.text import formula
from attncc.ir.vocabulary import Read, sum_d

#: the kinds of sums that are computed by a loop
_LOOPS = ("band", "pair")


@dataclass(frozen=True)
class Dot:
    """A matmul of the similarity: `symbol` = sum_d(left * right), functions of the query and of the key."""

    symbol: sympy.Symbol
    left: sympy.Expr
    right: sympy.Expr

    @property
    def name(self) -> str:
        return self.symbol.name


@dataclass(frozen=True)
class Term:
    """A sum over the head dimension with one value per row or column: the core variant's input `read`."""

    symbol: sympy.Symbol
    summand: sympy.Expr
    read: Read

    @property
    def name(self) -> str:
        return self.symbol.name


@dataclass(frozen=True)
class Loop:
    """A sum over the head dimension that a tile of pairs adds up component by component: `symbol` = sum_d(summand).


    `table`: a read by distance, if the summand is the product of it and `factor`, a function of the query.
    """

    symbol: sympy.Symbol
    summand: sympy.Expr
    table: Read | None = None
    factor: sympy.Expr = sympy.S.One

    @property
    def name(self) -> str:
        return self.symbol.name


@dataclass(frozen=True)
class Similarity:
    """The sums of a variant's similarity. `core` is the variant over qk, dots, loops and inputs alone."""

    core: VariantGraph
    q_terms: tuple[Term, ...]
    k_terms: tuple[Term, ...]
    dots: tuple[Dot, ...]
    loops: tuple[Loop, ...] = ()

    @property
    def own(self) -> frozenset[str]:
        """The inputs of the core that the user does not pass: the terms."""
        return frozenset(t.name for t in (*self.q_terms, *self.k_terms))


def similarity(graph: VariantGraph) -> Similarity:
    """Split a variant into its core and the sums over the head dimension that the core reads."""
    if not graph.sums_d:
        return Similarity(graph, (), (), ())
    of_keys = [s for s in graph.sums_d if kind_of(s) == "k_term"]
    # all terms of keys are computed by one kernel: per key head, or per query head if one of them depends on it
    head = sym.H if any(sym.H in s.expr.free_symbols for s in of_keys) else sym.H_KV
    q_terms = tuple(_term(s, sym.H, sym.Q_IDX) for s in graph.sums_d if kind_of(s) == "q_term")
    k_terms = tuple(_term(s, head, sym.KV_IDX) for s in of_keys)
    dots = tuple(Dot(_symbol(s), *sides(s)[:2]) for s in graph.sums_d if kind_of(s) == "dot")
    loops = tuple(_loop(s) for s in graph.sums_d if kind_of(s) in _LOOPS)
    reads = {t.symbol: t.read for t in (*q_terms, *k_terms)}
    raw = graph["raw_score"]
    stages = [
        Stage(raw.name, raw.expr.xreplace(reads), span=raw.span) if s is raw else s
        for s in graph.stages
        if s.op != "sum_d"
    ]
    # past the tensor's edge they are 1, because a formula may divide by them
    own = [InputDecl(t.name, tuple(map(str, t.read.index)), grad=True, beyond=1) for t in (*q_terms, *k_terms)]
    core = graph.changed(stages=stages, inputs=[*graph.inputs, *own])
    return Similarity(core, q_terms, k_terms, dots, loops)


def whole(found: Similarity) -> Similarity:
    """Merge terms of the query and of the key with a matmul into one dot product, if its features contain a constant,
    such as f(q_vec) + 1: a graph has all products multiplied out."""
    if not (found.q_terms or found.k_terms):
        return found
    summands = {sym.QK: sym.Q_VEC * sym.K_VEC, **{d.symbol: d.left * d.right for d in found.dots}}
    summands |= {t.read: t.summand for t in (*found.q_terms, *found.k_terms)}
    known = {sum_d(summand): value for value, summand in summands.items()}
    stage = found.core["raw_score"]
    raw = gathered(stage.expr.xreplace({value: sum_d(summand) for value, summand in summands.items()}))
    dots: list[Dot] = []
    for total in sorted(raw.atoms(sum_d) - known.keys(), key=str):
        factors = sympy.Mul.make_args(sympy.factor(total.args[0]))
        right = sympy.Mul(*(f for f in factors if level(f) == Level.COL))
        left = sympy.Mul(*factors) / right
        if level(left) != Level.ROW or right == 1:
            return found
        dots.append(Dot(sym.similarity_symbol("dot", len(found.dots) + len(dots)), left, right))
        known[total] = dots[-1].symbol
    if not dots:
        return found
    settled = replace(stage, expr=raw.xreplace(known))
    core = found.core.changed(stages=[settled if s is stage else s for s in found.core.stages])
    return replace(found, core=core, dots=(*found.dots, *dots))


def refuse_gradients(graph: VariantGraph) -> None:
    """Raise UnsupportedError for an input whose gradient would need a value for every component of every pair. The
    gradient of a table of distances does not: it is summed along diagonals."""
    for stage, read in _wanted_in_loops(graph):
        if level(read) == Level.PAIR and not by_distance(read):
            raise UnsupportedError(
                f"no kernel makes the gradient of {formula(read)} inside sum_d({formula(stage.expr)}) yet: it is read "
                "at a place that hangs on the query and on the key, and not on their distance alone",
                stage="similarity",
                span=stage.span,
                remedy="declare the input without a gradient; or let ac.recipes.pairwise have the scores made by "
                "PyTorch, a block of queries at a time, with every gradient",
            )


def loops_by_key(graph: VariantGraph) -> bool:
    """Whether a loop over components reads an input with a gradient by key."""
    return any(level(read) == Level.COL for _, read in _wanted_in_loops(graph))


def _wanted_in_loops(graph: VariantGraph) -> list[tuple[Stage, Read]]:
    """Reads of inputs with a gradient, in sums that are computed by a loop."""
    wanted = {d.name for d in graph.inputs if d.grad}
    found = [(s, r) for s in graph.sums_d if kind_of(s) in _LOOPS for r in s.expr.atoms(Read) if r.input in wanted]
    return sorted(found, key=lambda entry: (entry[0].name, str(entry[1])))


def _loop(stage: Stage) -> Loop:
    factor, of_keys, table = sides(stage)
    if kind_of(stage) == "band" and of_keys == 1 and isinstance(table, Read):
        return Loop(_symbol(stage), stage.expr, table, factor)
    return Loop(_symbol(stage), stage.expr)


def _symbol(stage: Stage) -> sympy.Symbol:
    return sympy.Symbol(stage.name, real=True)


def _term(stage: Stage, head: sympy.Symbol, along: sympy.Symbol) -> Term:
    """A term with a value per query or key (`along`), and per query head or key head (`head`)."""
    symbol = _symbol(stage)
    return Term(symbol, stage.expr, Read(sym.input_symbol(stage.name, False), sym.B, head, along))
