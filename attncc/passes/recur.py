"""Classify a recurrence: split the new state into the kept part of the previous one and the written part.

A token's update is analysed term by term. Two families have a form by chunks of tokens:

    diagonal   state_t = exp(step_t) state_(t-1) + write_t k_t v_t'
    rank one   state_t = exp(step_t) (I - erase_t k_t k_t') state_(t-1) + write_t k_t v_t'

The first is linear attention, see `passes.linearize`. In the second, the delta rule, the value that a token writes
depends on the state it finds. Within a chunk this is a triangular system with one equation per token (the WY form),
after which the second family is the first with other values:

    D_t = step_0 + ... + step_t      A_ij = erase_i (k_i . k_j) exp(D_i - D_j) for j < i, else 0
    added = (I + A)^-1 (write V - erase exp(D) K state)
    state' = exp(D_last) state + (exp(D_last - D) K)' added

`recur` proves which family a variant belongs to, and refuses with the name of the first term that fits neither. It does
not look at the name of a variant.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NoReturn

import sympy

from attncc.errors import UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir.graph import VariantGraph
from attncc.ir.levels import Level, level
from attncc.ir.similarity import is_vector
from attncc.ir.text import formula
from attncc.ir.vocabulary import Read, detach, sum_d
from attncc.passes.linearize import Linear

#: dot(k_vec, state), the value that the state holds for a token's key; and dot(q_vec, state)
_RECALL = sympy.Symbol("dot(k_vec, state)", real=True)
_READ = sympy.Symbol("dot(q_vec, state)", real=True)
_PARTS = (sym.STATE, _RECALL, _READ, sym.Q_VEC, sym.K_VEC, sym.V_VEC)


@dataclass(frozen=True)
class Delta:
    """The delta rule's plan. `linear`: the plan of linear attention in which each token writes its `added` value;
    erase, write: factors of a token."""

    linear: Linear
    erase: sympy.Expr
    write: sympy.Expr

    @property
    def proof(self) -> tuple[str, ...]:
        """The steps of the proof, as text."""
        return self.linear.proof

    @property
    def rows(self) -> dict[str, sympy.Expr | None]:
        """The formula of each factor of a token; None if the plan does not have it."""
        row = None if self.linear.row == 1 else self.linear.row
        return {"row": row, "step": self.linear.step, "erase": self.erase, "write": self.write}


def recur(graph: VariantGraph) -> Linear | Delta:
    """The plan of a recurrence in its family. UnsupportedError, with the term, if a term belongs to none."""
    if any(stage.expr.has(detach) for stage in graph.stages):
        _refuse(graph, "update", "a part of it is held constant for the gradient")
    terms = _terms(graph, "update")
    known = {(sym.STATE,), (_RECALL, sym.K_VEC), (sym.K_VEC, sym.V_VEC)}
    for parts, coefficient in terms.items():
        if parts not in known:
            _refuse(graph, "update", f"the term '{formula(coefficient * sympy.Mul(*parts))}' {_what(parts)}")
    decay, write = terms.get((sym.STATE,), sympy.S.Zero), terms.get((sym.K_VEC, sym.V_VEC), sympy.S.Zero)
    if decay == 0:
        _refuse(graph, "update", "nothing is kept of the state")
    if write == 0:
        _refuse(graph, "update", "nothing of v_vec is written: there is no term k_vec * v_vec")
    step = _log(graph, decay)
    erase = _erased(graph, terms.get((_RECALL, sym.K_VEC), sympy.S.Zero), decay)
    for name, factor in (("kept", step if erase != 0 else None), ("erased", erase), ("written", write)):
        if factor is not None and sym.COMPONENT in factor.free_symbols:
            _refuse(graph, "update", f"the factor '{formula(factor)}' of what is {name} is one of each channel")
    constant, row = _query(graph)
    proof = _proof(decay, step, erase, write, constant * row)
    parts = (sym.Q_VEC, sym.K_VEC, constant, row, write if erase == 0 else sympy.S.One)
    linear = Linear(True, *parts, None, step, sympy.S.One, sympy.S.One, proof)
    if erase != 0:
        return Delta(linear, erase, write)
    if linear.decay == "channel" and (row, write) != (1, 1):
        _refuse(graph, "update", "each channel decays on its own, beside factors of tokens")
    return linear


def _refuse(graph: VariantGraph, stage: str, reason: str) -> NoReturn:
    raise UnsupportedError(
        f"no form by chunks: {reason}",
        stage={"update": "state"}.get(stage, stage),
        span=graph[stage].span,
        remedy="a recurrence is decay * (state - erase * k_vec * dot(k_vec, state)) + write * k_vec * v_vec, with "
        "factors of the token (inputs: a key's norm is taken before the call), and reads factor * dot(q_vec, state); "
        "ac.reference computes any",
    )


def _what(parts: tuple[sympy.Symbol, ...]) -> str:
    """Why a term with this product of state and vectors is refused, as text."""
    held = [p for p in parts if p in (sym.STATE, _RECALL)]
    if len(held) > 1:
        return "is not linear in the state"
    if held:
        return "is neither a factor times state nor one times k_vec * dot(k_vec, state)"
    return "is no factor times the outer product k_vec * v_vec"


def _terms(graph: VariantGraph, stage: str) -> dict[tuple[sympy.Symbol, ...], sympy.Expr]:
    """A formula multiplied out: the coefficient of each product of state and vectors."""
    found: dict[tuple[sympy.Symbol, ...], sympy.Expr] = defaultdict(lambda: sympy.S.Zero)
    for term in _sum(_summed(graph, stage, graph[stage].expr)):
        parts: list[sympy.Symbol] = []
        coefficient = sympy.S.One
        for factor in sympy.Mul.make_args(term):
            base, power = factor.as_base_exp()
            if base in _PARTS and power.is_Integer and power > 0:
                parts += [base] * int(power)
            elif factor.free_symbols & set(_PARTS):
                _refuse(graph, stage, f"the factor '{formula(factor)}' is not linear in the state and the vectors")
            else:
                coefficient *= factor
        found[tuple(sorted(parts, key=_PARTS.index))] += coefficient
    return {parts: coefficient for parts, coefficient in found.items() if coefficient != 0}


def _sum(expr: sympy.Expr) -> tuple[sympy.Expr, ...]:
    expanded = sympy.expand(expr, log=False, basic=False, power_exp=False, power_base=False)
    return tuple(sympy.Add.make_args(expanded))


def _summed(graph: VariantGraph, stage: str, expr: sympy.Expr) -> sympy.Expr:
    """The formula with each sum over components replaced by a factor times dot(k_vec, state) or dot(q_vec, state)."""
    if not expr.has(sum_d):
        return expr
    expr = expr.func(*(_summed(graph, stage, a) for a in expr.args))
    if not isinstance(expr, sum_d):
        return expr
    total = sympy.S.Zero
    for term in _sum(expr.args[0]):
        factors = sympy.Mul.make_args(term)
        vectors = sympy.Mul(*(f for f in factors if is_vector(f)))
        found = {sym.K_VEC * sym.STATE: _RECALL, sym.Q_VEC * sym.STATE: _READ}.get(vectors)
        if found is None:
            gate = sympy.cancel(vectors / (sym.K_VEC * sym.STATE))
            if not gate.free_symbols & set(_PARTS):
                _refuse(graph, stage, f"the key finds a state that each channel keeps on its own, by '{formula(gate)}'")
            _refuse(graph, stage, f"sum_d({formula(term)}) is no dot product of the vector with the state")
        total += found * sympy.Mul(*(f for f in factors if not is_vector(f)))
    return total


def _log(graph: VariantGraph, decay: sympy.Expr) -> sympy.Expr | None:
    """The log of the decay factor of a token; None without decay."""
    step = sympy.S.Zero
    for factor in sympy.Mul.make_args(sympy.factor_terms(decay)):
        if factor.is_number and not factor.is_positive:
            _refuse(graph, "update", f"the state is kept by the factor '{formula(decay)}', which is not positive")
        step += factor.args[0] if isinstance(factor, sympy.exp) else sympy.log(factor)
    return None if step == 0 else step


def _erased(graph: VariantGraph, coefficient: sympy.Expr, decay: sympy.Expr) -> sympy.Expr:
    """erase, given the coefficient of k_vec * dot(k_vec, state), which is -decay * erase."""
    erase = sympy.cancel(-coefficient / decay) if coefficient != 0 else coefficient
    if erase.atoms(sympy.exp) - coefficient.atoms(sympy.exp):
        _refuse(
            graph,
            "update",
            f"what is erased, '{formula(-coefficient)}' times k_vec * dot(k_vec, state), is of the state before it "
            f"decays by '{formula(decay)}'",
        )
    return erase


def _query(graph: VariantGraph) -> tuple[sympy.Expr, sympy.Expr]:
    """The factors of dot(q_vec, state): one that is the same for the whole call, and one of the token."""
    terms = _terms(graph, "out")
    if set(terms) != {(_READ,)}:
        other = next((c * sympy.Mul(*p) for p, c in terms.items() if p != (_READ,)), sympy.S.Zero)
        _refuse(graph, "out", f"'{formula(other)}' is no factor times dot(q_vec, state)")
    constant, row = sympy.S.One, sympy.S.One
    for factor in sympy.Mul.make_args(terms[_READ,]):
        whole = level(factor) == Level.PROGRAM and not factor.atoms(Read) and not factor.free_symbols & _INDICES
        constant, row = (constant * factor, row) if whole else (constant, row * factor)
    if sym.COMPONENT in row.free_symbols:
        _refuse(graph, "out", f"the factor '{formula(row)}' is one of each channel")
    return constant, row


_INDICES = {sym.B, sym.H, sym.H_KV, sym.KV_IDX}


def _proof(
    decay: sympy.Expr, step: sympy.Expr | None, erase: sympy.Expr, write: sympy.Expr, query: sympy.Expr
) -> tuple[str, ...]:
    """The steps of the proof, as text."""
    kept = "" if step is None else f"({formula(decay)}) * "
    added = ("" if write == 1 else f"({formula(write)}) * ") + "k v'"
    read = ("" if query == 1 else f"({formula(query)}) * ") + "q state_t"
    lines = ["the update is affine in the state: what is kept of it, and k v' times a factor of the token"]
    if step is not None:
        lines.append(f"log of what token t leaves of the state: {formula(step)}")
    if erase == 0:
        return (*lines, f"state_t = {kept}state_(t-1) + {added}", f"out_t = {read}")
    return (
        *lines,
        "and what its key finds there is taken away: the state is multiplied by a matrix of rank one beside I",
        f"state_t = {kept}(I - ({formula(erase)}) * k k') state_(t-1) + {added}",
        f"out_t = {read}",
        f"a chunk at once: T = (I + A)^-1, A_ij = ({formula(erase)}) * (k_i . k_j) exp(D_i - D_j) for j < i, and its "
        "tokens add T (write v - erase exp(D) k state)",
    )
