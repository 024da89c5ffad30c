"""Distances taken apart by tile: the same number, with one addition a pair."""

from __future__ import annotations

import random

import pytest
import sympy

import attncc as ac
from attncc.codegen.offsets import KV_IN_TILE, Q_IN_TILE, TILE_SHIFT, split_distances
from attncc.codegen.plan import Plan
from attncc.codegen.render import render
from attncc.ir import symbols as sym

X = sympy.Symbol("x", real=True)
SLOPE = sympy.Symbol("slope", real=True)
DISTANCE = sym.KV_IDX - sym.Q_IDX


@pytest.mark.parametrize(
    "expr",
    [
        SLOPE * DISTANCE,
        X + SLOPE * (DISTANCE + sym.Q_LEN - sym.KV_LEN),
        sympy.exp(X - SLOPE * 3 * (sym.Q_IDX - sym.KV_IDX)),
        X * sympy.tanh(SLOPE * (2 * sym.KV_IDX - 2 * sym.Q_IDX + 7)),
    ],
    ids=str,
)
def test_the_value_is_the_same(expr):
    split = split_distances(expr)
    assert TILE_SHIFT in split.free_symbols
    assert not split.free_symbols & {sym.Q_IDX, sym.KV_IDX}
    draw = random.Random(0)
    for _ in range(10):
        q, kv = draw.randrange(4096), draw.randrange(4096)
        q_start, kv_start = q // 64 * 64, kv // 32 * 32
        at = {sym.Q_IDX: q, sym.KV_IDX: kv, sym.Q_LEN: 100, sym.KV_LEN: 333, X: 0.3, SLOPE: 2.0**-9}
        tile = {Q_IN_TILE: q - q_start, KV_IN_TILE: kv - kv_start, TILE_SHIFT: kv_start - q_start}
        assert float(split.subs({**at, **tile})) == pytest.approx(float(expr.subs(at)), rel=1e-12)


@pytest.mark.parametrize(
    "expr",
    [
        SLOPE * sym.KV_IDX,  # no distance
        SLOPE * (sym.KV_IDX + sym.Q_IDX),
        SLOPE * (2 * sym.KV_IDX - sym.Q_IDX),
        X * sym.Q_IDX * DISTANCE,  # the factor varies by row
        sympy.Abs(DISTANCE) * SLOPE,
    ],
    ids=str,
)
def test_what_is_no_multiple_of_a_distance_stays(expr):
    assert split_distances(expr) == expr


def test_alibi_pays_one_addition_a_pair():
    text = render(Plan(ac.variants.get("alibi").graph), 64, 64, True, tma=True)
    for kernel in ("dkdv", "dq"):
        body = text[text.index(f"def {kernel}_kernel") :]
        assert "tile_shift = " in body[: body.index("tl.exp2")]
        assert "(qk * scale_log2) + product_1[" in body
    assert "tile_shift" not in render(Plan(ac.variants.get("causal").graph), 64, 64, True, tma=True)
    assert "tile_shift" not in render(Plan(ac.variants.get("alibi").graph), 64, 64, True)
