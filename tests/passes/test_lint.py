"""Each finding on the smallest formula that has it, and its absence on the nearest one that has not."""

import itertools

import numpy as np
import pytest
import torch

from attncc import variants
from attncc.language.textform import from_texts, loads_toml
from attncc.passes.bounds import Extent, extent
from attncc.passes.lint import lint
from attncc.passes.numeric import evaluate
from attncc.passes.trials import hidden_row
from attncc.runtime.evaluate import evaluate as reference


def found(level, **stages):
    return [f for f in lint(from_texts(**stages).graph) if f.level == level]


#: what these show depends on what the caller passes, and may be nothing
MAY_SEE_NOTHING = ("isolation", "alignment", "pooling")


@pytest.mark.parametrize("name", variants.names())
def test_what_ships_has_no_errors_and_no_warnings(name):
    findings = [str(f) for f in lint(variants.get(name).graph) if f.level != "note"]
    if name == "shared_weights":  # nobody knows the denominator that it is given
        assert [f for f in findings if "exp(score - total[b, h, q_idx]) overflows" in f] == findings != []
        return
    assert len(findings) == (name in MAY_SEE_NOTHING)
    assert all("a query may see no key" in finding for finding in findings)


@pytest.mark.parametrize(
    ("mask", "example"),
    [
        ("kv_idx < q_idx", "q_len=1, kv_len=1, q_idx=0"),
        ("q_idx - kv_idx > 3", "q_len=1, kv_len=1, q_idx=0"),
        ("kv_idx >= 2", "q_len=1, kv_len=1, q_idx=0"),
        ("kv_idx <= q_idx and q_idx - kv_idx < 9 and kv_idx < 20", "q_len=43, kv_len=43, q_idx=28"),
    ],
)
def test_a_hidden_row_has_a_smallest_example_that_is_real(mask, example):
    graph = from_texts(mask=mask).graph
    assert hidden_row(graph, more_queries=False) == example
    sizes = dict(part.split("=") for part in example.split(", "))
    env = {name: int(value) for name, value in sizes.items()} | {"kv_idx": torch.arange(int(sizes["kv_len"]))}
    assert not reference(graph["mask"].expr, env).any()


@pytest.mark.parametrize("mask", ["True", "causal", "window(3, 2)", "block_diagonal(4)", "causal & document()"])
def test_masks_that_always_show_a_key_have_no_warning(mask):
    assert found("warning", mask=mask) == []


def test_more_queries_than_keys_is_a_note():
    (finding,) = found("note", mask="causal")
    assert "q_len=2, kv_len=1, q_idx=0" in finding.reason


def test_an_input_that_hides_a_row_is_named():
    (finding,) = found("warning", mask="padding('lengths')")
    assert "lengths all 0" in finding.reason


def test_a_query_that_hides_itself_is_meant_to_see_nothing():
    gate = '[inputs]\ngate = { index = ["b", "h", "q_idx"] }'
    closed = "gate[b, h, q_idx] != 0"
    assert lint(loads_toml(f"[stages]\nmask = '{closed}'\n{gate}").graph) == ()
    found = lint(loads_toml(f"[stages]\nmask = 'kv_idx < q_idx and {closed}'\n{gate}").graph)
    assert "a query may see no key" in found[0].reason


def test_a_window_of_scalars_is_tried_at_its_default():
    text = '[stages]\nmask = "kv_idx < reach and q_idx - kv_idx < 5"\n[scalars]\nreach = 100\n'
    (finding,) = [f for f in lint(loads_toml(text).graph) if f.level == "warning"]
    assert "reach=100" in finding.reason


@pytest.mark.parametrize(
    ("normalizer", "score", "warns"),
    [
        ("exp(score) / row.sum(exp(score))", "score", True),
        ("exp(score - row.max(score)) / row.sum(exp(score - row.max(score)))", "score", False),
        ("exp(2 * score - row.max(score)) / row.sum(exp(2 * score - row.max(score)))", "score", True),
        ("exp(score) / row.sum(exp(score))", "20 * tanh(score)", False),
        ("exp(score) / row.sum(exp(score))", "200 * tanh(score)", True),
        ("exp(-abs(score)) / row.sum(exp(-abs(score)))", "score", False),
        ("exp(-score**2) / kv_len", "score", False),
        ("exp(score - maximum(row.max(score), 0)) / kv_len", "score", False),
        ("sigmoid(score) / kv_len", "exp(score)", True),
    ],
)
def test_an_exponential_that_nothing_bounds(normalizer, score, warns):
    reasons = [f.reason for f in found("warning", normalizer=normalizer, score=score)]
    assert any("overflows float32" in r for r in reasons) == warns, reasons


