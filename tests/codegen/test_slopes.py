"""What the Gluon backward keeps of a pair until dp is there."""

import pytest

import attncc as ac
from attncc.codegen.hopper_backward import hopper_backward_slots
from attncc.codegen.plan import Plan


def slots(name):
    variant = ac.variants.get(name) if isinstance(name, str) else name
    return hopper_backward_slots(Plan(variant.graph.core), 128, 128)


@pytest.mark.parametrize(
    ("name", "ds"),
    [
        ("causal", "dp * p"),
        ("image_gain", "dp * p * choice[:, None]"),  # a key's own factor does not wait
        ("elu1", "dp * slope"),
        ("top_theta", "p * (dp - product_1[None, :])"),
        ("head_gates", "slope * ((dp * gate_value_1[None, :]) - delta[None, :])"),
        ("softpick", "slope * shifted_2"),
        ("cosine", "dp * slope * value[:, None]"),
    ],
)
def test_one_value_a_pair_waits(name, ds):
    found = slots(name)
    assert f"ds = {ds}" in found["grad_lines"]
    assert not found["hide"]


@pytest.mark.parametrize(
    ("name", "gradients"),
    [
        ("bee_rag", ["dbeta_0_tile = ds"]),
        ("squared_distance", ["dk_term_0_0_tile = -0.5 * ds"]),
        ("key_gain", ["dgain_0_tile = dp * p * qk * scale"]),
    ],
)
def test_sums_a_key_are_made_of_what_is_there(name, gradients):
    assert slots(name)["grad_lines"][-len(gradients) :] == gradients


def test_what_a_query_has_is_read_again():
    found = slots("top_theta")
    assert found["late_rows"] == ["row_sum_0"]
    assert "choice_f = gl.where(holds_2, 1, 0).to(gl.float32)" in found["grad_lines"]
    assert [value.name for value in slots("head_gates")["late_asked"]] == ["gate_value_1"]
    assert slots("causal")["late_rows"] == []


def test_a_row_that_divides_by_0_is_hidden():
    """Rows past the end have sums of 0: what the slope is multiplied by may be infinite there."""

    def divided(score, row):
        return ac.exp(score) / (1 + row.sum(ac.exp(score))) ** 2

    def over(score, row):
        return ac.relu(score) / row.sum(ac.relu(score)) ** 2

    assert slots("bounded_sum")["hide"] == ["ds = gl.where(visible, ds, 0.0)"]
    for normalizer in (divided, over):
        variant = ac.Variant(normalizer=normalizer)
        assert slots(variant)["hide"] == ["ds = gl.where(visible, ds, 0.0)"]
        assert not Plan(variant.graph.core).facts.warps.slope
