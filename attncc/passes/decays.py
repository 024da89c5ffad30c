"""Exponentials in a weight: factors of the row and of the column, and the decay from the key's token to the query's.

exp(f(i) + g(j)) is a factor of each. If f(t) = -g(t), up to terms that do not depend on the token, it is a decay
exp(D(i) - D(j)). If f(t) = -g(t - 1), it is a decay without the query's own step, exp(D(i - 1) - D(j)): a late read.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NoReturn

import sympy

from attncc.errors import UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir.graph import VariantGraph
from attncc.ir.levels import Level, level
from attncc.ir.text import formula
from attncc.ir.vocabulary import Read, absolute, cumsum, maximum, where

#: the index of a token; if the mask is causal, queries and keys are the same tokens
T = sym.KV_IDX

_REMEDY = "linear are polynomials of degree 1 or 2 in a dot product, times f(query) * g(key)"


def refuse(graph: VariantGraph, stage: str, reason: str, remedy: str = _REMEDY) -> NoReturn:
    """Raise UnsupportedError with the reason why a stage has no linear-time form."""
    shown = {"raw_score": "similarity", "weight": "normalizer", "out": "reduction"}.get(stage, stage)
    raise UnsupportedError(
        f"no linear-time form: {reason}",
        stage=shown,
        span=graph[stage].span if stage in graph else None,
        remedy=f"{remedy}; plan='parallel' computes any weight in quadratic time",
    )


@dataclass(frozen=True)
class Monomial:
    """The factor row * col * exp(D(i) - D(j)) of a power of a dot product. decay: D(t) over `T`, 0 without decay; late:
    with D(i - 1) instead of D(i)."""

    row: sympy.Expr
    col: sympy.Expr
    decay: sympy.Expr
    late: bool


def channel_decay(
    graph: VariantGraph, left: sympy.Expr, right: sympy.Expr, causal: bool, strict: bool
) -> tuple[sympy.Expr, sympy.Expr, sympy.Expr, bool]:
    """The features of query and key without their decay per channel; D(t) of that decay, 0 without one; whether it is
    late."""
    exponents = []
    features = []
    for side, vector in ((_product(left), sym.Q_VEC), (_product(right), sym.K_VEC)):
        found = [
            f
            for f in sympy.Mul.make_args(side)
            if isinstance(f, sympy.exp)
            and vector not in f.free_symbols
            and (level(f) in (Level.ROW, Level.COL) or sym.COMPONENT in f.free_symbols)
        ]
        exponents.append(sympy.expand(sympy.Add(*(f.args[0] for f in found)), log=False, power_exp=False))
        features.append(sympy.Mul(*(f for f in sympy.Mul.make_args(side) if f not in found)))
    of_query, of_key = exponents
    decay = token(of_query, causal) if causal else sympy.S.Zero
    late = strict and _is_late(graph, decay, of_key)
    decay = -of_key if late else decay
    if sympy.expand(decay + of_key) != 0:
        text = formula(sympy.exp(of_query + of_key))
        refuse(graph, "raw_score", f"'{text}' is no decay from the key to the query in each channel")
    for side in features:
        if side.atoms(Read):
            remedy = "multiply q or k by them before the call"
            refuse(graph, "raw_score", f"the features '{formula(side)}' read an input", remedy)
        others = sorted(x.name for x in side.free_symbols - {sym.Q_VEC, sym.K_VEC})
        if others:
            remedy = "write a number there, or compute the features before the call"
            refuse(graph, "raw_score", f"the features '{formula(side)}' read '{others[0]}'", remedy)
    return features[0], features[1], decay, late


def _product(side: sympy.Expr) -> sympy.Expr:
    """A product that was multiplied out, such as (1 - exp(g)) * exp(-G), as a product again."""
    return sympy.factor(side) if side.is_Add and side.atoms(cumsum) else side


def _is_late(graph: VariantGraph, of_query: sympy.Expr, of_key: sympy.Expr) -> bool:
    """Whether of_query(t) = D(t - 1), given of_key(t) = -D(t)."""
    if T not in of_key.free_symbols:
        return False
    return bool(sympy.expand(of_query + of_key + _difference(graph, -of_key), log=False, power_exp=False) == 0)


def monomial(
    graph: VariantGraph, exponent: sympy.Expr, row: sympy.Expr, col: sympy.Expr, causal: bool, strict: bool
) -> Monomial:
    """row * col * exp(exponent) as a Monomial; `strict`: only for keys before the query."""
    if causal:
        exponent = exponent.replace(absolute, _distance)
    parts: dict[Level, sympy.Expr] = defaultdict(lambda: sympy.S.Zero)
    for term in sympy.Add.make_args(sympy.expand(exponent, log=False, power_exp=False)):
        parts[level(term)] += term
    if parts[Level.PAIR] != 0:
        text = formula(sympy.exp(parts[Level.PAIR]))
        refuse(graph, "weight", f"the factor '{text}' depends on query and key together")
    of_query, of_key = parts[Level.ROW], parts[Level.COL]
    if strict and _is_late(graph, token(of_query + parts[Level.PROGRAM], causal), of_key):
        return Monomial(token(row, causal), col, -of_key, True)
    row *= sympy.exp(parts[Level.PROGRAM])
    if not causal or of_query == 0 or of_key == 0:
        row, of_key_factor = token(row * sympy.exp(of_query), causal), col * sympy.exp(of_key)
        return Monomial(row, of_key_factor, sympy.S.Zero, False)
    decay, more = _in_both(token(of_query, causal), of_key)
    rest = sympy.expand(decay + of_key)
    if T in rest.free_symbols:
        return Monomial(token(row, causal) * sympy.exp(more), col * sympy.exp(rest), decay, False)
    return Monomial(token(row, causal) * sympy.exp(more + rest), col, decay, False)


def _in_both(of_query: sympy.Expr, of_key: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """The query's exponent as (the terms that the key's has with the opposite sign, the rest); if there are none, as
    (all of it, 0)."""
    terms, others = (sympy.Add.make_args(sympy.expand(x, log=False, power_exp=False)) for x in (of_query, of_key))
    shared = sympy.Add(*(x for x in terms if -x in others))
    return (shared, of_query - shared) if T in shared.free_symbols else (of_query, sympy.S.Zero)


def _distance(x: sympy.Expr) -> sympy.Expr:
    """abs(x), without abs if x is a distance whose sign is known from the causal mask."""
    settled = sympy.expand(x.subs(sym.Q_LEN, sym.KV_LEN))
    for sign in (1, -1):
        if settled == sign * (sym.Q_IDX - sym.KV_IDX):
            return sign * x
    return absolute(x)


def token(expr: sympy.Expr, causal: bool) -> sympy.Expr:
    """A query's expression over T, if causal, because queries and keys are then the same tokens."""
    if not causal:
        return expr
    return sympy.expand(expr.subs({sym.Q_LEN: sym.KV_LEN}).subs({sym.Q_IDX: T}), log=False, power_exp=False)


