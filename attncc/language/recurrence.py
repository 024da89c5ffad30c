"""Recurrences: variants in which a state goes from token to token, and that are no sum over independent pairs.

    def update(state, k_vec, v_vec, b, h, kv_idx, beta, g):     # the gated delta rule
        kept = ac.exp(g[b, h, kv_idx]) * state
        return kept + beta[b, h, kv_idx] * k_vec * (v_vec - ac.dot(k_vec, kept))

    ac.Variant(recurrence=ac.recurrence(update), inputs={"beta": ..., "g": ...})

The state is a matrix with a row per component of k_vec and q_vec, and a column per component of v_vec. Formulas are
elementwise: k_vec * v_vec is the outer product, and dot(k_vec, state) contracts the rows, which leaves a vector like
v_vec.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attncc.errors import Span, SpecError
from attncc.ir import symbols as sym
from attncc.ir.graph import InputDecl, ScalarDecl, Stage, VariantGraph
from attncc.ir.similarity import is_vector
from attncc.ir.text import formula
from attncc.ir.verify import verify
from attncc.language.functions import dot
from attncc.language.stages import SEES_STATE, environment
from attncc.language.values import Value, fail, number

#: a function of a recurrence from the names it sees to its value, and where it is
Evaluator = tuple[Callable[[dict[str, Any]], Any], Span | None]
#: what a recurrence's functions become in the graph
_STAGES = {"state": ("update", "scan"), "out": ("out", "read")}


def read(q_vec: Any, state: Any, scale: Any) -> Any:
    """The default output of a recurrence: scale * dot(q_vec, state)."""
    return scale * dot(q_vec, state)


class Recurrence:
    """The functions of a recurrence. See `recurrence`."""

    def __init__(self, state: Callable[..., Any], out: Callable[..., Any]):
        self.functions = {"state": state, "out": out}


def recurrence(state: Callable[..., Any], out: Callable[..., Any] = read) -> Recurrence:
    """A state from token to token, and what is read of it.

    state: from the state before a token, k_vec and v_vec to the one behind it; out: from that and q_vec to the token's
    row of the output. Both may use b, h, h_kv, kv_idx (the token), kv_len, num_heads and the variant's inputs.
    """
    for name, function in (("state", state), ("out", out)):
        if not callable(function):
            raise SpecError(f"the {name} of a recurrence is {type(function).__name__}, not a function", stage=name)
    return Recurrence(state, out)


def assemble_recurrence(
    name: str,
    inputs: Mapping[str, InputDecl],
    scalars: Mapping[str, ScalarDecl],
    evaluate: Mapping[str, Evaluator],
    cites: str = "",
) -> VariantGraph:
    """Run both functions on the names they see and build the verified graph. Raises SpecError where one is wrong."""
    given = environment(inputs, scalars, vectors=True)
    if "state" in given:
        raise SpecError("the input name 'state' already means something else", remedy="rename the input")
    values = {s.name: Value(s) for s in (sym.STATE, sym.Q_VEC, sym.K_VEC, sym.V_VEC, sym.SCALE)}
    stages = []
    for key, (function, span) in evaluate.items():
        hidden = set(sym.INDICES) - set(SEES_STATE[key])
        seen = {n: v for n, v in given.items() if n not in hidden}
        seen |= {n: values[n] for n in SEES_STATE[key] if n in values}
        try:
            expr = _checked(key, number(function(seen)))
        except SpecError as error:
            raise error.at(span, key) from None
        stage, op = _STAGES[key]
        stages.append(Stage(stage, expr, op, span))
    names = {s.name for stage in stages for s in stage.expr.free_symbols}
    for unused in sorted({*inputs, *scalars} - names):
        raise SpecError(f"'{unused}' is declared, but the recurrence does not read it", remedy="read it, or drop it")
    graph = VariantGraph(name, stages, inputs.values(), scalars.values(), cites)
    verify(graph)
    return graph


def _checked(key: str, expr: Any) -> Any:
    """A state has rows and columns, an output columns alone."""
    if key == "state" and not (is_vector(expr) and expr.has(sym.V_VEC)):
        fail(
            f"'{formula(expr)}' is no matrix with a row a component of k_vec and a column a component of v_vec",
            "the outer product is k_vec * v_vec, and what is kept is a factor times state",
        )
    if key == "out" and (is_vector(expr) or not expr.has(sym.STATE)):
        fail(f"'{formula(expr)}' is no row of values read of the state", "write scale * dot(q_vec, state)")
    return expr
