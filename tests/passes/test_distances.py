"""Which parts of a formula become tables by distance, and that they say the same."""

from __future__ import annotations

import numpy as np
import pytest
import sympy

import attncc as ac
from attncc.codegen.plan import Plan
from attncc.ir import symbols as sym
from attncc.ir.vocabulary import ByDistance, Read, where
from attncc.passes.distances import DISTANCE, tables_of
from attncc.passes.numeric import evaluate

GRAPH = ac.Variant(
    score=lambda score, h, q_idx, kv_idx, w, rows: score + w[h, kv_idx - q_idx] + rows[h, q_idx],
    inputs={"w": ac.Input("h", "distance"), "rows": ac.Input("h", "q_idx")},
).graph
W, ROWS = (sym.input_symbol(name, False) for name in ("w", "rows"))
Q, K, SCORE = sym.Q_IDX, sym.KV_IDX, sym.SCORE


def of(name):
    return Plan(ac.variants.get(name).graph)


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("t5_bias", 1, 1),
        ("relative_bias", 1, 1),
        ("faceformer", 1, 1),
        ("bam", 1, 1),
        ("afa", 2, 2),  # its derivatives would have nineteen
        ("alibi", 0, 0),  # a multiplication is less than a load
        ("causal", 0, 0),
        ("dense_bias", 0, 0),
        ("sliding_window", 0, 0),
    ],
)
def test_what_has_tables(name, forward, backward):
    plan = of(name)
    assert len(plan.score_tables.formulas) == forward
    assert len(plan.tables.formulas) == backward
    assert plan.tables.formulas[:forward] == plan.score_tables.formulas


@pytest.mark.parametrize(
    "expr",
    [
        Read(W, sym.H, K - Q) + SCORE,
        2 * Read(W, sym.H, K - Q) + Read(W, sym.H, Q - K + 1) + SCORE,
        SCORE * Read(W, sym.H, K - Q) * sympy.exp(K - Q),
        sympy.exp(Read(W, sym.H, K - Q) + SCORE),
        Read(W, sym.H, K - Q) + Read(ROWS, sym.H, Q),
    ],
)
def test_a_table_says_the_same(expr):
    tables = tables_of([expr], GRAPH)
    assert len(tables.formulas) == 1
    assert tables.by_head
    assert not tables.by_batch
    assert not {Q, K} & tables.of_distance[0].free_symbols
    apart = tables.apart(expr)
    (entry,) = apart.atoms(ByDistance)
    assert not any({Q, K} & r.free_symbols == {Q, K} for r in apart.atoms(Read))
    env = {"h": 1, "score": 0.7, "w": np.random.default_rng(0).random((2, 40)), "rows": np.ones((2, 40))}
    for q, k in ((3, 9), (0, 0), (2, 5)):
        value = evaluate(tables.of_distance[0], {**env, DISTANCE.name: k - q})
        found = evaluate(apart.xreplace({entry: sympy.Float(float(value))}), {**env, "q_idx": q, "kv_idx": k})
        assert float(found) == pytest.approx(float(evaluate(expr, {**env, "q_idx": q, "kv_idx": k})))


def test_tritons_kernels_read_what_they_would_read_anyway():
    assert of("t5_bias").tables.read.count == 1
    for name in ("bam", "faceformer"):
        plan = of(name)
        assert plan.tables.count == 1
        assert plan.tables.read.count == 0
        assert plan.tables.read.apart(plan.folded.score) == plan.folded.score


@pytest.mark.parametrize(
    "expr",
    [
        SCORE + K - Q,
        Read(W, sym.H, K - 2 * Q) + SCORE,
        Read(W, sym.H, K) + SCORE,
        sympy.exp(SCORE * (K - Q)),
        Read(ROWS, sym.H, Q) * sympy.exp(K - Q),
        where(sympy.Or(Q > 2 * K, Q > 5), sympy.Float(0.5), sympy.Float(1.0)) + SCORE,
    ],
)
def test_what_is_no_table(expr):
    tables = tables_of([expr], GRAPH)
    assert tables.formulas == ()
    assert tables.apart(expr) == expr