@pytest.mark.parametrize(
    ("normalizer", "words"),
    [
        ("relu(score) / row.sum(relu(score))", "which may be 0:"),
        ("relu(score) / (row.sum(relu(score)) + 0.001)", None),
        ("score / row.sum(score)", "may be 0 or change its sign"),
        ("abs(score) / row.sum(abs(score))", "which may be 0:"),
        ("(1 + score + score**2) / row.sum(1 + score + score**2)", None),
        ("(1 + 2 * score + score**2) / row.sum(1 + 2 * score + score**2)", "which may be 0"),
        ("sigmoid(score) / row.sum(sigmoid(score))", None),
        ("relu(score) / row.count()", None),
    ],
)
def test_a_denominator_that_may_vanish(normalizer, words):
    reasons = [f.reason for f in found("warning", normalizer=normalizer) if "divided by" in f.reason]
    assert [words in r for r in reasons] == ([True] if words else [])


def test_an_index_that_overflows_says_from_which_length():
    (finding,) = [f for f in found("warning", mask="(q_idx * kv_len + kv_idx) % 3 == 0") if "32-bit" in f.reason]
    assert "from 46,341 tokens" in finding.reason
    assert 46340 * 46340 <= 2**31 - 1 < 46341 * 46341
    assert not [f for f in found("warning", mask="causal") if "32-bit" in f.reason]


def table(index, mask="True"):
    text = f'[stages]\nscore = "score + t[{index}]"\nmask = "{mask}"\n[inputs]\nt = {{ index = ["n"] }}\n'
    return [f for f in lint(loads_toml(text).graph) if f.stage == "score"]


def test_indices_of_free_dimensions():
    (negative,) = table("q_idx - kv_idx")
    assert negative.level == "warning"
    assert "negative" in negative.reason
    (growing,) = table("q_idx - kv_idx", "kv_idx <= q_idx")
    assert growing.level == "note"
    assert "grow with the sequence" in growing.reason
    (bounded,) = table("minimum(abs(q_idx - kv_idx), 31)")
    assert "give it 32 entries" in bounded.reason


def test_indices_of_loop_dimensions():
    text = '[stages]\nscore = "score + t[{}]"\n[inputs]\nt = {{ index = ["kv_idx"] }}\n'
    assert not [f for f in lint(loads_toml(text.format("kv_idx")).graph) if f.stage == "score"]
    (finding,) = [f for f in lint(loads_toml(text.format("kv_idx + 1")).graph) if f.stage == "score"]
    assert finding.level == "warning"
    assert "dimension 'kv_idx' of size 4 is read at 4" in finding.reason


def test_what_is_not_derived():
    (error,) = found("error", reduction="row.sum(weight**2 * v_vec)")
    assert "is not the weight times a factor" in error.reason


def test_a_mask_without_bounds_is_a_note():
    assert any("no tile can be skipped" in f.reason for f in found("note", mask="dilated(3)"))
    assert not any("no tile can be skipped" in f.reason for f in found("note", mask="causal"))


def test_a_finding_points_at_the_users_text():
    (finding,) = found("warning", mask="kv_idx < q_idx")
    assert str(finding).startswith("<mask>:1: mask: a query may see no key")
    assert "^^^^" in str(finding)


EXPRESSIONS = [
    "abs(score) + 1",
    "tanh(score) * sigmoid(score) - gelu(score)",
    "silu(score) + softplus(score) - erf(score)",
    "where(score > 0, minimum(score, 3), maximum(score, -2))",
    "score**2 - 3 * score + relu(score)",
    "exp(-abs(score)) / (1 + score**2)",
    "sin(score) * cos(score) + sign(score)",
    "float(kv_idx % 3) + kv_idx // 2 - int(kv_idx > 1)",
]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_extents_hold_every_value_and_numpy_agrees_with_torch(text):
    expr = from_texts(score=text).graph["score"].expr
    scores = np.linspace(-30, 30, 241)[:, None]
    env = {"raw_score": scores, "kv_idx": np.arange(7)}
    values = evaluate(expr, env)
    exact = reference(expr, {name: torch.from_numpy(array) for name, array in env.items()})
    np.testing.assert_allclose(
        values, exact.expand(np.broadcast_shapes(values.shape, exact.shape)).numpy(), rtol=1e-9, atol=1e-14
    )
    bounds = extent(expr, {})
    assert bounds.lo <= values.min()
    assert values.max() <= bounds.hi
    if bounds.positive:
        assert (values > 0).all()


def test_an_extent_above_zero_is_positive():
    for lo, hi in itertools.combinations((-1.0, 0.0, 1.0), 2):
        assert Extent(lo, hi).positive == (lo > 0)
