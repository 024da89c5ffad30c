"""Auxiliary outputs in both forms of the language: the same graph, and errors that point at the fault."""

from __future__ import annotations

import pytest

import attncc as ac
from attncc.errors import SpecError, UnsupportedError
from attncc.ir.text import output_text, to_text

ready = ac.outputs
INPUTS = {"gain": ac.Input("h", grad=True), "segment": ac.Input("b", "kv_idx", dtype="int")}

#: name: (the Python form, the text form, what the IR prints)
FORMS = {
    "entropy": (ready.entropy, "entropy", "-row.sum(weight*log(weight))"),
    "row_max": (ready.row_max, "row_max", "row.max(score)"),
    "argmax": (ready.argmax, "argmax", "row.argmax(weight)"),
    "top1": (ready.top1_prob, "top1_prob", "row.max(weight)"),
    "head": (ready.row_mass(0, 5), "row_mass(0, 5)", "row.sum(weight, kv_idx < 5)"),
    "tail": (ready.row_mass(-4), "row_mass(-4)", "row.sum(weight, kv_idx >= kv_len - 4)"),
    "seen": (
        ready.row_mass(lambda b, kv_idx, segment: segment[b, kv_idx] == 2),
        "row.sum(weight, segment[b, kv_idx] == 2)",
        "row.sum(weight, segment[b, kv_idx] == 2)",
    ),
    "segment2": (ready.segment_mass(2), "segment_mass(2)", "row.sum(weight, segment[b, kv_idx] == 2)"),
    "received": (ready.received, "received", "col.sum(weight)"),
    "recent": (
        ready.column_mean(-3),
        "column_mean(-3)",
        "col.sum(weight, q_idx >= q_len - 3)/maximum(col.count(q_idx >= q_len - 3), 1)",
    ),
    "blocks": (ready.block_sums(4, 32), "block_sums(4, 32)", "block(4, 32).sum(weight)"),
    "diagonals": (ready.offset_sums(), "offset.sum(weight)", "offset.sum(weight)"),
    "near": (ready.offset_sums(-8, 0), "offset(-8, 0).sum(weight)", "offset(-8, 0).sum(weight)"),
    "last": (ready.last_rows(3), "last_rows(3)", "pair(-3).sum(weight)"),
    "map": (ready.weights(), "pair.sum(weight)", "pair.sum(weight)"),
    "scores": (ready.scores(limit=2**20), "scores(limit=1048576)", "pair.max(score)"),
    "mean_score": (
        lambda score, row: row.mean(score),
        "row.mean(score)",
        "row.sum(score)/maximum(row.count(), 1)",
    ),
    "lowest": (lambda score, col: col.min(score), "col.min(score)", "-col.max(-score)"),
    "ratio": (
        lambda weight, row, q_idx, kv_idx, gain, h: gain[h] * row.sum(weight, q_idx - kv_idx < 4) / row.sum(weight),
        "gain[h]*row.sum(weight, q_idx - kv_idx < 4)/row.sum(weight)",
        "where(row.count() > 0, row.sum(weight, q_idx - kv_idx < 4)*gain[h]/row.sum(weight), 0)",
    ),
}


def in_text(texts):
    lines = ["[inputs]", 'gain = {index = ["h"], grad = true}', 'segment = {index = ["b", "kv_idx"], dtype = "int"}']
    lines += ["[stages]", 'score = "score * gain[h]"', "[outputs]"]
    return ac.loads_toml("\n".join([*lines, *(f'{name} = "{text}"' for name, text in texts.items())]))


def scored(outputs):
    return ac.Variant(inputs=INPUTS, score=lambda score, gain, h: score * gain[h], outputs=outputs)


@pytest.mark.parametrize("name", FORMS)
def test_both_forms_give_one_graph(name):
    python, text, printed = FORMS[name]
    reads = {"keeps": lambda b, weight, row, kv_idx, segment: row.sum(weight * segment[b, kv_idx])}
    variant = scored({name: python, **reads})
    other = in_text({name: text, "keeps": "row.sum(weight * segment[b, kv_idx])"})
    assert variant.graph == other.graph
    assert output_text(variant.graph.output(name)) == printed
    again = in_text({name: printed, "keeps": "row.sum(weight * segment[b, kv_idx])"})
    assert again.graph == variant.graph


def test_outputs_leave_the_core_and_its_digest_alone():
    plain = ac.Variant(inputs={"gain": INPUTS["gain"]}, score=lambda score, gain, h: score * gain[h])
    variant = scored({name: python for name, (python, _, _) in FORMS.items()})
    assert variant.graph.digest != plain.graph.digest
    assert variant.graph.core.digest == plain.graph.digest
    assert [d.name for d in variant.graph.core.inputs] == ["gain"]
    assert [d.name for d in variant.graph.select(("seen",)).inputs] == ["gain", "segment"]
    assert "output" not in to_text(variant.graph.core)


