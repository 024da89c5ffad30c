"""The hopper suite: which cells it has, and how it judges a row."""

from bench.ours import tile
from bench.suites import hopper
from bench.suites.hopper import OWN, cells, judge, peers

ROW = {"attncc": {"ms": 1.0, "tflops": 500.0, "spread": 0.0}, "peers": {}, "ratio": {}}


def test_the_cells_are_those_of_the_table():
    found = list(cells())
    plain = {(c.case.name, c.shape.d, c.shape.m) for c in found if c.case.name in ("full", "causal")}
    assert plain == {(n, d, m) for n in ("full", "causal") for d in (64, 128, 256) for m in (2048, 8192)}
    assert {"alibi", "softcap", "window1024", "documents1024", *OWN} <= {c.case.name for c in found}
    assert {(c.shape.d, c.shape.dv) for c in found if c.case.name == "MLA"} == {(192, 128)}
    assert any(c.shape.m == 6000 for c in found)
    assert any((c.shape.h, c.shape.hkv) == (28, 4) for c in found)
    assert all(c.shape.b * c.shape.m <= 32768 for c in found)


def test_flex_runs_where_a_ratio_to_it_is_wanted():
    assert all(("flex" in peers(c)) == c.flex for c in cells())
    assert all(("own softmax" in peers(c)) == (c.case.name in OWN) for c in cells())


def test_a_row_is_judged_by_the_best_peer_that_is_not_ours():
    row = {**ROW, "ratio": {"triton": 1.3, "cudnn": 1.1, "fa4": 0.97}}
    judge(row, 0.95)
    assert (row["goal"], row["reached"]) == (0.95, 0.97)


def test_where_nobody_ran_beside_it_nothing_is_said():
    row = {**ROW, "peers": {"flex": {"error": "..."}}, "ratio": {"triton": 1.3}}
    judge(row, 0.9)
    assert row["reached"] is None


def test_a_tiling_says_its_language():
    sizes = {"block_m": 64, "block_n": 128, "num_warps": 8, "num_stages": 2}
    assert tile({**sizes, "backend": "gluon"}) == "gluon:64x128/w8/s2"
    assert tile(sizes) == "64x128/w8/s2"


def test_whatever_compiles_is_compiled_ahead(monkeypatch):
    monkeypatch.setattr(hopper, "has_fa4", lambda: True)
    taken = list(cells())
    work = hopper.pieces(taken)
    assert len(set(work)) == len(work)
    assert {at for at, name in work if name == "attncc"} == set(range(len(taken)))
    assert all(name in ("attncc", *peers(taken[at])) and name != "cudnn" for at, name in work)
    # one kernel of its for all lengths
    widths = [(taken[at].case.name, taken[at].shape.d) for at, name in work if name == "fa4"]
    assert len(set(widths)) == len(widths)
    assert {d for _, d in widths} == {64, 96, 128, 192, 256}
