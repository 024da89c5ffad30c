"""The one-pass form: what is derived, what it computes, and what is refused with which reason."""

from __future__ import annotations

import re

import pytest
import torch

import attncc as ac
from attncc.errors import UnsupportedError
from attncc.ir.text import formula
from attncc.passes.stream import any_shift_serves, stream
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
        ("softmax", ["score"], ["exp(score - row_max_0)"], "1/row_sum_0", "row_max_0 + log(row_sum_0)"),
        ("cog", ["abs(score)"], ["exp(abs(score) - row_max_0)"], "1/row_sum_0", "row_max_0 + log(row_sum_0)"),
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
    seen = pairs.visible.any(-1, keepdim=True)
    got = torch.where(seen, rows["acc"] * pairs.rows(online.coefficient * online.scale, rows), 0.0)
    torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-12)
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


def two_thresholds(score, row):
    """The keys above the mean, and of those above their own mean."""
    above = ac.relu(score - row.mean(score))
    return ac.relu(above - row.mean(above))


@pytest.mark.parametrize(
    ("normalizer", "sweeps", "reason"),
    [
        (lambda score, row: ac.relu(score - row.max(score) + 1), [{"row_max_0"}], "cannot be rescaled(.*)on the key"),
        (
            lambda score, row: ac.softplus(score - row.max(score)) / row.sum(ac.softplus(score - row.max(score))),
            [{"row_max_0"}],
            "cannot be rescaled",
        ),
        (needs_a_sum, [{"row_max_0", "row_sum_0"}], "row.sum(.*)needs row_sum_0 whole"),
        (sum_in_the_weight, [{"row_sum_0", "row_sum_1"}], "the weight needs row_sum_0 and row_sum_1"),
        (maximum_of_a_sum, [{"row_sum_0"}], "row.max(.*)needs row_sum_0 whole"),
        (two_thresholds, [{"row_sum_0", "row_sum_1"}, {"row_sum_2"}], "needs row_sum_0 and row_sum_1 whole"),
        (ac.entmax15, [{"row_max_0"}, {"row_root_0"}], "row_root_0 takes sweeps of its own"),
    ],
    ids=["relu", "softplus", "needs_a_sum", "sum_in_the_weight", "maximum_of_a_sum", "two_thresholds", "entmax15"],
)
def test_what_must_be_whole_takes_a_pass_before(normalizer, sweeps, reason):
    online = of(normalizer)
    found = [{*(m.name for m in s.max_symbols), *(r.symbol.name for r in s.sums)} for s in online.before]
    found = [names | ({s.root.symbol.name} if s.root else set()) for names, s in zip(found, online.before, strict=True)]
    assert found == sweeps
    assert re.search(reason, online.before[0].reason)
    assert online.passes == len(sweeps) + 1
    assert online.proof[-1].endswith(f"the last of {online.passes} passes over the keys")


def test_a_sum_that_the_last_pass_can_do_is_left_to_it():
    online = stream(ac.variants.get("min_p").graph)
    assert [m.name for m in online.before[0].max_symbols] == ["row_max_0"]
    assert online.before[0].sums == ()
    assert [r.symbol.name for r in online.sums] == ["row_sum_0"]


def test_a_threshold_that_knows_no_statistic_streams():
    online = stream(ac.variants.get("top_theta").graph)
    assert online.before == ()
    assert rescales(online)["row_sum_0"] == "exp(row_max_0 - row_max_0_new)"


def test_a_reduction_that_is_not_linear_in_the_weight_is_refused():
    squared = ac.Variant(reduction=lambda weight, v_vec, row: row.sum(weight**2 * v_vec))
    with pytest.raises(UnsupportedError, match="is not the weight times a factor"):
        stream(squared.graph)


@pytest.mark.parametrize(
    ("name", "serves"),
    [
        ("causal", True),
        ("softmax1", True),
        ("alibi", True),
        ("cog", True),
        ("sink", True),
        ("top_theta", False),
        ("sigmoid", False),
    ],
)
def test_whether_a_number_near_the_maximum_serves_as_well(name, serves):
    """Not where the maximum itself is stored, nor where there is none."""
    online = stream(ac.variants.get(name).graph)
    stored = [] if online.lse is None else [online.lse]
    if name == "top_theta":
        stored = list(online.max_symbols)
    assert any_shift_serves(online, stored) is serves


def test_a_row_factor_that_reads_the_maximum_wants_the_maximum():
    def by_peak(score, row):
        p = ac.exp(score - row.max(score))
        return p / row.sum(p) * row.max(score)

    assert not any_shift_serves(of(by_peak), [])


def test_the_larger_of_the_maximum_and_a_sink_may_be_any_number_the_maximum_beside_it_may_not():
    def with_sink(score, row, left_out):
        m = ac.maximum(row.max(score), 3.0)
        p = ac.exp(score - m)
        return p / (row.sum(p) + left_out(row.max(score), m))

    online = of(lambda score, row: with_sink(score, row, lambda peak, m: ac.exp(3.0 - m)))
    assert any_shift_serves(online, [online.lse])
    assert not any_shift_serves(of(lambda score, row: with_sink(score, row, lambda peak, m: ac.exp(3.0 - peak))), [])
    assert not any_shift_serves(of(lambda score, row: with_sink(score, row, lambda peak, m: 1.0)), [])


def test_a_factor_common_to_a_case_and_its_condition_comes_out():
    """relu(exp(s - m) - exp(-m)) is exp(-m) relu(exp(s) - 1); its factor is one exponential, for two would overflow."""
    online = stream(variant("softpick").graph)
    assert online.passes == 1
    factor = "exp(maximum(row_max_0, 0) - maximum(row_max_0_new, 0))"
    assert rescales(online) == {"acc": factor, "row_sum_0": factor}
