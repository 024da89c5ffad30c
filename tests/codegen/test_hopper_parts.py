"""Branches, strips of a tile, and tables by distance on a model of the machine: values, and races it must notice."""

import pytest
import torch

from attncc.runtime.samples import Shape
from tests.codegen import machine
from tests.codegen.hopper_calls import GROUPED, STRIDED, Run, source

PAIR = Shape(1, 2, 1, 130, 150, 64, 128)


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("differential", PAIR, {}),
        ("differential", PAIR, {"sums": False}),
        ("differential", Shape(1, 4, 1, 130, 90, 64, 80), {"splits": 4}),  # rows that see nothing
        ("differential", Shape(1, 2, 2, 100, 140, 32, 64, strided=True), {}),
        ("differential", Shape(1, 2, 1, 130, 150, 64, 128, shared_key=True), {}),
        ("two_windows", PAIR, {"sums": False}),
        ("two_normalizers", PAIR, {}),
        ("two_scores", PAIR, {}),
        ("two_full", Shape(1, 1, 1, 260, 300, 64, 64), {"sums": False}),
        ("two_alike", PAIR, {}),
    ],
)
def test_branches(name, shape, options):
    run = Run(name, shape)
    wanted = tuple(d.name for d in run.plan.graph.inputs if d.grad)
    assert not run.failures(run.backward(wanted, **options))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # of the forward: operands are waited for, and slots given back when all branches have read them
        ("mbarrier.wait(v_full.index(stage), (count // STAGES) & 1)", "pass"),
        ("mbarrier.wait(k_full.index(following), ((count + 1) // STAGES) & 1)", "pass"),
        ("k_empty = _barriers(STAGES, CONSUMERS)", "k_empty = _barriers(STAGES, 1)"),
        ("        tma.store_wait(0)\n        _group_barrier()\n        out_0", "        out_0"),
        # of the backward
        ("mbarrier.wait(ds_empty.index(0), (count + 1) & 1)", "pass"),
        ("mbarrier.wait(ds_full.index(0), count & 1)", "pass"),
        ("mbarrier.wait(do_full.index(stage), (count // STAGES) & 1)", "pass"),
        ("mbarrier.wait(q_full.index(stage), (count // STAGES) & 1, pred=turn + 1 < turns)", "pass"),
        ("mbarrier.wait(dq_empty.index(consumer), count & 1)", "pass"),
        ("mbarrier.wait(keys_read.index(0), 0)", "pass"),
        ("q_empty = _barriers(STAGES, 2)", "q_empty = _barriers(STAGES, 1)"),
        ("fence_async_shared()\n                mbarrier.arrive(ds_full", "mbarrier.arrive(ds_full"),
        # and what branches share and do not
        ("delta_0 = delta\n", "delta_0 = delta + delta_1\n"),
        ("ds_tiles.index(1).permute", "ds_tiles.index(0).permute"),
    ],
)
def test_the_model_notices_what_is_left_out_of_branches(before, after):
    assert before in source("two_full", 64, 64)
    try:
        run = Run("two_full", Shape(1, 3, 3, 400, 450, 64, 64), lambda text: text.replace(before, after))
        noticed = run.failures(run.backward())
    except machine.MachineError:
        return
    assert noticed


@pytest.mark.parametrize(
    ("name", "shape", "strips"),
    [
        ("causal", Shape(1, 2, 1, 100, 130, 128, 80), 2),  # the slope is the weight
        ("softcap", GROUPED, 2),
        ("alibi", Shape(1, 1, 1, 130, 150, 128, 128), 4),  # places within a tile
        ("document", GROUPED, 8),  # what is read a query, which the warp that loads has
        ("cog", Shape(1, 1, 1, 100, 130, 72, 40, strided=True), 2),
        ("qk_temperature", GROUPED, 4),
        ("parallel_context", GROUPED, 2),
        ("t5_bias", GROUPED, 2),
        ("relative_bias", Shape(1, 1, 1, 100, 130, 96, 96), 4),
        ("relative_bias", Shape(1, 1, 1, 100, 70, 128, 64), 8),
        ("bam", STRIDED, 4),
        ("sigmoid", Shape(1, 1, 1, 150, 130, 128, 64), 8),
    ],
)
def test_tiles_in_strips(name, shape, strips):
    run = Run(name, shape, strips=strips)
    wanted = tuple(d.name for d in run.plan.graph.inputs if d.grad)
    assert not run.failures(run.backward(wanted))


