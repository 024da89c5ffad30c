"""The Gluon kernels' text on a model of the machine: values against the reference, and races that it must notice."""

import pytest
import torch

from attncc.runtime.samples import Shape
from tests.codegen.hopper_calls import GROUPED, OPTIONS, STRIDED, Run, schedule, source


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("causal", GROUPED),
        ("causal", Shape(1, 1, 1, 100, 130, 128, 80)),
        ("causal", Shape(1, 2, 1, 100, 130, 72, 40, strided=True)),
        ("full", STRIDED),
        ("alibi", GROUPED),
        ("softcap", STRIDED),
        ("document", GROUPED),
        ("sigmoid", GROUPED),
        ("cog", Shape(1, 2, 1, 100, 130, 72, 40, strided=True)),
        ("qk_temperature", GROUPED),
        ("dense_bias", GROUPED),
        ("image_gain", GROUPED),
        ("parallel_context", GROUPED),
        ("t5_bias", GROUPED),
        ("bam", STRIDED),
        ("kerple", GROUPED),
        ("faceformer", Shape(1, 2, 1, 150, 200, 128, 128)),
        ("shifted", GROUPED),
        ("shifted_by_head", GROUPED),
    ],
)
def test_values(name, shape):
    run = Run(name, shape)
    assert not run.failures(run.backward())


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("causal", Shape(1, 2, 1, 130, 150, 192, 128), {}),
        ("causal", Shape(1, 2, 1, 130, 150, 192, 128), {"splits": 2}),
        ("full", Shape(1, 1, 1, 200, 70, 256, 256), {}),
        ("softcap", Shape(1, 1, 1, 130, 150, 160, 144, strided=True), {}),
        ("document", Shape(1, 1, 1, 260, 150, 256, 64), {}),
        ("cog", Shape(1, 1, 1, 130, 150, 128, 192), {}),
        ("softcap", Shape(1, 1, 1, 130, 150, 256, 200), {}),
        ("causal", Shape(1, 1, 1, 210, 70, 136, 136), {}),
        ("sink", Shape(1, 1, 1, 70, 210, 136, 136), {"wanted": ("sink",)}),
    ],
)
def test_wide_heads(name, shape, options):
    run = Run(name, shape)
    assert not run.failures(run.backward(**options))


@pytest.mark.parametrize(
    ("name", "threshold"),
    [("causal", "row_max + {}"), ("alibi", "offset + {}"), ("cog", "row_max + {}"), ("two_norm", "> {}")],
)
def test_a_maximum_that_moves_seldom(name, threshold):
    """At the threshold that is generated a random sample's moves once; at a lower one it does for some of the rows."""
    generated = threshold.format("8.0")
    assert generated in source(name, 64, 256)
    for by in ("8.0", "0.25"):
        change = threshold.format(by)
        run = Run(name, Shape(1, 1, 1, 130, 260, 64, 256), lambda text, to=change: text.replace(generated, to))
        assert not [f for f in run.failures(run.backward()) if "out" in str(f)]


def test_three_warpgroups_scan_documents_in_blocks_of_192():
    run = Run("document", Shape(1, 2, 1, 300, 250, 64, 64), rows=192)
    assert not run.failures(run.backward())


def test_rows_that_see_nothing_give_zeros():
    run = Run("causal", Shape(1, 2, 2, 210, 70, 64, 64))
    dq, dk, dv = run.backward()
    assert not run.failures((dq, dk, dv))
    assert not dq[:, :, :140].any()


@pytest.mark.parametrize(
    ("name", "d", "options"),
    [
        ("rising", 64, {}),
        ("rising", 64, {"deals": True}),
        ("rising", 128, {"strips": 2}),
        ("two_rising", 64, {}),
    ],
)
def test_keys_past_the_end_add_nothing_to_dq_whatever_their_weight_would_be(name, d, options):
    run = Run(name, Shape(1, 1, 1, 130, 150, d, d), **options)
    assert not run.failures(run.backward())
    assert not run.failures(run.backward(sums=False))


def test_an_infinite_cotangent_of_the_lse_of_a_row_that_sees_nothing_goes_nowhere():
    run = Run("causal", Shape(1, 1, 1, 210, 70, 64, 64))
    dlse = torch.zeros(1, 1, 210)
    clean = run.backward(dlse=dlse)
    dlse[:, :, :140] = float("-inf")
    for found, expected in zip(run.backward(dlse=dlse)[1:], clean[1:], strict=True):
        assert torch.equal(found, expected)


