"""Compiling again: what two ops of one text share, and who is told to keep an op."""

import gc
import warnings
import weakref

import pytest
import torch

import attncc as ac
from attncc.errors import AttnccWarning
from attncc.runtime import compile as compiling
from attncc.runtime import modules
from attncc.schedule.cache import Cache


@pytest.fixture(autouse=True)
def counted_anew(monkeypatch):
    monkeypatch.setattr(compiling, "OFTEN", 5)
    compiling._compiled.clear()


def doubled():
    return ac.Variant(name="doubled", score=lambda score: 2 * score)


def test_who_compiles_in_a_loop_is_told_once_at_his_own_line():
    with pytest.warns(AttnccWarning, match="'doubled' was compiled 5 times at this line(.|\n)*compile once") as told:
        for _ in range(12):
            ac.compile(doubled())
    assert [w.filename for w in told] == [__file__]


def test_nobody_is_told_of_other_formulas_lines_or_schedules():
    tiles = ac.KernelSchedule(block_m=16, block_n=32, num_warps=4, num_stages=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for factor in range(2, 9):
            ac.compile(ac.Variant(score=lambda score, factor=factor: factor * score))
        for _ in range(4):
            ac.compile(doubled())
        for _ in range(4):
            ac.compile(doubled())
        for _ in range(7):
            ac.compile(doubled(), schedule=ac.Schedule(tiles, tiles, tiles, origin="user"))


def loaded(op):
    return list(op.engine.modules._loaded.values())


def test_ops_of_one_text_have_one_module_and_those_of_another_do_not():
    q = torch.randn(1, 2, 8, 16)
    first, second, other = (ac.compile(doubled()), ac.compile(doubled()), ac.compile("causal"))
    expected = first(q, q, q)
    assert torch.equal(second(q, q, q), expected)
    assert not torch.equal(other(q, q, q), expected)
    assert loaded(first)[0] is loaded(second)[0]
    assert loaded(first)[0] is not loaded(other)[0]
    assert first.engine is not second.engine


def test_a_module_is_shared_while_somebody_has_it_and_with_whom_has_the_same_cache(tmp_path):
    source = doubled_source()
    first = modules.load_module(source, "doubled", True, Cache(tmp_path))
    assert modules.load_module(source, "doubled", True, Cache(tmp_path)) is first
    assert modules.load_module(source, "doubled", False, Cache(tmp_path)) is not first
    assert modules.load_module(source, "doubled", True, Cache(tmp_path / "other")) is not first
    assert modules.load_module(source + "# more\n", "doubled", True, Cache(tmp_path)) is not first
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None


def doubled_source():
    return ac.compile(doubled()).source(d_qk=16)