@pytest.mark.parametrize(
    ("name", "shape", "strips"),
    [
        ("elu1", Shape(1, 2, 1, 100, 130, 128, 128), 0),  # a slope that is not the weight
        ("softpick", GROUPED, 0),  # one that has a sign, for which ds asks
        ("softpick", Shape(1, 1, 1, 150, 130, 128, 80), 2),
        ("head_gates", GROUPED, 0),  # dp is multiplied by what a query has, which is read again
        ("head_gates", Shape(1, 1, 1, 130, 150, 128, 64), 2),
        ("bounded_sum", GROUPED, 4),  # ds has nothing of a pair but dp
        ("bee_rag", Shape(1, 2, 1, 100, 130, 128, 80), 0),  # a sum a key of ds itself
        ("bee_rag", Shape(1, 1, 1, 100, 130, 64, 64), 2),
        ("key_gain", Shape(1, 1, 1, 150, 130, 128, 128), 4),  # one that keeps the scores
        ("gated_keys", GROUPED, 0),
        ("gated_keys", Shape(1, 1, 1, 100, 70, 128, 128), 2),
        ("elu1", Shape(1, 1, 1, 100, 70, 256, 256), 0),
    ],
)
def test_what_waits_for_dp(name, shape, strips):
    run = Run(name, shape, strips=strips)
    wanted = tuple(d.name for d in run.plan.graph.inputs if d.grad)
    assert not run.failures(run.backward(wanted))


@pytest.mark.parametrize(
    ("name", "shape", "strips"),
    [
        ("cosine", GROUPED, 0),  # a length of each key: its cotangent is a multiple of k . dk
        ("cosine", Shape(1, 4, 2, 100, 130, 96, 96), 2),
        ("cosine", Shape(1, 1, 1, 100, 70, 128, 80), 0),
        ("squared_distance", GROUPED, 2),  # one that is summed with ds
        ("squared_distance", Shape(1, 2, 1, 100, 130, 96, 128), 0),
    ],
)
def test_terms_of_a_similarity(name, shape, strips):
    run = Run(name, shape, strips=strips)
    assert not run.failures(run.backward())


def test_strips_in_a_fixed_order_and_of_heads_of_a_group_apart():
    run = Run("softcap", Shape(1, 4, 1, 260, 300, 128, 80), strips=2)
    first, second = (run.backward(sums=False) for _ in range(2))
    assert not run.failures(first)
    assert all(map(torch.equal, first[:3], second[:3]))
    assert not run.failures(run.backward(splits=4))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # dK and dV are stored when both warpgroups have written them
        ("        mbarrier.wait(written.index(0), 0)\n", ""),
        # a strip has its own queries' statistics
        ("slice(strip * WIDTH, WIDTH, 0)", "slice(0, WIDTH, 0)"),
        # and its own place in the tile
        ("tile * BLOCK_M + strip * WIDTH +", "tile * BLOCK_M +"),
    ],
)
def test_the_model_notices_what_goes_wrong_in_strips(before, after):
    assert before in source("softcap", 128, 128, strips=2)
    run = Run("softcap", Shape(1, 1, 1, 130, 150, 128, 128), lambda text: text.replace(before, after), strips=2)
    assert run.noticed()


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("relative_bias", Shape(2, 2, 1, 150, 130, 128, 64), {}),  # keys past the end have a distance, too
        ("t5_bias", Shape(1, 4, 2, 130, 200, 128, 128), {"splits": 2}),
        ("relative_bias", Shape(1, 1, 1, 200, 70, 64, 64), {}),  # a warpgroup has dQ
        ("cut_bias", Shape(1, 2, 2, 300, 280, 128, 80), {}),
        ("cut_bias", Shape(1, 1, 1, 70, 400, 64, 64), {}),  # keys that nobody sees
        ("relative_bias", Shape(1, 2, 1, 100, 90, 128, 64), {"sums": False}),  # in a fixed order, by its own kernel
    ],
)
def test_what_has_an_entry_a_distance_is_summed_with_dk_and_dv(name, shape, options):
    run = Run(name, shape)
    launches = []
    launch = run.module._launch
    run.module._launch = lambda kernel, *rest: (launches.append(kernel.__name__), launch(kernel, *rest))
    assert not run.failures(run.backward(("table",), **options))
    assert ("dtable_0_kernel" in launches) == ("sums" in options)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("gl.where(block_lo + BLOCK_N <= kv_len, ", "gl.where(block_lo >= 0, "),
        ("gl.where(ahead, ", "gl.where(key >= 0, "),
        ("far[i + 1]", "far[i]"),
        ("row + 8 - 8 * which", "row + 8 + 8 * which"),
    ],
)
def test_the_model_notices_what_goes_wrong_by_distance(before, after):
    assert before in source("t5_bias", 128, 64)
    run = Run("t5_bias", Shape(1, 2, 1, 150, 130, 128, 64), lambda text: text.replace(before, after))
    assert run.noticed(("table",)) in (["dtable"], ["ended"])


@pytest.mark.parametrize(
    ("name", "shape", "strips", "deals"),
    [
        ("slots", GROUPED, 0, False),
        ("slots", Shape(1, 3, 3, 130, 150, 128, 128), 4, False),
        ("reversed", Shape(1, 2, 2, 130, 150, 64, 64), 0, True),
        ("reversed", Shape(1, 1, 1, 100, 130, 128, 80), 2, False),
    ],
)
def test_means_over_the_queries_are_made_by_a_sweep_before(name, shape, strips, deals):
    run = Run(name, shape, strips=strips, deals=deals)
    wanted = tuple(d.name for d in run.plan.graph.inputs if d.grad)
    assert not run.failures(run.backward(wanted))
