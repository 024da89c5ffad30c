"""Kernels that were seen to spill, and the choice that knows of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attncc.passes.work import PairCosts
from attncc.schedule import Cache, KernelSchedule, choose, device_for, hopper
from attncc.schedule import spills as notes
from attncc.schedule.choose import backend_of
from attncc.schedule.cost import FIT, SPILLS_SEEN, ranked
from attncc.schedule.hopper_backward import STRIPS
from attncc.schedule.problem import alike
from attncc.schedule.registers import register_limit, registers
from attncc.schedule.spills import note_spills, with_known_spills

from .problems import BACKWARD, problem

A100 = device_for("a100")
MEASURED = replace(device_for("h100"), gluon=("forward", "dkdv"))
WORK = problem(digest="d" * 64)
WIDE = replace(WORK, d_qk=192, d_v=128)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path)


def seen(found, cache, work=WORK, device=A100):
    note_spills(found, work, device, cache)
    return with_known_spills(work, device, cache)


def test_what_spills_leaves_its_place_to_the_next(cache):
    first, *others = (ks for ks, _ in ranked("forward", WORK, A100))
    assert choose(WORK, A100, cache).forward == first
    note_spills({("forward", first): 8, ("dq", first): 0}, WORK, A100, cache)
    again = choose(WORK, A100, cache)
    # stages of a tile hardly change its registers
    assert again.forward == next(ks for ks in others if replace(ks, num_stages=first.num_stages) != first)
    assert again.dq == choose(WORK, A100).dq
    assert again.origin == "model"
    assert choose(WORK, device_for("l4"), cache).forward == choose(WORK, device_for("l4")).forward
    other = replace(WORK, digest="e" * 64)
    assert choose(other, A100, cache) == choose(other, A100)


def test_notes_add_up_and_say_how_much(cache):
    first, second = (ks for ks, _ in ranked("forward", WORK, A100)[:2])
    seen({("forward", first): 8}, cache)
    known = seen({("forward", second): 24}, cache)
    assert (known.spilled("forward", first), known.spilled("forward", second)) == (8, 24)
    assert known.spilled("dkdv", first) == 0
    assert with_known_spills(replace(WORK, kv_len=512, q_len=512), A100, cache).spills == known.spills


def test_a_little_is_kept_where_all_else_is_slow(cache):
    """One tile, of which the stages do not matter, and Triton's two kernels instead of one."""
    best = ranked("dkdv", WORK, MEASURED, "gluon")[0][0]
    every = [replace(best, strips=count) for count in (0, *STRIPS)]
    known = seen({("dkdv", ks): 16 for ks in every}, cache, device=MEASURED)
    assert backend_of("dkdv", known, MEASURED)[0] == "gluon"
    assert choose(WORK, MEASURED, cache).dkdv == best
    known = seen({("dkdv", ks): 8192 for ks in every}, cache, device=MEASURED)
    assert backend_of("dkdv", known, MEASURED)[0] == "triton"


def test_a_gluon_tile_that_spills_is_weighed_in_strips(cache):
    """Of another formula there are none: they are for what was seen to spill."""
    best = ranked("dkdv", WORK, MEASURED, "gluon")[0][0]
    assert not any(ks.strips for ks, _ in ranked("dkdv", WORK, MEASURED, "gluon"))
    known = seen({("dkdv", best): 16}, cache, device=MEASURED)
    chosen = choose(WORK, MEASURED, cache).dkdv
    assert chosen == replace(best, strips=STRIPS[0])
    # seen to spill as well, they are left for more of them; the fewer bytes the fewer
    seen({("dkdv", chosen): 8}, cache, device=MEASURED)
    assert choose(WORK, MEASURED, cache).dkdv == replace(best, strips=STRIPS[1])
    for count in STRIPS[1:]:
        known = seen({("dkdv", replace(best, strips=count)): 8}, cache, device=MEASURED)
    assert backend_of("dkdv", known, MEASURED)[0] == "gluon"
    assert choose(WORK, MEASURED, cache).dkdv == best


def test_a_tile_that_spills_much_is_weighed_in_more_strips(cache):
    best = ranked("dkdv", WORK, MEASURED, "gluon")[0][0]
    seen({("dkdv", best): 180}, cache, device=MEASURED)
    assert choose(WORK, MEASURED, cache).dkdv.strips == STRIPS[1]


def test_strips_of_a_schedule_are_those_there_are(cache):
    best = ranked("dkdv", WORK, MEASURED, "gluon")[0][0]
    assert KernelSchedule.from_json(replace(best, strips=2).to_json()) == replace(best, strips=2)
    assert "strips" not in best.to_json()
    for strips, there in ((0, True), (2, True), (3, False)):
        assert hopper.has_backward(replace(best, strips=strips), WORK, MEASURED) == there
    whole = ranked("dkdv", WIDE, MEASURED, "gluon")[0][0]
    assert hopper.has_backward(whole, WIDE, MEASURED)
    assert not hopper.has_backward(replace(whole, strips=2), WIDE, MEASURED)


