"""Query heads that share a key head: dK and dV visit the tiles of all of them in one loop, or of each in a loop of its
own where its bounds or its sums are its own."""

from __future__ import annotations

import pytest

import attncc as ac
from attncc.codegen.plan import Plan
from attncc.runtime.modules import Features
from attncc.runtime.verify import Shape, verify_variant

# several blocks of keys and of queries, the last of each cut; three query heads a key head
SHAPE = Shape(1, 3, 1, 35, 67, 16, 24)

BY_HEAD = ac.Input("h", dtype="int")
ONE_LOOP = {
    "causal": ac.Variant(mask=ac.causal),
    "slopes": ac.Variant(score=ac.alibi(), mask=ac.causal & ac.window(40, 0)),
    "head number": ac.Variant(score=lambda score, h, h_kv: score * (1 + h) / (2 + h_kv)),
    "mask that no bound sees": ac.Variant(mask=lambda q_idx, kv_idx, h: (q_idx + kv_idx + h) % 3 != 0),
    "documents": ac.Variant(mask=ac.causal & ac.document()),
    "key bias": ac.Variant(
        score=lambda score, h, kv_idx, bias: score + bias[h, kv_idx], inputs={"bias": ac.Input("h", "kv_idx")}
    ),
}
NESTED = {
    "window of each head": ac.Variant(
        mask=lambda q_idx, kv_idx, h, reach: q_idx - kv_idx < reach[h], inputs={"reach": BY_HEAD}
    ),
    "gradient of a key bias": ac.Variant(
        score=lambda score, h, kv_idx, bias: score + bias[h, kv_idx],
        inputs={"bias": ac.Input("h", "kv_idx", grad=True)},
        mask=ac.causal,
    ),
}


def failures(rows):
    return [f"{row.shape} {row.check} repeatable={row.repeatable}" for row in rows if not row.ok]


@pytest.mark.parametrize("name", ONE_LOOP)
def test_one_loop(name):
    assert Plan(ONE_LOOP[name].graph).one_loop
    assert failures(verify_variant(ONE_LOOP[name], shapes=[SHAPE])) == []


@pytest.mark.parametrize("name", NESTED)
def test_a_loop_for_each_head(name):
    assert not Plan(NESTED[name].graph).one_loop
    assert failures(verify_variant(NESTED[name], shapes=[SHAPE])) == []


def test_the_loop_is_one_where_it_can_be():
    one, nested = (
        ac.compile(variant).engine.modules.source(Features(16, 16))
        for variant in (ONE_LOOP["causal"], NESTED["window of each head"])
    )
    assert "for turn in tl.range(0, tiles * GROUP)" in one
    assert "for in_group in tl.range(0, GROUP)" in nested
