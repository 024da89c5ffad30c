"""The Gluon kernel that splits keys which hold their values: its text on a model of the machine."""

from functools import cache

import pytest
import torch

import attncc as ac
from attncc.codegen.plan import Plan
from attncc.codegen.render import render
from attncc.runtime.reference import reference
from attncc.runtime.shapes import bind
from attncc.runtime.verify import check, eager
from tests.codegen import machine
from tests.codegen.hopper_calls import OPTIONS

VARIANTS = {
    "causal": ac.Variant(name="causal_keys", mask=ac.causal, value="k[:512]"),
    "window": ac.Variant(name="window_keys", mask=ac.causal & ac.sliding_window(90), value="k[:512]"),
    "sigmoid": ac.Variant(
        name="sigmoid_keys", mask=ac.causal, normalizer=lambda score: ac.sigmoid(score - 2), value="k[:512]"
    ),
    "by_distance": ac.Variant(  # which the forward reads from a table by distance, and this kernel does not
        name="biased_keys",
        mask=ac.causal,
        score=lambda score, h, q_idx, kv_idx, kv_len, table: score + table[(kv_len + q_idx - kv_idx) % 31, h],
        value="k[:512]",
        inputs={"table": ac.Input("bucket", "h", grad=True)},
    ),
    "whole": ac.Variant(name="whole_keys", mask=ac.causal, normalizer=ac.softmax1, value="k[:512]"),
}


@cache
def plan(name):
    return Plan(VARIANTS[name].graph)


def run(name, d_qk, heads, q_len, kv_len, splits, change=lambda text: text):
    """(out, its check) of a call with one key head."""
    text = change(render(plan(name), d_qk, 512, False, forward_in="gluon_decode"))
    module = machine.load(text, name)
    random = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads, q_len, d_qk, generator=random).half()
    k = torch.randn(1, 1, kv_len, d_qk, generator=random).half()
    inputs = {"table": torch.randn(32, heads, generator=random)} if plan(name).graph.inputs else {}
    bound = bind(plan(name).graph, q, k, k[..., :512], None, inputs)
    meta = {"forward": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "splits": splits}}
    out, *_ = module.forward(q, k, k[..., :512], *bound.tensors.values(), bound.scale, meta, OPTIONS)
    exact = reference(VARIANTS[name], q.double(), k.double(), **inputs)
    plain = eager(VARIANTS[name], q, k, **inputs)
    return out, check("out", out, exact, plain)


@pytest.mark.parametrize(
    ("name", "d_qk", "heads", "q_len", "kv_len", "splits"),
    [
        ("causal", 576, 16, 1, 300, 1),  # five tiles: the last round has one
        ("causal", 576, 40, 2, 200, 3),  # two blocks of rows; shares of one tile and two
        ("window", 576, 16, 2, 300, 1),
        ("sigmoid", 576, 16, 1, 150, 2),  # no maxima to exchange
        ("by_distance", 576, 16, 1, 150, 2),
        ("whole", 512, 16, 1, 150, 1),  # no columns beside the values: the weights have their own buffer
        ("causal", 576, 8, 5, 3, 1),  # queries that see nothing
    ],
)
def test_values(name, d_qk, heads, q_len, kv_len, splits):
    out, found = run(name, d_qk, heads, q_len, kv_len, splits)
    assert found.ok, found
    assert not (q_len > kv_len) or not out[:, :, : q_len - kv_len].any()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("mbarrier.wait(k_full.index(2 * consumer), r & 1)", "pass"),
        ("mbarrier.wait(k_full.index(2 * consumer + 1), r & 1)", "pass"),
        ("mbarrier.wait(k_empty.index(3 * slot), (r + 1) & 1)", "pass"),
        ("mbarrier.wait(k_empty.index(slot + 1), (r + 1) & 1)", "pass"),
        ("mbarrier.wait(state_full.index(0), r & 1)", "pass"),
        ("mbarrier.wait(state_full.index(1), r & 1)", "pass"),
        ("mbarrier.wait(weights_full.index(0), r & 1)", "pass"),
        ("mbarrier.wait(weights_full.index(1), r & 1)", "pass"),
        (
            "fence_async_shared()\n        _group_barrier()\n        mbarrier.arrive(weights_full",
            "mbarrier.arrive(weights_full",
        ),
        ("mbarrier.wait(q_full.index(0), 0)", "pass"),
        ("mbarrier.wait(sums_full.index(0), 0)", "pass"),
        ("            row_sum_0 = row_sum_0 * alpha\n", ""),  # sums fade where the other finds a higher maximum, too
    ],
)
def test_the_model_notices_what_is_left_out(before, after):
    def broken(text):
        assert before in text
        return text.replace(before, after)

    try:
        _, found = run("causal", 576, 40, 2, 600, 1, broken)
    except machine.MachineError:
        return
    assert not found.ok