def test_kernels_of_ordered_sums_spill_for_themselves(cache):
    """In Gluon, what sums dQ in turn has warps more; all other kernels are the same, and known in either case."""
    ordered = replace(WORK, ordered=True)
    whole = ranked("dkdv", WORK, MEASURED, "gluon")[0][0]
    strips, triton = replace(whole, strips=STRIPS[0]), ranked("dkdv", WORK, MEASURED)[0][0]
    known = seen({("dkdv", whole): 8, ("dkdv", triton): 24, ("forward", whole): 16}, cache, ordered, MEASURED)
    assert [known.spilled("dkdv", ks) for ks in (whole, triton)] == [8, 24]
    assert choose(ordered, MEASURED, cache).dkdv == strips
    known = with_known_spills(WORK, MEASURED, cache)
    assert [known.spilled("dkdv", ks) for ks in (whole, triton)] == [0, 24]
    assert known.spilled("forward", whole) == 16
    assert choose(WORK, MEASURED, cache).dkdv == whole
    # and the other way round, in the same entry
    assert seen({("dkdv", strips): 12}, cache, device=MEASURED).spilled("dkdv", strips) == 12
    known = with_known_spills(ordered, MEASURED, cache)
    assert [known.spilled("dkdv", ks) for ks in (whole, strips)] == [8, 0]
    assert len(cache.list()) == 1


def test_tilings_that_differ_in_arguments_alone_are_alike():
    gluon = KernelSchedule(64, 128, 8, 2, "gluon")
    assert alike(replace(gluon, num_stages=3)) == alike(gluon) != alike(replace(gluon, splits=4))
    assert alike(replace(gluon, splits=2)) == alike(replace(gluon, splits=4))
    triton = KernelSchedule(64, 128, 8, 2)
    assert alike(replace(triton, num_stages=3)) != alike(triton)


def test_the_search_ends(cache):
    """Of as many as were seen to spill the best one is taken, and no other is compiled."""
    for count in range(1, SPILLS_SEEN + 3):
        chosen = choose(WORK, A100, cache).forward
        note_spills({("forward", chosen): 8 * count}, WORK, A100, cache)
    known = with_known_spills(WORK, A100, cache)
    assert len(known.spills) == SPILLS_SEEN
    assert known.spilled("forward", choose(WORK, A100, cache).forward)


def test_a_note_that_cannot_be_read_says_nothing(cache):
    seen({("forward", ranked("forward", WORK, A100)[0][0]): 8}, cache)
    (entry,) = cache.list()
    for rows in (None, [{"kernel": "forward"}], [{"kernel": "forward", "tiling": {}, "bytes": 8}], [7]):
        cache.put(entry.key, {"kind": "spills", "spills": rows})
        assert not with_known_spills(WORK, A100, cache).spills
        assert choose(WORK, A100, cache) == choose(WORK, A100)


def test_other_code_forgets(cache, monkeypatch):
    first = ranked("forward", WORK, A100)[0][0]
    assert seen({("forward", first): 8}, cache).spills
    monkeypatch.setattr(notes, "fingerprint", lambda: "changed")
    assert not with_known_spills(WORK, A100, cache).spills


def test_one_that_spills_tells_of_others(cache):
    """The estimate was too low: tilings that want about as many registers are expected to spill as well."""
    first = ranked("dq", WORK, A100)[0][0]
    limit = register_limit(first, A100)
    short = limit - registers("dq", first, WORK, A100)
    assert short >= 0
    known = seen({("dq", first): 40}, cache)
    chosen = ranked("dq", known, A100)[0][0]
    assert registers("dq", chosen, WORK, A100) + short + 10 <= limit
    assert any(
        registers("dq", ks, WORK, A100) + short + 10 > limit >= registers("dq", ks, WORK, A100)
        for ks, _ in ranked("dq", WORK, A100)
    )


def test_what_was_taken_although_it_would_spill_is_what_was_meant(cache):
    """On warp groups, where the model predicts that it gains more than spills cost."""
    small = problem(batch=1, heads=8, length=1024, digest="d" * 64)
    first = ranked("dkdv", small, MEASURED)[0][0]
    assert registers("dkdv", first, small, MEASURED) > register_limit(first, MEASURED)
    assert not note_spills({("dkdv", first): 216}, small, MEASURED, cache)
    assert choose(small, MEASURED, cache, "triton").dkdv == first


#: of many rows, whose registers are hard to tell, and much arithmetic, beside which a smaller tile loses little
MANY_ROWS = problem(digest="d" * 64, backward=PairCosts(fma=18, sfu=2, int=4))
MANY_ROWS = replace(MANY_ROWS, costs=replace(MANY_ROWS.costs, rows=5))


def test_what_spills_less_than_it_was_expected_to_tells_of_others_that_need_not(cache):
    """The estimate was too high: the next tile, which it said would spill as well, is taken where it loses less than a
    spill may cost."""
    (first, us), *others = ((ks, p.us) for ks, p in ranked("dkdv", MANY_ROWS, MEASURED))
    limit = register_limit(first, MEASURED)
    over = registers("dkdv", first, MANY_ROWS, MEASURED) - limit
    assert not note_spills({("dkdv", first): 4 * over}, MANY_ROWS, MEASURED, cache)
    known = seen({("dkdv", first): 40}, cache, MANY_ROWS, MEASURED)
    chosen = ranked("dkdv", known, MEASURED)[0][0]
    wanted = registers("dkdv", chosen, MANY_ROWS, MEASURED)
    assert limit < wanted <= limit + over - 10
    assert dict(others)[chosen] < FIT.spill_risk * us
    # and what spills for all that is noted, whatever was expected of it
    again = seen({("dkdv", chosen): 4 * (wanted - limit)}, cache, MANY_ROWS, MEASURED)
    assert again.spilled("dkdv", chosen)
    assert ranked("dkdv", again, MEASURED)[0][0] == first


def test_nor_is_a_tile_left_for_one_that_loses_more(cache):
    plain = replace(MANY_ROWS, costs=replace(MANY_ROWS.costs, backward=BACKWARD))
    first = ranked("dkdv", plain, MEASURED)[0][0]
    known = seen({("dkdv", first): 40}, cache, plain, MEASURED)
    assert known.spilled("dkdv", first)
    assert ranked("dkdv", known, MEASURED)[0][0] == first
