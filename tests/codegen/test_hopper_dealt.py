"""The Gluon backward whose programs have block after block of keys, on the model of the machine: values, and races
between blocks that it must notice."""

import pytest

from attncc.runtime.samples import Shape
from tests.codegen.hopper_calls import GROUPED, STRIDED, Run, source


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("causal", Shape(1, 3, 3, 100, 130, 128, 80)),
        ("full", STRIDED),
        ("alibi", Shape(2, 2, 2, 130, 150, 64, 64)),
        ("softcap", Shape(1, 5, 5, 100, 280, 128, 128)),
        ("document", Shape(2, 2, 2, 260, 260, 128, 128)),
        ("sigmoid", Shape(1, 4, 4, 130, 300, 128, 64)),
        ("cog", Shape(1, 4, 4, 100, 130, 72, 40, strided=True)),
        ("qk_temperature", Shape(2, 2, 2, 150, 130, 64, 64)),
        ("t5_bias", Shape(1, 3, 3, 150, 260, 96, 64)),
        ("bam", STRIDED),
        ("causal", GROUPED),  # whose blocks are not dealt
    ],
)
def test_values(name, shape):
    run = Run(name, shape, deals=True)
    wanted = tuple(d.name for d in run.plan.graph.inputs if d.grad)
    assert not run.failures(run.backward())
    assert not run.failures(run.backward(wanted))
    assert not run.failures(run.backward(wanted, sums=False))


def short(d):
    """Many blocks of keys with a tile of queries each, so that the loading warp is blocks ahead."""
    return Shape(2, 8, 8, 60, 500, d, d)


@pytest.mark.parametrize("d", [64, 96, 128])
def test_blocks_of_a_tile_each(d):
    run = Run("causal", short(d), deals=True)
    assert not run.failures(run.backward())


def noticed(name, shape, before, after):
    assert before in source(name, shape.d_qk, shape.d_v, deals=True)
    return Run(name, shape, lambda text: text.replace(before, after), deals=True).noticed()


@pytest.mark.parametrize(
    ("d", "before", "after"),
    [
        # keys are waited for
        (128, "mbarrier.wait(k_full.index(k_slot), had // KEY_SLOTS & 1)", "pass"),
        # the next block's values take the place of this one's when all have read those
        (64, "mbarrier.wait(v_empty.index(0), (had + 1) & 1)", "pass"),
        (128, "mbarrier.wait(v_empty.index(0), (had + 1) & 1)", "pass"),
        # the block after the next is dealt when all are done with this one
        (128, "mbarrier.wait(dealt_empty.index(had % 2), (had // 2 + 1) & 1)", "pass"),
        (128, "dealt_empty = _barriers(2, 3)", "dealt_empty = _barriers(2, 1)"),
        # a phase a block
        (64, "mbarrier.wait(v_full.index(0), had & 1)", "mbarrier.wait(v_full.index(0), 0)"),
        (128, "mbarrier.wait(v_full.index(0), had & 1)", "mbarrier.wait(v_full.index(0), 0)"),
    ],
)
def test_the_model_notices_what_is_left_out_between_blocks(d, before, after):
    assert noticed("causal", short(d), before, after)


@pytest.mark.parametrize(
    ("d", "before", "after"),
    [
        # a matmul's operands are waited for
        (128, "mbarrier.wait(v_full.index(0), had & 1)", "pass"),
        (64, "mbarrier.wait(k_full.index(k_slot), had // KEY_SLOTS & 1)", "pass"),
        # gradients of keys take the place of keys when all have read those
        (128, "mbarrier.wait(keys_read.index(0), had & 1)", "pass"),
        (128, "        tma.store_wait(0)\n        _group_barrier()  # the storing lane has waited\n", ""),
    ],
)
def test_the_model_notices_what_is_left_out_of_a_block(d, before, after):
    assert noticed("full", Shape(1, heads := 16 if d == 64 else 6, heads, 600, 130, d, d), before, after)


#: heads enough that those of the first are done, and rounded, while later ones are multiplied
ROUNDED = Shape(1, 40, 40, 70, 130, 128, 128)


def test_dq_of_heads_that_are_done_is_rounded_beside_the_others():
    seen = "dealt = backward.dealt = torch.empty("
    run = Run("document", ROUNDED, lambda text: text.replace("dealt = torch.empty(", seen), deals=True)
    assert not run.failures(run.backward())
    assert run.module.backward.dealt[1] > 10


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # others are told of a block when what it adds to dQ is in memory, and wait for all of a head's
        ("_stores_are_done(0)\n            _group_barrier()\n            gl.atomic_add(DEALT", "gl.atomic_add(DEALT"),
        ("< gl.cdiv(kv_len + zero, BLOCK_N):", "< 0:"),
        # the kernel behind begins with the first tile that nobody was dealt
        ("tl.load(DEALT_PTR + 1) + tl.program_id(0)", "tl.load(DEALT_PTR + 1) + 1 + tl.program_id(0)"),
    ],
)
def test_the_model_notices_what_is_left_out_of_rounding(before, after):
    assert noticed("document", ROUNDED, before, after)