def test_a_slot_of_values_of_keys_is_refilled_when_they_were_read():
    """Consumers leave a tile of keys before they read what its keys have: with as many slots the warp that loads would
    be too early."""
    shape = Shape(1, 2, 2, 130, 700, 72, 64)
    assert "% (STAGES + 1)" in source("bee_rag", 72, 64)
    run = Run("bee_rag", shape)
    assert not run.failures(run.backward())
    broken = Run("bee_rag", shape, lambda text: text.replace("% (STAGES + 1)", "% STAGES"))
    assert broken.failures(broken.backward())


@pytest.mark.parametrize("kind", [torch.int8, torch.int64])
def test_integers_of_any_width_are_read_a_key(kind):
    run = Run("document", GROUPED)
    s = run.sample
    arguments = (s.q, s.k, s.v, s.inputs["doc"].to(kind), run.arguments[-1])
    out = run.module.forward(*arguments, schedule(GROUPED, run.warps), OPTIONS)
    assert torch.equal(out[0], run.out)


#: mutations of the kernel in which a warpgroup has dQ
OF_ONE_WITH_DQ = [
    # a matmul's operands are waited for
    ("mbarrier.wait(do_full.index(stage), (count // STAGES) & 1, pred=turn + 1 < turns)", "pass"),
    ("mbarrier.wait(v_full.index(0), 0)", "pass"),
    # a buffer is given back when its last matmul is done, not before
    ("mbarrier.wait(ds_empty.index(half), ((count >> 1) + 1) & 1)", "pass"),
    ("mbarrier.wait(q_empty.index(stage), (count // STAGES + 1) & 1)", "pass"),
    ("            tma.store_wait(1)", "            pass"),
    ("mbarrier.wait(keys_read.index(0), 0)", "pass"),
    # the asynchronous units see what threads wrote
    ("fence_async_shared()\n                mbarrier.arrive(ds_full", "mbarrier.arrive(ds_full"),
    # barriers count
    ("mbarrier.arrive(q_empty.index(last), count=1)", "pass"),
    ("ds_full = _barriers(2, 2)", "ds_full = _barriers(2, 1)"),
]
#: and of that in which two share it
OF_TWO_WITH_DQ = [
    # what comes first to a tile of dQ lies in memory before others hear of it, and they see it
    ("    _stores_are_done(0)\n", ""),
    ("_see_stores(count)", "pass"),
    ("summed == NOTHING", "summed == BEGUN"),
    ("mbarrier.wait(dq_empty.index(consumer), count & 1)", "pass"),
    ("            tma.store_wait(1)\n", ""),
    ("            mbarrier.wait(ds_full.index(half), (count >> 1) & 1)\n    ", "    "),
]


@pytest.mark.parametrize(
    ("d", "before", "after"),
    [(64, *change) for change in OF_ONE_WITH_DQ] + [(128, *change) for change in OF_TWO_WITH_DQ],
)
def test_the_model_notices_what_is_left_out(d, before, after):
    assert before in source("full", d, d)
    heads = 16 if "ds_empty" in before else 3  # seldom is the third warpgroup two tiles behind
    run = Run("full", Shape(1, heads, heads, 600, 130, d, d), lambda text: text.replace(before, after))
    assert run.noticed()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("mbarrier.wait(p_empty.index(consumer), parity ^ 1)", "pass"),
        ("mbarrier.wait(p_full.index(0), parity)", "pass"),
        ("do_empty = _barriers(STAGES, 2)", "do_empty = _barriers(STAGES, 1)"),
        ("fence_async_shared()\n            mbarrier.arrive(p_full", "mbarrier.arrive(p_full"),
        # and where each has keys of its own
        ("mbarrier.wait(q_full.index(stage), phase)\n            qk = ", "qk = "),
        ("mbarrier.wait(do_full.index(stage), phase)\n            dv_0 = ", "dv_0 = "),
        (
            "q_empty = _barriers(STAGES, 2)\n    do_full = _barriers(STAGES, 1)\n    written",
            "q_empty = _barriers(STAGES, 1)\n    do_full = _barriers(STAGES, 1)\n    written",
        ),
        ("written = _barriers(1, 2)", "written = _barriers(1, 1)"),
        # and of the kernel of dQ
        ("mbarrier.wait(k_empty.index(stage), (i // KEY_STAGES + 1) & 1)", "pass"),
        ("mbarrier.wait(v_full.index(value_stage), (i // VALUE_STAGES) & 1)", "pass"),
        ("mbarrier.wait(q_full.index(consumer), 0)\n    # ds", "# ds"),
        ("fence_async_shared()\n    _group_barrier()\n    _store_tile(DQ_DESC", "_store_tile(DQ_DESC"),
    ],
)
def test_the_model_notices_what_is_left_out_of_the_one_for_wide_heads(before, after):
    d_v = next(d for d in (136, 200) if before in source("full", 136, d))
    shape = Shape(1, 2, 2, 400, 450, 136, d_v)
    run = Run("full", shape, lambda text: text.replace(before, after))
    assert run.noticed()