def test_outputs_are_added_to_a_finished_variant():
    variant = ac.variants.get("alibi").with_outputs(entropy=ready.entropy, mass=ready.segment_mass(1))
    assert [o.name for o in variant.graph.outputs] == ["entropy", "mass"]
    assert {d.name for d in variant.graph.inputs} == {"slopes", "segment"}
    assert variant.graph.core == ac.variants.get("alibi").graph
    with pytest.raises(SpecError, match="already has an output 'entropy'"):
        variant.with_outputs(entropy=ready.received)
    with pytest.raises(SpecError, match="declare 'slopes' differently"):
        variant.with_outputs(other=ready.segment_mass(1, "slopes"))


def test_the_order_in_which_a_formula_mentions_reductions_does_not_matter():
    one = ac.Variant(outputs={"x": lambda weight, score, row: row.sum(weight * score) + row.max(score)})
    two = ac.Variant(outputs={"x": lambda weight, score, row: row.max(score) + row.sum(weight * score)})
    assert one.graph == two.graph


@pytest.mark.parametrize(
    ("text", "pointed", "message"),
    [
        ("weight", "weight", "'weight' is not reduced"),
        ("row.sum(weight) + col.sum(weight)", "row.sum(weight) + col.sum(weight)", "over row and over col"),
        ("row.sum(row.max(score))", "row.sum(row.max(score))", "over a value that is itself reduced"),
        ("block.sum(weight)", "block.sum", "'block' needs its sizes"),
        ("block(100, 3).sum(weight)", "block(100, 3).sum(weight)", "100 cannot be tiled"),
        ("offset(3, 1).sum(weight)", "offset(3, 1).sum(weight)", "offset(3, 1) is empty"),
        ("pair(0.5).sum(weight)", "pair(0.5).sum(weight)", "takes plain integers, got 0.5"),
        ("col.foo(weight)", "col.foo", "no col reduction is called 'foo'"),
        ("offset.max(weight)", "offset.max(weight)", "offset.max is not a reduction"),
        ("row(3).sum(weight)", "row(3)", "'row' takes no arguments"),
        ("row", "row", "must be followed by a reduction"),
        ("row.sum(weight, q_idx)", "row.sum(weight, q_idx)", "expected a boolean"),
        ("row.sum(weigth)", "weigth", "did you mean 'weight'"),
        ("row.sum(v_vec)", "v_vec", "only the reduction stage sees the value vectors"),
        ("row.sum(weight) * kv_idx", "row.sum(weight) * kv_idx", "'kv_idx' stands outside of the row reductions"),
        ("row.sum(weight, 1 > 0, 2)", "row.sum(weight, 1 > 0, 2)", "takes 1 or 2 argument"),
    ],
)
def test_the_caret_stands_under_the_fault(text, pointed, message):
    with pytest.raises(SpecError) as caught:
        ac.loads_toml(f'[outputs]\nx = "{text}"\n', file="spec.toml")
    span = caught.value.span
    assert message in str(caught.value)
    assert str(caught.value).startswith("spec.toml:2: output 'x'")
    assert span.text[span.col : span.end_col] == pointed


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ac.Variant(outputs={"out": ready.entropy}), "'out' cannot name an output"),
        (lambda: ac.Variant(outputs={"a b": ready.entropy}), "'a b' cannot name an output"),
        (lambda: ac.Variant(outputs={"x": 3}), "int is no output"),
        (lambda: ac.Variant(outputs={"x": ac.causal}), "is no output"),
        (lambda: ready.last_rows(0), "there is no such row"),
        (lambda: ac.Variant(score=lambda score, col: score), "does not see the name 'col'"),
        (lambda: ac.loads_toml("[outputs]\nx = 3"), "the output 'x' must be a string"),
        (lambda: ac.Variant(outputs={"x": lambda weight, row: row.sum(weight) + weight}), "outside of the row"),
    ],
)
def test_faults_of_declarations(build, message):
    with pytest.raises(SpecError, match=message):
        build()


def test_an_output_of_several_branches_is_refused():
    with pytest.raises(UnsupportedError, match="does not say whose weight it means"):
        ac.Variant(
            branches=2,
            reduction=lambda weight, v_vec, row: row.sum((weight[0] - weight[1]) * v_vec),
            outputs={"entropy": ready.entropy},
        )
