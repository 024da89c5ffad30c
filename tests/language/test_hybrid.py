"""Hybrids as a user writes them: both forms give one graph, and what is wrong is said with its place."""

from __future__ import annotations

import pytest

import attncc as ac
from attncc.errors import SpecError

NEAR = ac.Variant(name="near", mask=ac.causal & ac.sliding_window("window"))
FAR = ac.variants.get("simple_gla")
TEXT = """
name = "layer"
combine = "far + sigmoid(gate[b, h, q_idx]) * near"
[parts.near.stages]
mask = "causal and sliding_window('window')"
[parts.far.stages]
score = "gate('g')"
mask = "causal(align='start')"
normalizer = "identity"
[inputs]
gate = { index = ["b", "h", "q_idx"], grad = true }
"""


def layer(combine=lambda near, far, b, h, q_idx, gate: far + ac.sigmoid(gate[b, h, q_idx]) * near, **changes):
    given = {"parts": {"near": NEAR, "far": FAR}, "inputs": {"gate": ac.Input("b", "h", "q_idx", grad=True)}}
    return ac.Hybrid(name="layer", combine=combine, **{**given, **changes})


def test_both_forms_are_one_graph():
    far = ac.Variant(score=ac.gate("g"), mask=ac.causal(align="start"), normalizer=ac.identity)
    assert ac.loads_toml(TEXT).graph.digest == layer(parts={"near": NEAR, "far": far}).graph.digest


def test_the_inputs_of_all_parts_are_those_of_the_hybrid():
    graph = layer().graph
    assert [d.name for d in graph.inputs] == ["g", "gate"]
    assert [s.name for s in graph.scalars] == ["window"]
    assert layer().parts["near"].graph == NEAR.graph


def test_a_part_of_a_text_may_be_a_file_beside_it(tmp_path):
    (tmp_path / "memory.toml").write_text('[recurrence]\nstate = "state + k_vec * v_vec"\n')
    text = 'combine = "near + far"\n[parts]\nfar = "memory.toml"\n[parts.near.stages]\nmask = "causal"\n'
    (tmp_path / "layer.toml").write_text(text)
    found = ac.load_toml(tmp_path / "layer.toml")
    assert found.name == "layer"
    assert found.parts["far"].graph.recurrent
    assert found.parts["near"].name == "near"


@pytest.mark.parametrize(
    ("make", "reason", "place"),
    [
        (lambda: layer(parts={"near": NEAR}), "two parts or more, and this has 1", None),
        (lambda: layer(parts={"near": NEAR, "far": "retention"}), "'far' is of type str", None),
        (lambda: layer(parts={"near": NEAR, "row": FAR}), "the part name 'row' already means something else", None),
        (lambda: layer(parts={"near": NEAR, "gate": FAR}), "'gate' names a part and an input", None),
        (
            lambda: layer(parts={"near": NEAR, "far": ac.variants.get("differential")}),
            "'far' has 2 branches in q, and parts share q, k and v",
            None,
        ),
        (
            lambda: layer(parts={"near": NEAR, "far": ac.variants.get("mla")}),
            "'far' takes its values from k, and parts share q, k and v",
            None,
        ),
        (
            lambda: layer(
                parts={"near": NEAR, "far": ac.variants.get("flash_window")}, inputs={"left": ac.Scalar(1.5)}
            ),
            "'far' and 'combine' declare 'left' differently",
            None,
        ),
        (lambda: layer(lambda near, far: near + far), "'gate' is declared, but the combination does not", "near + far"),
        (lambda: layer(lambda near, gate, b, h, q_idx: near * gate[b, h, q_idx]), "'far' is declared, but", "near * "),
        (lambda: layer(lambda near, far, kv_idx: near), "does not see the name 'kv_idx'", "near)"),
        (lambda: layer(lambda near, far, q_idx: near * q_idx), "computes with q_idx", "near * q_idx"),
        (
            lambda: layer(lambda near, far, gate, b, h: near * gate[b, h, 0]),
            "'gate[b, h, 0]': a combination reads what an input has at the place of the row",
            "near * gate",
        ),
        (lambda: layer(lambda near, far: near < far), "expected a number", "near < far"),
    ],
)
def test_what_is_wrong_is_said(make, reason, place):
    with pytest.raises(SpecError) as caught:
        make()
    assert reason in caught.value.reason
    if place is not None:
        assert place in caught.value.span.text
        assert caught.value.stage == "combine"


@pytest.mark.parametrize(
    ("old", "new", "location", "reason"),
    [
        ("+ sigmoid(", "+ sigmod(", "layer.toml:3", "no function is called 'sigmod'"),
        ("* near", "* nera", "layer.toml:3", "does not see the name 'nera'"),
        ('combine = "far + sigmoid(gate[b, h, q_idx]) * near"', "", "layer.toml", "nothing says how the parts combine"),
        ("causal and", "kausal and", "layer.toml:5", "does not see the name 'kausal'"),
        ("gate = {", "h = {", "layer.toml:11", "'h' already means something else"),
        ("[parts.far.stages]", "[parts.far.stage]", "layer.toml:6", "unknown table 'stage'"),
        ("[inputs]", "[outputs]", "layer.toml:10", "unknown table 'outputs'"),
        ("name =", "stages = 1\nname =", "layer.toml:2", "unknown key 'stages'"),
    ],
)
def test_what_is_wrong_in_a_text_is_said_with_its_place(old, new, location, reason):
    assert old in TEXT
    with pytest.raises(SpecError) as caught:
        ac.loads_toml(TEXT.replace(old, new), file="layer.toml")
    assert reason in caught.value.reason
    assert str(caught.value).startswith(location) or location == "layer.toml"


def test_a_combination_without_parts_is_told_where_they_stand():
    with pytest.raises(SpecError) as caught:
        ac.loads_toml('combine = "near + far"\n[stages]\nmask = "causal"\n')
    assert caught.value.remedy == "a hybrid has its variants under [parts]"


def test_a_hybrid_of_hybrids_is_refused_and_so_is_one_of_itself(tmp_path):
    path = tmp_path / "layer.toml"
    path.write_text('combine = "near + far"\n[parts]\nfar = "layer.toml"\n[parts.near.stages]\nmask = "causal"\n')
    with pytest.raises(SpecError, match="'far' is a hybrid itself"):
        ac.load_toml(path)
