"""Tile plans, live-tile counts and interval arithmetic against brute force over all pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

import attncc as ac
from attncc.errors import AttnccError
from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc
from attncc.ir.graph import VariantGraph
from attncc.language.textform import from_texts
from attncc.passes.counts import live_tiles
from attncc.passes.intervals import Interval, interval, truth
from attncc.passes.numeric import evaluate
from attncc.passes.tiles import (
    INNER_HI,
    INNER_LO,
    OUTER_HI,
    OUTER_LO,
    BlockMax,
    BlockMin,
    TilePlan,
    hides_what_lies_past_the_keys,
    tile_plan,
)

HEADS, BATCH = 3, 2
SIZES = [(17, 17), (7, 23), (23, 7), (1, 9)]
BLOCKS = [(4, 4), (8, 3), (3, 8), (32, 5)]
#: no tile is visited in vain, and none that could be whole is masked
EXACT = {
    "full": ac.full,
    "causal": ac.causal,
    "causal from the start": ac.causal(align="start"),
    "sliding window": ac.causal & ac.sliding_window(5),
    "window": ac.window(4, 2),
    "prefix": ac.prefix(6),
    "causal or prefix": ac.causal | ac.prefix(6),
    "prefix by batch": ac.causal | ac.prefix("lengths"),
    "padding and window": ac.padding("lengths") & ac.window(6, 1),
    "future": ~ac.causal,
    "not a window": ~ac.window(3, 2),
    "impossible": ac.causal & ~ac.causal,
    "one diagonal": lambda q_idx, kv_idx: q_idx == kv_idx,
    "one key": lambda kv_idx: kv_idx == 5,
    "by head": lambda h, q_idx, kv_idx: (q_idx - kv_idx < 2 + 3 * h) & (q_idx >= kv_idx),
    "some heads see all": lambda h, q_idx, kv_idx: (h == 1) | (q_idx >= kv_idx),
    "every second key": lambda q_idx, kv_idx: 2 * kv_idx <= q_idx,
    "each key twice": lambda q_idx, kv_idx: kv_idx <= 2 * q_idx + 1,
    "open gates": lambda b, h, q_idx, gate: gate[b, h, q_idx] != 0,
}
SOUND = {
    "block diagonal": ac.block_diagonal(5),
    "few keys each": lambda q_idx, kv_idx, size: kv_idx // size == q_idx,
    "few keys a block": lambda q_idx, kv_idx, size: (kv_idx + 1) // size <= q_idx // 3,
    "causal blocks": lambda q_idx, kv_idx: kv_idx // 4 <= q_idx // 4,
    "blocks of two sizes": lambda q_idx, kv_idx: (kv_idx + 1) // 3 < (q_idx + 2) // 5,
    "dilated": ac.dilated(3) & ac.causal,
    "not dilated": ~ac.dilated(3),
    "distance": lambda q_idx, kv_idx: ac.abs(q_idx - kv_idx) < 4,
    "not a key": lambda q_idx, kv_idx: (kv_idx != 4) & (kv_idx <= q_idx),
    "document": ac.document("doc"),
    "causal document": ac.causal & ac.document("doc"),
    "other documents": ~ac.document("doc"),
    "document or prefix": ac.document("doc") | ac.prefix(3),
    "types of tokens": lambda b, q_idx, kv_idx, doc: (doc[b, kv_idx] >= 2) & (doc[b, q_idx] < 4) | (kv_idx <= q_idx),
    "many terms": ac.window(1, 1) | ac.prefix(2) | ac.block_diagonal(4) | ac.dilated(5) | (lambda kv_idx: kv_idx == 11),
    "product": lambda q_idx, kv_idx: q_idx * kv_idx < 30,
    "causal and open": lambda b, h, q_idx, kv_idx, gate: (kv_idx <= q_idx) & (gate[b, h, q_idx] > 0.5),
    "keys or queries": lambda b, h, q_idx, kv_idx, gate: (gate[b, 0, kv_idx] != 0) | ~(gate[b, h, q_idx] == 0),
    "as many": lambda b, h, q_idx, kv_idx, gate: gate[b, 0, kv_idx] == gate[b, h, q_idx],
}
DOC = {"doc": ac.Input("b", "kv_idx", dtype="int")}
SIZE = {"size": ac.Scalar(2)}
GATE = {"gate": ac.Input("b", "h", "q_idx")}
INPUTS = {
    "types of tokens": DOC,
    **dict.fromkeys(("few keys each", "few keys a block"), SIZE),
    **dict.fromkeys(("open gates", "causal and open", "keys or queries", "as many"), GATE),
}
MASKS = EXACT | SOUND


def graph_of(name: str) -> VariantGraph:
    return ac.Variant(mask=MASKS[name], inputs=INPUTS.get(name, {})).graph


def environment(q_len: int, kv_len: int, b: int, h: int) -> dict[str, Any]:
    """Everything but the indices of the pair."""
    generator = np.random.default_rng(0)
    doc = np.sort(generator.integers(0, 6, (BATCH, kv_len)), -1)
    doc[1] = generator.permutation(doc[1])
    lengths = np.array([3, 8])
    gate = generator.random((BATCH, HEADS, 32)) * (np.arange(32) // 4 % 3 > 0)
    return {
        "q_len": q_len,
        "kv_len": kv_len,
        "num_heads": HEADS,
        "b": b,
        "h": h,
        "h_kv": h,
        "doc": doc,
        "lengths": lengths,
        "gate": gate,
        "size": 2,
    }


class Block:
    """One block of the outer axis under a plan, with numbers in it."""

    def __init__(self, plan: TilePlan, env: dict[str, Any], lo: int, hi: int):
        self.plan, self.env = plan, {**env, OUTER_LO.name: lo, OUTER_HI.name: hi}
        self.known = self._extremes(plan.outer_reads, plan.outer, lo, hi)

    def _extremes(self, reads: Any, axis: sympy.Symbol, lo: int, hi: int) -> dict[Any, Any]:
        found = {}
        for read in reads:
            values = evaluate(read, {**self.env, axis.name: np.arange(lo, hi + 1)})
            found[BlockMin(read)], found[BlockMax(read)] = sympy.Integer(values.min()), sympy.Integer(values.max())
        return found

    def value(self, expr: Any, more: dict[Any, Any] | None = None, **env: int) -> int:
        return int(evaluate(expr.xreplace({**self.known, **(more or {})}), {**self.env, **env}))

    def tile(self, lo: int, hi: int, length: int) -> tuple[bool, bool]:
        """Does the plan visit the tile [lo, hi], and does it call it whole?"""
        live = full = False
        last = min(hi, length - 1)
        extremes = self._extremes(self.plan.summaries, self.plan.inner, lo, last)
        box = {INNER_LO.name: lo, INNER_HI.name: last}
        for s in self.plan.segments:
            here = False
            if self.value(s.may):
                first, end = max(self.value(s.live.lo), 0), min(self.value(s.live.hi), length - 1)
                here = lo <= end and hi >= first and first <= end
            if s.scan is not None:
                here = here and bool(self.value(s.scan.may, extremes, **box))
                full |= here and last == hi and bool(self.value(s.scan.must, extremes, **box))
            elif s.full is not None and self.value(s.must):
                full |= max(self.value(s.full.lo), 0) <= lo and hi <= min(self.value(s.full.hi), length - 1)
            live |= here
        return live, live and full


def compare(mask: Any, plan: TilePlan, env: dict[str, Any], blocks: tuple[int, int], exact: bool) -> None:
    """Hold every tile of one head against the pairs themselves."""
    q_len, kv_len = env["q_len"], env["kv_len"]
    pairs = {**env, "q_idx": np.arange(q_len)[:, None], "kv_idx": np.arange(kv_len)}
    shown = np.broadcast_to(evaluate(mask, pairs), (q_len, kv_len))
    if plan.inner == sym.Q_IDX:
        shown, blocks = shown.T, blocks[::-1]
    outer_len, inner_len = shown.shape
    outer, inner = blocks
    for lo in range(0, outer_len, outer):
        block = Block(plan, env, lo, min(lo + outer, outer_len) - 1)
        for first in range(0, inner_len, inner):
            tile = shown[lo : lo + outer, first : first + inner]
            live, full = block.tile(first, first + inner - 1, inner_len)
            where = f"{plan.inner} {first}+{inner} of rows {lo}+{outer}, {q_len}x{kv_len}"
            assert live or not tile.any(), f"a visible pair is skipped: {where}"
            assert not full or (tile.all() and tile.shape[1] == inner), f"not whole: {where}"
            if exact:
                assert live == tile.any(), f"visited in vain: {where}"


@pytest.mark.parametrize("inner", [sym.KV_IDX, sym.Q_IDX], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_plans_hold_every_visible_pair(name, inner):
    graph = graph_of(name)
    mask = graph["mask"].expr
    plan = tile_plan(mask, inner)
    for (q_len, kv_len), blocks in zip(SIZES, BLOCKS, strict=True):
        for b, h in ((0, 0), (1, 1)):
            compare(mask, plan, environment(q_len, kv_len, b, h), blocks, name in EXACT)


def test_documents_in_order_skip_what_they_do_not_share():
    graph = graph_of("causal document")
    plan = tile_plan(graph["mask"].expr, sym.KV_IDX)
    env = environment(24, 24, 0, 0) | {"doc": np.repeat(np.arange(3), 8)[None]}
    tiles = [Block(plan, env, q, q + 3).tile(k, k + 3, 24) for q in range(0, 24, 4) for k in range(0, 24, 4)]
    assert sum(live for live, _ in tiles) == 9
    assert sum(full for _, full in tiles) == 3


def test_each_term_of_a_mask_has_its_own_range():
    """Documents that see a prefix and themselves: nothing of what lies between."""
    graph = ac.variants.get("parallel_context").graph
    plan = tile_plan(graph["mask"].expr, sym.KV_IDX)
    env = environment(32, 32, 0, 0) | {"segment": np.repeat(np.arange(4), 8)[None], "query": np.array([9])}
    tiles = [[Block(plan, env, q, q + 3).tile(k, k + 3, 32) for k in range(0, 32, 4)] for q in range(0, 32, 4)]
    assert [[k for k, (live, _) in enumerate(row) if live] for row in tiles] == [
        *([0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [0, 1, 6], [0, 1, 6, 7]),
    ]
    assert [sum(full for _, full in row) for row in tiles] == [0, 1, 2, 3, 2, 3, 2, 3]


@pytest.mark.parametrize("inner", [sym.KV_IDX, sym.Q_IDX], ids=str)
@pytest.mark.parametrize("size", [-3, -1, 1, 3])
def test_a_divisor_of_any_sign(size, inner):
    mask = graph_of("few keys each")["mask"].expr
    plan = tile_plan(mask, inner)
    env = environment(13, 29, 0, 0) | {"size": size}
    compare(mask, plan, env, (4, 3), exact=False)
    if size > 0:
        tiles = [Block(plan, env, i, i + 3).tile(j, j + 3, 29) for i in range(0, 13, 4) for j in range(0, 29, 4)]
        assert sum(live for live, _ in tiles) <= 8  # of 32


READLESS = [name for name in EXACT if name not in ("prefix by batch", "padding and window", "open gates")]


@pytest.mark.parametrize("inner", [sym.KV_IDX, sym.Q_IDX], ids=str)
@pytest.mark.parametrize("name", READLESS)
def test_live_tiles_are_those_of_the_mask(name, inner):
    graph = graph_of(name)
    plan = tile_plan(graph["mask"].expr, inner)
    for (q_len, kv_len), (block_m, block_n) in zip(SIZES, BLOCKS, strict=True):
        env = environment(q_len, kv_len, 0, HEADS // 2)
        pairs = {**env, "q_idx": np.arange(q_len)[:, None], "kv_idx": np.arange(kv_len)}
        shown = np.broadcast_to(evaluate(graph["mask"].expr, pairs), (q_len, kv_len))
        tiles = [
            shown[i : i + block_m, j : j + block_n] for i in range(0, q_len, block_m) for j in range(0, kv_len, block_n)
        ]
        axis, block = (1, block_n) if inner == sym.KV_IDX else (0, block_m)
        whole = sum(t.all() and t.shape[axis] == block for t in tiles)
        found = live_tiles(plan, graph, HEADS, q_len, kv_len, {})(block_m, block_n)
        assert found.total == len(tiles)
        live, blocks = sum(t.any() for t in tiles), -(-kv_len // block_n) if axis == 0 else -(-q_len // block_m)
        # a block that sees nothing may visit the tile that its empty range begins in
        assert live <= found.full + found.mixed <= live + blocks * (name not in ("full", "causal", "prefix"))
        assert found.full <= whole
        if name not in ("some heads see all", "causal or prefix"):  # a tile may be whole by two terms together
            assert found.full == whole


def test_live_tiles_take_the_scalars_of_the_call():
    graph = ac.variants.get("sliding_window").graph
    plan = tile_plan(graph["mask"].expr, sym.KV_IDX)
    count = [live_tiles(plan, graph, 1, 64, 64, {"window": w})(8, 8) for w in (1, 9, 64)]
    assert [c.full + c.mixed for c in count] == [8, 15, 36]


NUMBERS = st.integers(-6, 6)
PAIR = st.sampled_from(
    ["q_idx", "kv_idx", "q_idx - kv_idx", "kv_idx - q_idx", "2 * kv_idx - q_idx", "q_idx + 3 * kv_idx"]
)
TERMS = st.builds("({} + {})".format, PAIR, NUMBERS) | st.builds(
    "(({} + {}) // {})".format, PAIR, NUMBERS, st.integers(1, 5)
)
ATOMS = st.one_of(
    st.builds("{} {} {}".format, TERMS, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), TERMS | NUMBERS.map(str)),
    st.builds("({}) % {} == {}".format, PAIR, st.integers(2, 4), st.integers(0, 2)),
    st.builds("abs({}) < {}".format, PAIR, st.integers(1, 6)),
    st.builds("h < {}".format, st.integers(0, 2)),
    st.builds("kv_idx <= q_idx + kv_len - q_len + {}".format, NUMBERS),
)
CONDITIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds("({} and {})".format, inner, inner),
        st.builds("({} or {})".format, inner, inner),
        st.builds("(not ({}))".format, inner),
    ),
    max_leaves=4,
)


@settings(max_examples=80, deadline=None)
@given(CONDITIONS, st.tuples(st.integers(1, 14), st.integers(1, 14)), st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_random_masks(text, sizes, blocks):
    mask = from_texts(mask=text).graph["mask"].expr
    for inner in (sym.KV_IDX, sym.Q_IDX):
        compare(mask, tile_plan(mask, inner), environment(*sizes, 0, 1), blocks, exact=False)
    if hides_what_lies_past_the_keys(mask):
        past = {"q_idx": np.arange(sizes[0])[:, None], "kv_idx": sizes[1] + np.arange(40)}
        assert not np.any(evaluate(mask, environment(*sizes, 0, 1) | past))


@pytest.mark.parametrize(
    ("text", "hides"),
    [
        ("kv_idx <= q_idx + kv_len - q_len", True),
        ("q_idx + kv_len - q_len > kv_idx and kv_idx % 3 == 0", True),
        ("kv_idx <= q_idx + kv_len - q_len or kv_idx < kv_len - 2", True),
        ("kv_idx - q_idx < kv_len - q_len - 3", True),
        ("kv_idx <= q_idx", False),  # there may be more queries than keys
        ("kv_idx <= q_idx + kv_len - q_len or kv_idx < 5", False),
        ("kv_idx <= kv_len - q_idx", False),
        ("kv_idx >= q_idx", False),
    ],
)
def test_a_mask_that_ends_with_the_keys_needs_no_edge_of_theirs(text, hides):
    assert hides_what_lies_past_the_keys(from_texts(mask=text).graph["mask"].expr) == hides


VALUES = st.recursive(
    TERMS | st.just("h"),
    lambda inner: st.one_of(
        st.builds("({} + {})".format, inner, inner),
        st.builds("({} * {})".format, NUMBERS, inner),
        st.builds("abs({})".format, inner),
        st.builds("({} // {})".format, inner, st.integers(1, 5)),
        st.builds("({} % {})".format, inner, st.integers(1, 5)),
        st.builds("maximum({}, {})".format, inner, inner),
        st.builds("minimum({}, {})".format, inner, inner),
        st.builds("({} if {} else {})".format, inner, ATOMS, inner),
    ),
    max_leaves=4,
)
BOX = {sym.Q_IDX: Interval(OUTER_LO, OUTER_HI), sym.KV_IDX: Interval(INNER_LO, INNER_HI)}
RANGES = st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(0, 9), st.integers(1, 5))


def over(ranges):
    """The pairs of a box, and its ends."""
    q, rows, k, cols = ranges
    env = environment(20, 20, 0, 1)
    ends = {OUTER_LO.name: q, OUTER_HI.name: q + rows - 1, INNER_LO.name: k, INNER_HI.name: k + cols - 1}
    return {**env, "q_idx": np.arange(q, q + rows)[:, None], "kv_idx": np.arange(k, k + cols)}, {**env, **ends}


@settings(max_examples=80, deadline=None)
@given(VALUES, RANGES)
def test_intervals_hold_every_value(text, ranges):
    expr = from_texts(score=f"score + ({text})").graph["score"].expr - sym.RAW_SCORE
    found = interval(expr, BOX, lambda read: None)
    if found is not None:
        pairs, ends = over(ranges)
        values = evaluate(expr, pairs)
        assert evaluate(found.lo, ends) <= values.min()
        assert values.max() <= evaluate(found.hi, ends)


@settings(max_examples=80, deadline=None)
@given(CONDITIONS, RANGES)
def test_truth_holds_over_the_box(text, ranges):
    condition = from_texts(mask=text).graph["mask"].expr
    found = truth(condition, BOX, lambda read: None)
    pairs, ends = over(ranges)
    shown = evaluate(condition, pairs)
    assert evaluate(found.may, ends) or not shown.any()
    assert shown.all() or not evaluate(found.must, ends)


def test_intervals_are_exact_where_each_index_occurs_once():
    expr = voc.floordiv(3 * sym.Q_IDX - 2 * sym.KV_IDX, sympy.Integer(4))
    found = interval(expr, BOX, lambda read: None)
    assert found == Interval(
        voc.floordiv(3 * OUTER_LO - 2 * INNER_HI, sympy.Integer(4)),
        voc.floordiv(3 * OUTER_HI - 2 * INNER_LO, sympy.Integer(4)),
    )


def test_a_value_of_a_product_of_indices_is_unknown():
    assert interval(sym.Q_IDX * sym.KV_IDX, BOX, lambda read: None) is None
    assert not truth(sym.Q_IDX * sym.KV_IDX < 4, BOX, lambda read: None).informative


def test_a_mask_of_another_type_is_no_mask():
    with pytest.raises(AttnccError):
        from_texts(mask="q_idx + kv_idx")
