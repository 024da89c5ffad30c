"""A program of the Hopper forward takes block after block of queries: on the model of the machine, with two warpgroups
and with three, which have the next block's queries while those of this one are in use."""

import pytest
import torch

from attncc.codegen import hopper
from attncc.codegen.plan import Plan
from attncc.codegen.render import render
from attncc.runtime.reference import reference
from attncc.runtime.samples import Shape
from attncc.runtime.verify import check, eager
from tests.codegen import machine
from tests.codegen.hopper_calls import Run, source, variant

MANY = Shape(1, 4, 2, 400, 450, 64, 64)


def is_right(run):
    """Is the output what the reference gives?"""
    run.dout = torch.zeros_like(run.out)
    exact, plain = run.expected(reference, torch.float64)[0], run.expected(eager, torch.float16)[0]
    return check("out", run.out, exact, plain).ok


@pytest.mark.parametrize("rows", [128, 192])
@pytest.mark.parametrize(
    "name", ["causal", "full", "sliding_window", "alibi", "document", "sigmoid", "cog", "sink", "two_full"]
)
def test_values(name, rows):
    assert is_right(Run(name, MANY, rows=rows))


@pytest.mark.parametrize("name", ["causal", "sink"])
def test_columns_of_two_widths(name):
    assert is_right(Run(name, Shape(1, 4, 2, 400, 450, 96, 96)))


def test_rows_before_the_first_key():
    assert is_right(Run("causal", Shape(1, 3, 3, 600, 150, 64, 64), rows=192))


#: a program with many blocks, of several tiles of keys each, and one whose blocks have one, so that the next come soon
LONG, SHORT = Shape(1, 12, 12, 400, 450, 64, 64), Shape(1, 12, 12, 400, 60, 64, 64)


@pytest.mark.parametrize(
    ("name", "shape", "before", "after"),
    [
        # a slot of queries is left by all warpgroups before it is filled again
        ("full", SHORT, "mbarrier.wait(q_empty.index(slot // LEAVERS), (blocks // Q_STAGES + 1) & 1)", "pass"),
        ("full", SHORT, "q_empty = _barriers(Q_STAGES * CONSUMERS // LEAVERS, LEAVERS)", "q_empty = _barriers(2, 1)"),
        # so is the word of the next block, which is waited for
        ("causal", LONG, "mbarrier.wait(turn_full.index(blocks % 2), blocks // 2 & 1)", "pass"),
        ("full", SHORT, "mbarrier.wait(turn_empty.index(blocks % 2), (blocks // 2 + 1) & 1)", "pass"),
        # the mask is there from the first tile that it cuts on
        ("causal", LONG, "i >= full_tiles)", "i > full_tiles)"),
        ("causal", LONG, ", full_tiles <= 0)", ", False)"),
    ],
)
def test_the_model_notices_what_is_left_out(name, shape, before, after):
    assert before in source(name, 64, 64)
    try:
        noticed = not is_right(Run(name, shape, lambda text: text.replace(before, after), 192))
    except machine.MachineError:
        return
    assert noticed


@pytest.mark.parametrize(("release", "first"), [((3, 6), True), ((3, 8), True), ((3, 9), False)])
def test_whole_tiles_come_first_where_that_spills_nothing(monkeypatch, release, first):
    monkeypatch.setattr(hopper, "_TRITON", release)
    text = render(Plan(variant("causal").graph), 128, 128, False, forward_in="gluon")
    assert ("i >= full_tiles)" in text, "i < mixed_tiles)" in text) == (first, not first)


def test_the_model_notices_queries_that_a_load_may_still_read_when_the_next_come():
    """With so few keys a block, the warp that loads waits for them at once."""
    shape, load = Shape(1, 2, 1, 700, 700, 128, 128), "left_0 = left_0.load(gl.DotOperandLayout(0, SCORES, 2))\n"
    text = source("document", 128, 128)
    assert (text.count(load), text.count("if Q_HELD and OUT_APART:")) == (1, 1)
    early = f"{load}            mbarrier.arrive(q_empty.index(slot // LEAVERS), count=1)\n"
    with pytest.raises(machine.MachineError, match="where a load may still read"):
        Run("document", shape, lambda text: text.replace("if Q_HELD and OUT_APART:", "if False:").replace(load, early))
