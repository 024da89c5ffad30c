"""Sums in a fixed order, and who adds in whose turn, on a model of the machine: values, and races it must notice."""

import re

import pytest
import torch

from attncc.runtime.samples import Shape
from tests.codegen import machine
from tests.codegen.hopper_calls import GROUPED, Run, source


@pytest.mark.parametrize("name", ["alibi", "sink"])
def test_dq_in_a_fixed_order_and_the_gradients_of_rows(name):
    run = Run(name, GROUPED)
    wanted = tuple(d.name for d in run.plan.graph.inputs if d.grad)
    assert not run.failures(run.backward(wanted, sums=False))
    assert not run.failures(run.backward(wanted))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("causal", Shape(1, 2, 1, 140, 300, 128, 128)),
        ("causal", Shape(1, 1, 1, 300, 130, 128, 80)),  # rows that see nothing
        ("causal", Shape(1, 1, 1, 70, 40, 128, 80)),
        ("full", Shape(1, 1, 1, 100, 300, 96, 128, strided=True)),
        ("sliding_window", Shape(1, 1, 1, 400, 420, 128, 80)),
        ("document", Shape(1, 1, 1, 130, 300, 128, 80)),
        ("causal", Shape(1, 6, 2, 260, 300, 128, 80)),
        # a warpgroup has dQ, and other warps add it: in one piece, and in two
        ("causal", GROUPED),
        ("full", Shape(1, 2, 2, 200, 400, 64, 48)),
        ("sliding_window", Shape(1, 1, 1, 400, 420, 64, 64)),
        ("document", Shape(1, 2, 1, 130, 300, 80, 96)),
    ],
)
def test_in_a_fixed_order_programs_add_to_a_tile_of_dq_in_their_turn(name, shape):
    run = Run(name, shape)
    first, second = (run.backward(sums=False) for _ in range(2))  # what is early and what is late differs
    assert not run.failures(first)
    assert all(map(torch.equal, first[:3], second[:3]))


def test_the_model_notices_a_barrier_whose_memory_a_tile_may_be_given():
    run = Run("causal", GROUPED, lambda text: re.sub(r"\n    _retire\(ds_full, 2\)", "", text))
    with pytest.raises(machine.MachineError, match="before the kernel ends"):
        run.backward()


def test_blocks_of_keys_with_two_runs_of_tiles_take_no_turns():
    run = Run("prefix_lm", GROUPED)
    assert not run.failures(run.backward(sums=False))


@pytest.mark.parametrize("d", [128, 96, 64])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("_pass_turn_on(summed_at)", "pass"),
        # it is another's turn when what was added is in memory
        ("    _stores_are_done(0)\n", ""),
        # those that others wait for start first
        ("n_block = n_blocks - 1 - n_block", "pass"),
        # who visits a tile
        ("(begin <= tile) & ", ""),
    ],
)
def test_the_model_notices_who_comes_before_their_turn(d, before, after):
    assert source("sliding_window", d, 80).count(before) >= 1
    run = Run("sliding_window", Shape(1, 1, 1, 400, 420, d, 80), lambda text: text.replace(before, after))
    assert run.noticed(sums=False)


@pytest.mark.parametrize("d", [64, 96])
def test_the_model_notices_a_tile_of_dq_that_overtakes_who_adds_it(d):
    text = source("full", d, d)
    waits = set(re.findall(r"mbarrier\.wait\(dq_empty\.index\(.*", text[text.index("def _sum_queries") :]))
    assert len(waits) == (1 if d == 64 else 2)
    for wait in waits:
        run = Run("full", Shape(1, 4, 4, 600, 130, d, d), lambda text, wait=wait: text.replace(wait, "pass"))
        assert run.noticed(sums=False)


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize(
    ("name", "shape", "splits"),
    [
        ("causal", Shape(1, 4, 1, 130, 150, 64, 48), 2),
        ("alibi", Shape(1, 4, 1, 130, 150, 64, 48), 4),
        ("document", Shape(1, 4, 1, 130, 150, 64, 48), 4),
        ("causal", Shape(2, 6, 2, 140, 200, 128, 80), 3),
        ("full", Shape(1, 4, 2, 70, 300, 128, 80, strided=True), 2),
        ("causal", Shape(1, 2, 1, 130, 150, 192, 128), 2),
        ("causal", Shape(1, 3, 1, 5, 700, 256, 192), 3),  # more counts than rows of queries
    ],
)
def test_the_heads_of_a_group_add_up_dk_and_dv_in_turns(name, shape, splits, sums):
    run = Run(name, shape)
    first, second = (run.backward(splits=splits, sums=sums) for _ in range(2))
    assert not run.failures(first)
    assert all(map(torch.equal, first[1:3], second[1:3]))
    assert sums or torch.equal(first[0], second[0])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("_pass_turn_on(ADDED_PTR + slot)", "pass"),
        ("_wait_for_turn(ADDED_PTR + slot, share)", "_wait_for_turn(ADDED_PTR + slot, share + 1)"),
        # those that others wait for start first
        ("share = line % SPLITS", "share = SPLITS - 1 - line % SPLITS"),
        # the first adds to nothing, the last rounds the sum of all
        ("if share > 0:", "if True:"),
        ("rounds = share + 1 == SPLITS", "rounds = share == 0"),
        ("slot = block * 2 + consumer", "slot = block * 2"),
        # and nobody has added before
        ("tl.store(ADDED_PTR + turn, 0", "tl.store(ADDED_PTR + turn, 1"),
    ],
)
def test_the_model_notices_who_adds_to_dk_and_dv_before_their_turn(before, after):
    shape = Shape(1, 3, 1, 140, 150, 128, 80)
    assert source("causal", 128, 80).count(before) >= 1
    run = Run("causal", shape, lambda text: text.replace(before, after))
    assert run.noticed(splits=3)
