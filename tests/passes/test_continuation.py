"""What a variant keeps of the tokens before, and which cannot go on from them: by the formulas alone."""

from __future__ import annotations

import pytest

import attncc as ac
from attncc.errors import UnsupportedError
from attncc.ir.text import formula
from attncc.passes.continuation import SEQUENCE, continuation, packed

LOCAL = ac.causal & ac.sliding_window(7)


@pytest.mark.parametrize(
    ("mask", "reach"),
    [
        (ac.causal, None),
        (LOCAL, "6"),
        (ac.causal & ac.sliding_window("size"), "size - 1"),
        (ac.window(5, 0), "5"),
        (ac.causal(align="start") & (lambda q_idx, kv_idx: q_idx - kv_idx < 7), "6"),
        (LOCAL & ac.dilated(2), "6"),
        (LOCAL | ac.causal & ac.window(9, 0) & ac.dilated(3), "9"),
        (
            ac.causal & ac.sliding_window("size") | ac.causal & ac.window("left", 0) & ac.dilated(3),
            "maximum(size - 1, left)",
        ),
        (LOCAL & ac.window("left", 0), "minimum(6, left)"),
        (LOCAL & ac.document(), "6"),
        (LOCAL | ac.causal & ac.prefix(2), None),
        (lambda q_idx, kv_idx: q_idx == kv_idx, "0"),
    ],
)
def test_how_far_back_a_mask_shows_keys(mask, reach):
    found = continuation(ac.Variant(mask=mask).graph)
    assert (None if found.reach is None else formula(found.reach)) == reach


def test_what_inputs_have_for_each_key_goes_with_the_keys():
    graph = ac.Variant(mask=LOCAL & ac.document(), score=ac.alibi()).graph
    assert continuation(graph).by_key == ("doc",)


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        (ac.Variant(), "a query may see keys of later tokens"),
        (ac.Variant(mask=ac.window(3, 1)), "a query may see keys of later tokens"),
        (ac.variants.get("slots"), "it normalizes over queries"),
        (ac.variants.get("forgetting"), "it sums an input along all tokens"),
        (ac.variants.get("sigmoid"), "it asks how many tokens there are"),
        (ac.Variant(mask=ac.causal, dead_rows="open"), "they see all keys"),
        (ac.Variant(mask=ac.causal, score=ac.bias()), "'bias' has an entry for each pair"),
        (ac.Variant(mask=LOCAL, score=lambda score, kv_idx: score - 0.1 * kv_idx), "it counts tokens from the first"),
        (
            ac.Variant(
                mask=LOCAL & (lambda b, q_idx, step: step[b, q_idx - 1] > 0),
                inputs={"step": ac.Input("b", "q_idx", dtype="int")},
            ),
            "reads what another query has",
        ),
        (
            ac.Variant(
                mask=LOCAL, score=lambda score, kv_idx, t: score + t[kv_idx % 4], inputs={"t": ac.Input("phase")}
            ),
            "it counts tokens from the first",
        ),
    ],
)
def test_what_cannot_go_on_is_refused_with_the_reason(variant, reason):
    with pytest.raises(UnsupportedError) as caught:
        continuation(variant.graph)
    assert reason in caught.value.reason


def test_tokens_may_be_counted_from_the_first_where_none_is_dropped():
    counted = ac.Variant(mask=ac.causal, score=lambda score, kv_idx: score - 0.1 * kv_idx).graph
    assert continuation(counted).reach is None
    with pytest.raises(UnsupportedError, match="it counts tokens from the first"):
        packed(counted)


def test_packed_sequences_have_an_input_that_says_which_is_whose():
    found = packed(ac.Variant(name="local", mask=LOCAL).graph)
    assert [(d.name, d.pattern) for d in found.inputs] == [(SEQUENCE, ("b", "kv_idx"))]
    assert f"{SEQUENCE}[b, kv_idx]" in formula(found["mask"].expr)
