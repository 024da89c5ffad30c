"""Classify the sums over the head dimension by cost: a value per row, a value per column, a matmul, or a loop.

A similarity is an expression with sums over the head dimension. Each sum is expanded, and its terms become stages:

    qk          sum_d(q_vec * k_vec)                     the matmul of standard attention
    q_term_i    sum_d(f(q_vec, inputs of the query))     one value per row
    k_term_i    sum_d(g(k_vec, inputs of the key))       one value per column
    dot_i       sum_d(f(query) * g(key))                 a matmul of functions of either vector
    band_i      sum_d(f(query) * table[distance])        a loop over the head dimension that loads an entry per pair
    pair_i      sum_d(anything else)                     a loop over the head dimension

So -sum_d((q_vec - k_vec)**2) is 2*qk - q_term_0 - k_term_0: written as in the textbook, at the cost of a matmul.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import sympy
from sympy.core.relational import Relational

from attncc.errors import UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir.graph import Stage
from attncc.ir.levels import Level, level
from attncc.ir.text import ordered_text
from attncc.ir.vocabulary import Read, sum_d

#: the kinds of sums; stages are named `<kind>_<number>`
KINDS = ("q_term", "k_term", "dot", "band", "pair")

_VECTORS = {sym.Q_VEC, sym.K_VEC, sym.STATE, sym.COMPONENT}


def is_vector(expr: Any) -> bool:
    """Whether the value is a vector over the head dimension."""
    if isinstance(expr, sum_d):
        return False
    return expr in _VECTORS or any(is_vector(a) for a in expr.args)


def by_distance(expr: sympy.Expr) -> bool:
    """Whether an expression, such as an element read, depends on q_idx and kv_idx only through their difference."""
    moved = {sym.Q_IDX: sym.Q_IDX + 1, sym.KV_IDX: sym.KV_IDX + 1}
    return bool(_settled(expr.subs(moved, simultaneous=True)) == _settled(expr))


def _settled(expr: sympy.Expr) -> sympy.Expr:
    if not expr.args:
        return expr
    settled = expr.func(*(_settled(a) for a in expr.args))
    return settled.expand() if isinstance(settled, sympy.Expr | Relational) else settled


def kind_of(stage: Stage) -> str:
    """The kind of a sum over the head dimension."""
    return stage.name.rpartition("_")[0]


def separate(expr: sympy.Expr) -> tuple[sympy.Expr, tuple[Stage, ...]]:
    """A similarity as an expression of qk and of stages, and those stages.

    Raises UnsupportedError if a sum over the head dimension is nested in another, except as a factor of it.
    """
    sums: dict[tuple[str, sympy.Expr], sympy.Symbol] = {}

    def visit(e: sympy.Expr) -> sympy.Expr:
        if not e.has(sum_d):
            return e
        args = [visit(a) for a in e.args]
        if not isinstance(e, sum_d):
            return e.func(*args)
        total = sympy.S.Zero
        for kind, coefficient, term in _terms(args[0]):
            if kind == "qk":
                total += coefficient * sym.QK
                continue
            symbol = sums.setdefault((kind, term), sympy.Dummy(kind, real=True))
            total += coefficient * symbol
        return total

    result = visit(gathered(expr))
    named: dict[sympy.Symbol, sympy.Symbol] = {}
    stages: list[Stage] = []
    for (kind, term), dummy in sorted(sums.items(), key=lambda x: (KINDS.index(x[0][0]), ordered_text(x[0][1]))):
        if any(isinstance(s, sympy.Dummy) for s in term.free_symbols):
            raise UnsupportedError(
                "a sum over the head dimension stands inside another one, and is no factor of it",
                stage="similarity",
                remedy="normalize q or k in PyTorch, before the op",
            )
        named[dummy] = sym.similarity_symbol(kind, sum(kind_of(s) == kind for s in stages))
        stages.append(Stage(named[dummy].name, term, "sum_d"))
    return result.xreplace(named), tuple(stages)


def gathered(expr: sympy.Expr) -> sympy.Expr:
    """Merge added sums that have the same coefficient: dot(q, k) + dot(w * q, k) is one matmul."""
    if not expr.has(sum_d):
        return expr
    expr = expr.func(*(gathered(a) for a in expr.args))
    if not expr.is_Add:
        return expr
    inside: dict[sympy.Expr, list[sympy.Expr]] = defaultdict(list)
    rest = []
    for term in expr.args:
        number, symbolic = term.as_coeff_Mul()
        factors = sympy.Mul.make_args(symbolic)
        found = [f for f in factors if isinstance(f, sum_d)]
        if len(found) != 1:
            rest.append(term)
            continue
        inside[sympy.Mul(*(f for f in factors if f is not found[0]))].append(number * found[0].args[0])
    return sympy.Add(*rest, *(c * sum_d(sympy.Add(*parts)) for c, parts in inside.items()))


def _terms(summand: sympy.Expr) -> Iterable[tuple[str, sympy.Expr, sympy.Expr]]:
    """(kind, coefficient, summand) of each stage that the sum of `summand` consists of, in a fixed order."""
    singles: dict[tuple[str, sympy.Expr], sympy.Expr] = defaultdict(_zero)
    dots: dict[tuple[sympy.Expr, sympy.Expr], sympy.Expr] = defaultdict(_zero)
    bands: dict[tuple[sympy.Expr, Read], sympy.Expr] = defaultdict(_zero)
    for term in sympy.Add.make_args(sympy.expand(summand, log=False, basic=False, power_exp=False)):
        scalars, vectors = _factors(term)
        number, coefficient = sympy.Mul(*scalars).as_coeff_Mul()
        rows, cols, pairs = _at(vectors, Level.PROGRAM, Level.ROW), _at(vectors, Level.COL), _at(vectors, Level.PAIR)
        has_row, has_col = level(rows) == Level.ROW, cols != 1
        if isinstance(pairs, Read) and by_distance(pairs) and not (has_row and has_col):
            bands[coefficient, pairs] += number * rows * cols
        elif pairs != 1:
            singles["pair", coefficient] += number * rows * cols * pairs
        elif has_row and has_col:
            dots[coefficient, cols] += number * rows
        else:
            singles["k_term" if has_col else "q_term", coefficient] += number * rows * cols
    # products with the same row factor are merged into one matmul with the sum of their column factors
    by_rows: dict[tuple[sympy.Expr, sympy.Expr], sympy.Expr] = defaultdict(_zero)
    for (coefficient, cols), rows in dots.items():
        number, rest = rows.as_coeff_Mul()
        by_rows[coefficient, rest] += number * cols
    found = []
    for (coefficient, rows), cols in by_rows.items():
        number, rest = cols.as_coeff_Mul()
        kind = "qk" if (rows, rest) == (sym.Q_VEC, sym.K_VEC) else "dot"
        found.append((kind, number * coefficient, rows * rest))
    for (coefficient, table), factor in bands.items():
        number, rest = factor.as_coeff_Mul()
        found.append(("band", number * coefficient, rest * table))
    for (kind, coefficient), term in singles.items():
        number, rest = term.as_coeff_Mul()
        found.append((kind, number * coefficient, rest))
    return sorted((t for t in found if t[2] != 0), key=lambda t: (t[0], ordered_text(t[1]), ordered_text(t[2])))


def sides(stage: Stage) -> tuple[sympy.Expr, sympy.Expr, sympy.Expr]:
    """A sum's summand as three factors: functions of the query, of the key, and of both together."""
    vectors = list(sympy.Mul.make_args(stage.expr))
    return _at(vectors, Level.PROGRAM, Level.ROW), _at(vectors, Level.COL), _at(vectors, Level.PAIR)


def _at(factors: Iterable[sympy.Expr], *levels: Level) -> sympy.Expr:
    return sympy.Mul(*(f for f in factors if level(f) in levels))


def _zero() -> sympy.Expr:
    return sympy.S.Zero


def _factors(term: sympy.Expr) -> tuple[list[sympy.Expr], list[sympy.Expr]]:
    """A product's factors without components, and those with components. exp(f(q) + g(k)) is split into two factors."""
    scalars, vectors = [], []
    for f in sympy.Mul.make_args(term):
        if not is_vector(f):
            scalars.append(f)
        elif isinstance(f, sympy.exp) and level(f) == Level.PAIR:
            vectors += _split_exp(f)
        else:
            vectors.append(f)
    return scalars, vectors


def _split_exp(f: sympy.Expr) -> list[sympy.Expr]:
    parts: dict[Level, sympy.Expr] = defaultdict(_zero)
    for part in sympy.Add.make_args(sympy.expand(f.args[0])):
        parts[level(part)] += part
    if Level.PAIR in parts:
        return [f]
    return [sympy.exp(part) for part in parts.values()]
