"""What is printed can be read again, and identifies the mathematics."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import sympy

import attncc as ac
from attncc.ir.text import formula, to_text
from attncc.language.expression import Source, stage_function
from attncc.language.stages import Row, environment
from attncc.language.textform import from_texts
from attncc.language.values import Value, lift


def read_again(graph, stage):
    """The expression of a printed formula: every name of the graph means its own symbol."""
    text, rows = formula(stage.expr), []
    env = environment({d.name: d for d in graph.inputs}, {s.name: s for s in graph.scalars}, vectors=True)
    symbols = {s for stage in graph.stages for s in stage.expr.free_symbols}
    env |= {s.name: Value(s) for s in symbols if s.name not in env}
    env["row"] = Row(rows)
    expr = lift(stage_function(Source(text, "<printed>"), "score")(env)).expr
    return rows[-1].expr if stage.op == "root" else expr


AWKWARD = [
    ac.Variant(name=f"awkward {i}", score=score, mask=mask)
    for i, (score, mask) in enumerate(
        [
            (lambda score, q_idx, kv_idx: score + 2 * (q_idx // 3) - (kv_idx % 4) // 2, True),
            (lambda score, q_idx: score / (1 + q_idx // 2), True),
            (lambda score: ac.sqrt(score**2 + 1e-6) / 3 - score**-2 + 2**score, True),
            (lambda score, q_idx: -((-q_idx) // 5) * score - (q_idx * 2 % 7) ** 2, True),
            (lambda score, q_idx: ac.where(q_idx > 3, ac.abs(score), ac.to_float(q_idx)) + ac.to_int(score > 1), True),
            (lambda score: ac.gelu(score) + ac.silu(-score) * ac.softplus(score) - ac.erf(0.25 * score), True),
            (
                lambda score: score,
                lambda q_idx, kv_idx: ~((q_idx < 3) & (kv_idx > 2) | (q_idx == kv_idx)) & (q_idx != 7),
            ),
            (lambda score: score, lambda q_idx, kv_idx: ((q_idx < 3) | (kv_idx > 2)) & ((q_idx > 5) | (kv_idx < 9))),
        ]
    )
]


@pytest.mark.parametrize(
    "variant", [*(ac.variants.get(n) for n in ac.variants.names()), *AWKWARD], ids=lambda v: v.name
)
def test_printed_formulas_are_read_back_as_the_same_expressions(variant):
    for part in variant.graph.parts:
        for stage in part.stages:
            # sympy adds the exponents of a product that it reads
            assert sympy.powsimp(read_again(part, stage)) == sympy.powsimp(stage.expr)


def test_integer_division_prints_with_the_parentheses_it_needs():
    graph = from_texts(score="score + 2*(q_idx // 3) + (2*q_idx) // 3 - (q_idx + 1) % (kv_idx + 2)").graph
    assert formula(graph["score"].expr) == "raw_score + 2*(q_idx // 3) + (2*q_idx) // 3 - ((q_idx + 1) % (kv_idx + 2))"


def test_the_whole_graph_as_text():
    assert to_text(ac.variants.get("alibi").graph).splitlines() == [
        f'variant "alibi"  # digest {ac.variants.get("alibi").graph.digest}',
        "  input  slopes[h] : float grad",
        "  input  qk = dot(q_vec, k_vec) : float",
        "  raw_score = qk*scale  : float, a pair",
        "  score     = raw_score + (kv_idx + q_len - kv_len - q_idx)*slopes[h]  : float, a pair",
        "  mask      = kv_idx <= kv_len + q_idx - q_len  : bool, a pair",
        "  row_max_0 = row.max(score)  : float, a row",
        "  row_sum_0 = row.sum(exp(score - row_max_0))  : float, a row",
        "  weight    = exp(score - row_max_0)/row_sum_0  : float, a pair",
        "  out       = row.sum(v_vec*weight)  : vector, a row",
    ]


def test_the_digest_is_of_the_mathematics():
    first = ac.Variant(name="a", score=lambda score, h: score * h, cites="x").graph
    second = ac.Variant(name="b", score=lambda h, score: h * score, inputs={}).graph
    assert first.digest == second.digest
    assert first == second
    assert hash(first) == hash(second)
    assert first != ac.Variant(score=lambda score, h: score + h).graph
    different = {ac.variants.get(n).graph.digest for n in ac.variants.names()}
    assert len(different) == len(ac.variants.names()) - 1  # softcap and Gemma 2's global layers are one formula


def test_a_scalars_default_is_no_part_of_the_digest_but_its_type_is():
    def window(default):
        return ac.Variant(
            inputs={"w": ac.Scalar(default)}, mask=lambda q_idx, kv_idx, w: q_idx - kv_idx < w
        ).graph.digest

    assert window(3) == window(4)
    assert window(3) != window(3.0)


def test_the_digest_is_the_same_in_every_process():
    code = "import attncc as ac; print([ac.variants.get(n).graph.digest for n in ac.variants.names()])"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {f"{[ac.variants.get(n).graph.digest for n in ac.variants.names()]}\n"}
