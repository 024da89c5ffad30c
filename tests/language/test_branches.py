"""Variants with several branches: both forms give one IR, a branch is a variant of its own, and faults have a caret."""

from __future__ import annotations

import pytest

import attncc as ac
from attncc.errors import SpecError
from attncc.ir.formulas import stage_texts
from attncc.ir.text import to_text
from attncc.passes.lint import lint

LAM = {"lam": ac.Input("h", grad=True)}
TEXT = """
name = "differential"
branches = 2
[stages]
mask = "causal"
reduction = "{}"
[inputs]
lam = {{ index = ["h"], grad = true }}
"""


def difference(weight, lam, h, row, v_vec):
    return row.sum((weight[0] - lam[h] * weight[1]) * v_vec)


def of_sums(weight, lam, h, row, v_vec):
    return row.sum(weight[0] * v_vec) - lam[h] * row.sum(weight[1] * v_vec)


def differential(reduction=difference, **more):
    return ac.Variant(name="differential", branches=2, mask=ac.causal, reduction=reduction, inputs=LAM, **more)


def test_every_way_to_write_it_is_one_graph():
    graph = differential().graph
    texts = ("row.sum((weight[0] - lam[h] * weight[1]) * v_vec)", "row.sum(weight[0]*v_vec - lam[h]*weight[1]*v_vec)")
    for variant in (differential(of_sums), *(ac.loads_toml(TEXT.format(text)) for text in texts)):
        assert variant.graph == graph
        assert to_text(variant.graph) == to_text(graph)
    assert (
        graph
        != differential(lambda weight, lam, h, row, v_vec: row.sum((weight[0] + lam[h] * weight[1]) * v_vec)).graph
    )


def test_a_branch_is_a_variant_of_its_own():
    first, second = differential().graph.parts
    plain = ac.variants.get("causal").graph
    for name in ("score", "mask", "row_max_0", "row_sum_0", "weight"):
        assert first[name].expr == second[name].expr == plain[name].expr
    assert first["out"].expr == plain["out"].expr
    factor = ac.Variant(reduction=lambda weight, lam, h, row, v_vec: row.sum(-lam[h] * weight * v_vec), inputs=LAM)
    assert second["out"].expr == factor.graph["out"].expr
    assert plain.parts == (plain,)


def test_stages_may_differ_by_branch():
    def score(score, branch):
        return score if branch == 0 else ac.tanh(score)

    def mask(q_idx, kv_idx, branch):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < 8 * (branch + 1))

    python = differential(score=score).graph
    text = ac.loads_toml(
        TEXT.format("row.sum((weight[0] - lam[h] * weight[1]) * v_vec)").replace(
            'mask = "causal"', 'mask = "causal"\nscore = "score if branch == 0 else tanh(score)"'
        )
    )
    assert text.graph == python
    found = stage_texts(python)
    assert [found[k] for k in ("score[0]", "score[1]")] == ["score", "tanh(score)"]
    assert found["reduction"] == "row.sum(v_vec*(weight[0] - weight[1]*lam[h]))"
    windows = ac.Variant(
        branches=2, mask=mask, reduction=lambda weight, row, v_vec: row.sum((weight[0] - weight[1]) * v_vec)
    )
    assert len({part["mask"].expr for part in windows.graph.parts}) == 2


def test_a_factor_of_a_row_may_stand_before_the_sum():
    gate = {"gate": ac.Input("b", "h", "q_idx", grad=True)}
    before = lambda weight, gate, b, h, q_idx, row, v_vec: gate[b, h, q_idx] * row.sum(weight * v_vec)
    inside = lambda weight, gate, b, h, q_idx, row, v_vec: row.sum(weight * gate[b, h, q_idx] * v_vec)
    text = ac.loads_toml(
        '[stages]\nreduction = "gate[b, h, q_idx] * row.sum(weight * v_vec)"\n'
        '[inputs]\ngate = { index = ["b", "h", "q_idx"], grad = true }'
    )
    assert (
        ac.Variant(reduction=before, inputs=gate).graph == ac.Variant(reduction=inside, inputs=gate).graph == text.graph
    )


@pytest.mark.parametrize(
    ("reduction", "pointed", "message"),
    [
        (
            "row.sum(lam[h] * weight * v_vec)",
            "lam[h] * weight",
            "2 branches, each with its own weight(.|\n)*weight\\[0",
        ),
        ("lam[h] * row.sum(weight[2] * v_vec)", "weight[2]", "weight\\[0\\] to weight\\[1\\]: there is no weight\\[2"),
        ("row.sum(weight[h] * lam[h] * v_vec)", "weight[h]", "a branch is a constant"),
        ("row.sum(weight[0] * weight[1] * lam[h] * v_vec)", None, "is no sum of the branches' weights"),
        ("lam[h] * row.sum(weight[0] * v_vec)", None, "does not use weight\\[1\\]"),
        ("lam[h] * weight[0]", None, "must be one row.sum\\(... \\* v_vec\\)"),
        ("row.sum(weight[0] * v_vec) * weight[1] * lam[h]", None, "'weight\\[1\\]' is used outside of a row.sum"),
        ("lam[h] * row.sum((weight[0] + weight[1]) * v_vec) + 1", None, "is not linear in row.sum"),
        ("row.sum((weight[0] + weight[1] + branch) * v_vec)", "branch", "the reduction sees the weight of each"),
    ],
)
def test_faults_of_the_reduction(reduction, pointed, message):
    with pytest.raises(SpecError, match=message) as caught:
        ac.loads_toml(TEXT.format(reduction), file="spec.toml")
    text = str(caught.value).splitlines()
    assert text[0].startswith("spec.toml:6: reduction: ")
    assert text[2].count("^") == len(pointed or reduction)
    assert text[1][text[2].index("^") :].startswith(pointed or reduction)


def test_the_number_of_branches_is_checked():
    for count in (0, 5, True, "2"):
        with pytest.raises(SpecError, match="branches is .*(.|\n)*1 to 4 branches"):
            ac.Variant(branches=count)
    with pytest.raises(SpecError, match=r"spec.toml:1: branches is 'two'") as caught:
        ac.loads_toml("branches = 'two'", file="spec.toml")
    assert "^^^^^^^^" in str(caught.value)
    with pytest.raises(SpecError, match="does not see the name 'branch'(.|\n)*branches=2"):
        ac.Variant(score=lambda score, branch: score * branch)


def test_the_lint_looks_into_every_branch():
    def score(score, branch):
        return ac.exp(score) if branch else score

    found = [str(f) for f in lint(differential(score=score).graph)]
    assert sum("overflows" in f for f in found) == 1
    assert len(found) == len(set(found))