def gates(graph: VariantGraph, step: sympy.Expr | None) -> frozenset[str]:
    """The inputs whose elements are terms of a decay's `step`, and occur only in exponents: if such an element is very
    negative, the state is 0, whatever its exact value."""
    terms = sympy.Add.make_args(sympy.S.Zero if step is None else step)
    other = (s.expr.replace(lambda e: isinstance(e, sympy.exp), lambda _: sympy.S.One) for s in graph.stages)
    return frozenset(r.input for r in terms if isinstance(r, Read)) - {r.input for e in other for r in e.atoms(Read)}


def decay_step(graph: VariantGraph, decay: sympy.Expr) -> sympy.Expr:
    """The log of the factor by which token t decays the state, D(t) - D(t-1), finite at every token.

    If D has no value before the first token, e.g. log(t + 1), the first token leaves an incoming state unchanged.
    """
    step = _difference(graph, decay)
    reads: dict[Any, Any] = {r: sympy.Dummy("read", positive=True) for r in step.atoms(Read)}
    bare = step.xreplace(reads)
    if bare.subs(T, 0).has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan, sympy.I):
        back = {dummy: read for read, dummy in reads.items()}
        return where(T > 0, bare.subs(T, maximum(T, 1)).xreplace(back), sympy.S.Zero)
    return step


def _difference(graph: VariantGraph, decay: sympy.Expr) -> sympy.Expr:
    """D(t) - D(t-1). A running sum's own step is the element that it adds at t."""
    earlier: dict[Any, Any] = {}
    for node in decay.atoms(cumsum):
        if not isinstance(node.args[0].index[node.axis], sympy.Symbol):
            refuse(graph, "weight", f"'{formula(node)}' is not read at the token itself")
        earlier[node] = node - node.args[0]
    bare = {node: sympy.Dummy("sum", real=True) for node in earlier}
    moved = decay.xreplace(bare).subs(T, T - 1).xreplace({bare[node]: e for node, e in earlier.items()})
    step = sympy.expand(decay - moved, log=False, power_exp=False)
    if step.atoms(cumsum):
        refuse(graph, "weight", f"the decay exp({formula(decay)}) is not a sum of what each token adds")
    return step
