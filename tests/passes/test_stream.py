"""The one-pass form: what is derived, what it computes, and what is refused with which reason."""

from __future__ import annotations

import pytest
import torch

import attncc as ac
from attncc.errors import UnsupportedError
from attncc.ir.text import formula
from attncc.passes.stream import stream
from attncc.runtime.reference import log_denominator, reference
from attncc.runtime.samples import Shape, sample_inputs

from .dense import NAMES, UNSHIPPED, Pairs, variant

SHAPE = Shape(2, 4, 2, 7, 11, 4, 3)


def of(normalizer):
    return stream(ac.Variant(normalizer=normalizer).graph)


def rescales(online):
    return {name: formula(factor) for name, factor in online.merge().items()}


@pytest.mark.parametrize(
    ("name", "maxima", "sums", "scale", "lse"),
    [
        ("softmax", ["score"], ["exp(-row_max_0 + score)"], "1/row_sum_0", "row_max_0 + log(row_sum_0)"),
        ("cog", ["abs(score)"], ["exp(-row_max_0 + abs(score))"], "1/row_sum_0", "row_max_0 + log(row_sum_0)"),
        ("taylor", [], ["score**2/2 + score + 1"], "1/row_sum_0", "log(row_sum_0)"),
        ("sigmoid", [], [], "1", None),
        ("relu", [], [], "1/kv_len", None),
        ("relu2", [], [], "1/kv_len", None),
    ],
)
def test_plans_of_shipped_normalizers(name, maxima, sums, scale, lse):
    online = of(name)
    assert [formula(g) for _, g in online.maxes] == maxima
    assert [formula(r.term) for r in online.sums] == sums
    assert formula(online.scale) == scale
    assert (online.lse if online.lse is None else formula(online.lse)) == lse
    assert online.proof[-1].endswith("one pass over the keys")


def test_factors_are_derived_not_looked_up():
    ratio = "exp(row_max_0 - row_max_0_new)"
    assert rescales(of("softmax")) == {"acc": ratio, "row_sum_0": ratio}
    assert rescales(of("sigmoid")) == {"acc": "1"}
    assert rescales(stream(UNSHIPPED["unit_length"].graph)) == {
        "acc": ratio,
        "row_sum_0": "exp(2*row_max_0 - 2*row_max_0_new)",
    }
    assert rescales(stream(UNSHIPPED["squares"].graph)) == {
        "acc": "row_max_0**2/row_max_0_new**2",
        "row_sum_0": "row_max_0**2/row_max_0_new**2",
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_computes_the_variant(name):
    graph = variant(name).graph
    online = stream(graph)
    sample = sample_inputs(graph, SHAPE, torch.float64)
    pairs = Pairs(graph, sample)
    rows = pairs.accumulate(online)
    exact = reference(variant(name), sample.q, sample.k, sample.v, **sample.inputs)
    torch.testing.assert_close(
        rows["acc"] * pairs.rows(online.coefficient * online.scale, rows), exact, rtol=1e-10, atol=1e-12
    )
    if online.lse is None:
        with pytest.raises(UnsupportedError, match="no row statistic"):
            log_denominator(graph)
    else:
        lse = reference(variant(name), sample.q, sample.k, sample.v, outputs="lse", **sample.inputs)
        torch.testing.assert_close(pairs.rows(online.lse, rows)[..., 0], lse, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_partial_results_over_different_keys_merge(name):
    graph = variant(name).graph
    online = stream(graph)
    sample = sample_inputs(graph, SHAPE, torch.float64, seed=1)
    pairs = Pairs(graph, sample)
    # a partial that saw no key has no maximum to start from
    pairs.visible = torch.ones(pairs.shape, dtype=torch.bool)
    key = pairs.env["kv_idx"]
    thirds = (key < 3, (key >= 3) & (key % 2 == 0), (key >= 3) & (key % 2 == 1))
    parts = [pairs.accumulate(online, third) for third in thirds]
    whole, merged = pairs.accumulate(online), pairs.merged(online, parts)
    assert whole.keys() == merged.keys()
    for accumulator, value in whole.items():
        torch.testing.assert_close(merged[accumulator], value, rtol=1e-10, atol=1e-12)
    two = pairs.merged(online, [pairs.merged(online, parts[:2]), parts[2]])
    torch.testing.assert_close(two["acc"], whole["acc"], rtol=1e-10, atol=1e-12)


def needs_a_sum(score, row):
    p = ac.exp(score - row.max(score))
    return ac.exp(score - row.sum(p)) / row.sum(ac.exp(score - row.sum(p)))


def sum_in_the_weight(score, row):
    return ac.relu(score - row.mean(score))


def maximum_of_a_sum(score, row):
    return ac.exp(score - row.max(score * row.sum(score)))


@pytest.mark.parametrize(
    ("normalizer", "reason"),
    [
        (
            lambda score, row: ac.relu(score - row.max(score) + 1),
            "cannot be rescaled when the running maximum moves(.|\n)*depends on the key: two passes",
        ),
        (
            lambda score, row: ac.softplus(score - row.max(score)) / row.sum(ac.softplus(score - row.max(score))),
            "cannot be rescaled",
        ),
        (needs_a_sum, "row.sum(.|\n)*needs row_sum_0 over all keys first"),
        (sum_in_the_weight, "needs its row sums before the first key is weighted"),
        (maximum_of_a_sum, "row.max(.|\n)*needs row_sum_0 over all keys first"),
    ],
    ids=["relu", "softplus", "needs_a_sum", "sum_in_the_weight", "maximum_of_a_sum"],
)
def test_two_passes_are_refused_with_the_reason(normalizer, reason):
    with pytest.raises(UnsupportedError, match=reason) as refused:
        of(normalizer)
    assert "test_stream.py" in str(refused.value)


def test_a_reduction_that_is_not_linear_in_the_weight_is_refused():
    squared = ac.Variant(reduction=lambda weight, v_vec, row: row.sum(weight**2 * v_vec))
    with pytest.raises(UnsupportedError, match="is not the weight times a factor"):
        stream(squared.graph)
