"""Every fault of a spec in Python: what, why, and the user's own expression in his own file under the caret."""

from __future__ import annotations

import linecache
import math

import numpy
import pytest
import torch

import attncc as ac
from attncc.errors import SpecError

SLOPES = ac.Input("h", grad=True)
DOC = ac.Input("b", "kv_idx", dtype="int")
CAPTURED = torch.zeros(4)


def branching(score, q_idx):
    if q_idx > 3:
        return score
    return 0


def several_lines(score, q_idx):
    é = "é", q_idx + undefined  # noqa: F821
    return score, é


@pytest.mark.parametrize(
    ("build", "stage", "pointed", "message"),
    [
        (
            lambda: ac.Variant(score=lambda score, slops: score + slops, inputs={"slopes": SLOPES}),
            "score",
            "slops",
            "does not see the name 'slops'(.|\n)*did you mean 'slopes'",
        ),
        (
            lambda: ac.Variant(score=lambda score, temperature: score / temperature),
            "score",
            "temperature",
            "does not see the name 'temperature'(.|\n)*declare a tensor in inputs",
        ),
        (
            lambda: ac.Variant(mask=lambda q_idx, kv_idx: q_idx - kv_idx),
            "mask",
            "q_idx - kv_idx",
            "expected a boolean, got an index(.|\n)*did you mean a comparison",
        ),
        (
            lambda: ac.Variant(mask=lambda score: score > 0),
            "mask",
            "score",
            "does not see the name 'score'(.|\n)*before any score is known",
        ),
        (
            lambda: ac.Variant(mask=lambda q_idx, kv_idx: ac.exp(q_idx) - 2 * kv_idx),
            "mask",
            "ac.exp(q_idx) - 2 * kv_idx",
            "expected a boolean, got a number",
        ),
        (
            lambda: ac.Variant(normalizer=lambda score, v_vec: score * v_vec),
            "normalizer",
            "v_vec",
            "does not see the name 'v_vec'(.|\n)*only the reduction",
        ),
        (
            lambda: ac.Variant(score=lambda score, row: score - row.max(score)),
            "score",
            "row",
            "only the normalizer and the reduction",
        ),
        (
            lambda: ac.Variant(normalizer=lambda score, weight: weight),
            "normalizer",
            "weight",
            "only the reduction stage sees the weight",
        ),
        (lambda: ac.Variant(score=branching), "score", "q_idx > 3", "'q_idx > 3' has no truth value(.|\n)*where"),
        (
            lambda: ac.Variant(mask=lambda q_idx, kv_idx: kv_idx <= q_idx and q_idx - kv_idx < 9),
            "mask",
            "kv_idx <= q_idx and q_idx - kv_idx < 9",
            "no truth value(.|\n)*& | ~ for and",
        ),
        (
            lambda: ac.Variant(mask=lambda q_idx, kv_idx: 0 <= q_idx - kv_idx < 9),
            "mask",
            "0 <= q_idx - kv_idx < 9",
            "no truth value",
        ),
        (
            lambda: ac.Variant(normalizer=lambda score, row: row.topk(score, 8)),
            "normalizer",
            "row.topk",
            "no row reduction is called 'topk'(.|\n)*above a threshold: row.root",
        ),
        (
            lambda: ac.Variant(normalizer=lambda score, col: score / col.last),
            "normalizer",
            "col.last",
            "no col reduction is called 'last'(.|\n)*one of: col.max",
        ),
        (
            lambda: ac.Variant(score=lambda score: score + ac.cumsum(ac.sigmoid(score))),
            "score",
            "ac.cumsum(ac.sigmoid(score))",
            "a running sum along the keys of a row(.|\n)*in PyTorch, M x N",
        ),
        (
            lambda: ac.Variant(score=lambda score: max(score, 0)),
            "score",
            "max(score, 0)",
            "'score < 0' has no truth value(.|\n)*maximum and minimum for max",
        ),
        (
            lambda: ac.Variant(score=lambda score: math.exp(score)),
            "score",
            "math.exp(score)",
            "no Python number(.|\n)*ac.exp",
        ),
        (
            lambda: ac.Variant(score=lambda score: torch.exp(score)),
            "score",
            "torch.exp(score)",
            "raised TypeError(.|\n)*ac.exp",
        ),
        (
            lambda: ac.Variant(score=lambda score: score + CAPTURED),
            "score",
            "score + CAPTURED",
            "a tensor is captured(.|\n)*ac.Input",
        ),
        (
            lambda: ac.Variant(score=lambda score: CAPTURED * score),
            "score",
            "CAPTURED * score",
            "a tensor is captured(.|\n)*ac.Input",
        ),
        (
            lambda: ac.Variant(score=lambda score, h: score + CAPTURED[h]),
            "score",
            "CAPTURED[h]",
            "raised(.|\n)*tensors are inputs",
        ),
        (
            lambda: ac.Variant(score=lambda score, slopes: score * slopes, inputs={"slopes": SLOPES}),
            "score",
            "score * slopes",
            r"must be indexed(.|\n)*write slopes\[h\]",
        ),
        (
            lambda: ac.Variant(mask=lambda doc: doc == 3, inputs={"doc": DOC}),
            "mask",
            "doc == 3",
            r"must be indexed(.|\n)*write doc\[b, kv_idx\]",
        ),
        (
            lambda: ac.Variant(mask=lambda doc, b: doc[b] == 3, inputs={"doc": DOC}),
            "mask",
            "doc[b]",
            "has 2 dimensions .* read with 1 index",
        ),
        (
            lambda: ac.Variant(score=lambda score, slopes: slopes[score], inputs={"slopes": SLOPES}),
            "score",
            "slopes[score]",
            "'score' is a number, not an index",
        ),
        (
            lambda: ac.Variant(score=lambda score, q_idx: score // q_idx),
            "score",
            "score // q_idx",
            "// is for indices and integers",
        ),
        (lambda: ac.Variant(score=lambda score, q_idx: score + (q_idx > 3)), "score", "score + (q_idx > 3)", "boolean"),
        (
            lambda: ac.Variant(mask=lambda q_idx, kv_idx: kv_idx <= q_idx & q_idx - kv_idx < 9),
            "mask",
            "q_idx & q_idx - kv_idx",
            "expected a boolean, got an index(.|\n)*& joins its neighbours before they are compared(.|\n)*parentheses",
        ),
        (
            lambda: ac.Variant(score=lambda score: ac.tahn(score)),
            "score",
            "ac.tahn",
            "no attribute 'tahn': did you mean 'tanh'",
        ),
        (
            lambda: ac.Variant(score=lambda score: ac.clamp(score, -1, 1)),
            "score",
            "ac.clamp",
            r"no attribute 'clamp': write minimum\(maximum\(x, low\), high\)",
        ),
        (
            lambda: ac.Variant(reduction=lambda weight, v_vec, row: row.sum(ac.dropout(weight) * v_vec)),
            "reduction",
            "ac.dropout",
            "no attribute 'dropout': no formula draws numbers",
        ),
        (
            lambda: ac.Variant(score=lambda score, q_idx: ac.int(score) % 2),
            "score",
            "ac.int",
            r"no attribute 'int': write to_int\(x\)",
        ),
        (
            lambda: ac.Variant(score=lambda score, h, P: score[h] * P[h], inputs={"P": SLOPES}),
            "score",
            "score[h]",
            "'score' is not a tensor, but one number of one head(.|\n)*q and k of all heads side by side",
        ),
        (
            lambda: ac.Variant(mask=lambda b, kv_idx, doc: (doc[b, kv_idx] >> kv_idx) % 2 == 1, inputs={"doc": DOC}),
            "mask",
            "doc[b, kv_idx] >> kv_idx",
            r"the operator >> is not part(.|\n)*write x \* 2\*\*n, x // 2\*\*n",
        ),
        (
            lambda: ac.Variant(score=lambda score: score >> ac.softcap(30.0)),
            "score",
            "score >> ac.softcap(30.0)",
            r"a modifier of scores is no value(.|\n)*>> function",
        ),
        (
            lambda: ac.Variant(normalizer=lambda score: score / sum(score)),
            "normalizer",
            "sum(score)",
            "cannot be iterated(.|\n)*row.sum",
        ),
        (lambda: ac.Variant(score=lambda score: None), "score", "None", "gives nothing(.|\n)*`return`"),
        (lambda: ac.Variant(score=lambda score: score / 0), "score", "score / 0", "division by zero"),
        (lambda: ac.Variant(score=lambda score: ac.log(0) + score), "score", "ac.log(0)", "no finite real value"),
        (lambda: ac.Variant(score=lambda score: score * math.inf), "score", "score * math.inf", "inf is not finite"),
        (lambda: ac.Variant(score=lambda score: score + 2**64), "score", "score + 2**64", "does not fit 64 bits"),
        (lambda: ac.Variant(score=lambda score: [score]), "score", "[score]", "list is not a value"),
        (
            lambda: ac.Variant(score=lambda score: ac.tanh(score, 2)),
            "score",
            "ac.tanh(score, 2)",
            "takes 1 argument, got 2",
        ),
        (lambda: ac.Variant(score=several_lines), "score", "undefined", "raised NameError"),
        (
            lambda: ac.Variant(reduction=lambda weight, v_vec, row: row.sum(weight) * v_vec),
            "reduction",
            "row.sum(weight) * v_vec",
            "must be one row.sum",
        ),
        (
            lambda: ac.Variant(reduction=lambda weight, v_vec, row: row.sum(weight * v_vec**2)),
            "reduction",
            "row.sum(weight * v_vec**2)",
            "not linear in v_vec",
        ),
        (
            lambda: ac.Variant(reduction=lambda weight, v_vec, row: row.sum(weight * ac.exp(v_vec))),
            "reduction",
            "ac.exp(v_vec)",
            "must be linear in v_vec",
        ),
        (
            lambda: ac.Variant(reduction=lambda weight, v_vec, row: row.max(v_vec)),
            "reduction",
            "row.max(v_vec)",
            "only row.sum",
        ),
    ],
)
def test_the_caret_stands_under_the_users_expression(build, stage, pointed, message):
    with pytest.raises(SpecError, match=message) as caught:
        build()
    span = caught.value.span
    assert caught.value.stage == stage
    assert span.file == __file__
    assert span.text == linecache.getline(__file__, span.line).rstrip("\n")
    assert span.text[span.col : span.end_col] == pointed
    assert str(caught.value).startswith(f"{__file__}:{span.line}: {stage}: ")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ac.Variant(score=3), "int is no score modifier"),
        (lambda: ac.Variant(score=ac.causal), "no score modifier"),
        (lambda: ac.Variant(mask="causal"), "str is no mask(.|\n)*write a function(.|\n)*ac.loads_toml"),
        (lambda: ac.Variant(score="score + 1"), "str is no score modifier(.|\n)*ac.loads_toml"),
        (
            lambda: ac.Variant(mask=CAPTURED > 0),
            r"Tensor is no mask(.|\n)*a dense one is an input(.|\n)*m\[q_idx, kv_idx\]",
        ),
        (lambda: ac.Variant(mask=ac.sliding_window), r"makes a mask when it is called(.|\n)*ac.sliding_window\(size\)"),
        (lambda: ac.causal & ac.document, r"makes a mask when it is called(.|\n)*ac.document\(doc='doc'\)"),
        (lambda: ac.Variant(score=ac.softcap), r"makes a score modifier when(.|\n)*ac.softcap\(cap=50.0\)"),
        (lambda: ac.causal and ac.prefix(4), "a mask has no truth value(.|\n)*& for and"),
        (lambda: ac.causal or ac.prefix(4), "a mask has no truth value(.|\n)*| for or"),
        (lambda: not ac.causal, "a mask has no truth value(.|\n)*~ for not"),
        (lambda: ac.alibi() and ac.softcap(30.0), "a score has no truth value(.|\n)*>> for one after the other"),
        (lambda: ac.sliding_window(0), "the size of a sliding_window is 0: it is 1 or more"),
        (lambda: ac.sliding_window(-4), "the size of a sliding_window is -4"),
        (lambda: ac.sliding_window(4.5), "is 4.5: it counts tokens"),
        (lambda: ac.window(-1, 0), "the left of a window is -1(.|\n)*flash-attn's -1, no limit"),
        (lambda: ac.window("w", -1), "the right of a window is -1"),
        (lambda: ac.prefix(-1), "the length of a prefix is -1: it is 0 or more"),
        (lambda: ac.dilated(0), "the step of dilated is 0"),
        (lambda: ac.block_diagonal(-2), "the size of block_diagonal is -2"),
        (lambda: ac.softcap(0.0), r"softcap\(0.0\): division by zero(.|\n)*leave it out"),
        (lambda: ac.Input("heads"), r"Input\('heads',\): 'heads' would be a free dimension(.|\n)*write 'h'"),
        (lambda: ac.Input("batch", "kv_idx"), "'batch' would be a free dimension(.|\n)*write 'b'"),
        (lambda: ac.Input("k_idx"), "'k_idx' would be a free dimension(.|\n)*write 'kv_idx'"),
        (lambda: ac.Input("qidx"), "'qidx' would be a free dimension(.|\n)*write 'q_idx'"),
        (lambda: ac.causal & 3, "int is no mask"),
        (lambda: ac.causal(align="middle"), "align is 'end' or 'start'"),
        (lambda: ac.Variant(normalizer="softmux"), "no normalizer is called 'softmux'(.|\n)*softmax"),
        (lambda: ac.Variant(normalizer=3), "the normalizer is int, not a function"),
        (lambda: ac.Variant(score=lambda *args: args[0]), r"takes \*args; its parameters are bound by name"),
        (lambda: ac.Variant(inputs={"slopes": SLOPES}), "'slopes' is declared but no stage reads it"),
        (lambda: ac.Variant(inputs={"cap": ac.Scalar(3)}), "the scalar 'cap' is declared but no stage reads it"),
        (lambda: ac.Variant(inputs={"slopes": 3.0}), r"inputs\['slopes'\] is int|is float"),
        (lambda: ac.Variant(inputs={"score": SLOPES}), "'score' already means something else"),
        (lambda: ac.Variant(inputs={"exp": SLOPES}), r"'exp' already means something else: the function exp\(\)"),
        (
            lambda: ac.Variant(mask=lambda q_idx: (q_idx > 3) & ac.causal),
            "a mask is no value(.|\n)*=ac.causal & ",
        ),
        (lambda: ac.Variant(score=lambda score: score + ac.alibi()), "a modifier of scores is no value(.|\n)* >> "),
        (
            lambda: ac.Variant(score=lambda score: score + SLOPES.declare),
            "a function, declare, is no value(.|\n)*call it",
        ),
        (lambda: ac.Variant(inputs={"scale": ac.Scalar(1.0)}), "'scale' already means something else"),
        (lambda: ac.Variant(inputs={"row_max_0": SLOPES}), "'row_max_0' is one that derived formulas use"),
        (lambda: ac.Variant(inputs={"delta": SLOPES}), "'delta' is one that derived formulas use"),
        (lambda: ac.Variant(inputs={"two words": SLOPES}), "'two words' cannot name an input"),
        (lambda: ac.Variant(inputs={"lambda": SLOPES}), "'lambda' cannot name an input"),
        (lambda: ac.Variant(mask=ac.prefix("kv_len")), "'kv_len' already means something else"),
        (lambda: ac.Variant(score=ac.alibi(), inputs={"slopes": ac.Scalar(1.0)}), "as an input and as a scalar"),
        (lambda: ac.document("x") & ac.prefix("x"), "both sides declare the input 'x'"),
        (lambda: ac.sliding_window("w") & ac.window(2, "w"), "both sides declare the scalar 'w'"),
        (lambda: ac.Input("two words"), "a dimension is a name"),
        (lambda: ac.Input(3), "a dimension is a name"),
        (lambda: ac.Input("h", dtype="bool"), r"dtype is 'float' or 'int'(.|\n)*x\[...\] != 0"),
        (lambda: ac.Input("h", dtype="int", grad=True), "an integer input has no gradient"),
        (lambda: ac.Scalar("3"), "an int or a float"),
        (lambda: ac.Scalar(True), "an int or a float"),
        (lambda: ac.Scalar(math.nan), "a finite number"),
    ],
)
def test_faults_of_declarations(build, message):
    with pytest.raises(SpecError, match=message):
        build()


def test_the_traceback_of_a_wrong_formula_is_the_users_line_and_one_of_ours():
    with pytest.raises(SpecError) as caught:
        ac.Variant(mask=lambda q_idx, kv_idx: q_idx - kv_idx)
    frames = [entry.frame.code.name for entry in caught.traceback]
    assert frames == [test_the_traceback_of_a_wrong_formula_is_the_users_line_and_one_of_ours.__name__, "__init__"]


def test_limits_that_are_met():
    shown = [ac.sliding_window(1), ac.window(0), ac.prefix(0), ac.dilated(1), ac.block_diagonal(1)]
    for mask in (*shown, ac.window("left", "right"), ac.sliding_window(numpy.int64(3))):
        ac.Variant(mask=mask)
    ac.Input("q_idx", "kv_idx", "h", "h_kv", "b", "bucket", "distance", "d")


def test_declarations_show_what_they_were_made_of():
    declared = [
        ac.Input("b", "kv_idx", dtype="int"),
        ac.Input("h", grad=True),
        ac.Input(),
        ac.Scalar(4),
        ac.Scalar(0.5),
    ]
    for made in declared:
        again = eval(repr(made), {"Input": ac.Input, "Scalar": ac.Scalar})
        assert again.declare("x") == made.declare("x")
    assert "default=<function" in repr(ac.Input("h", default=lambda sizes: [0.0] * sizes["h"]))


def test_numbers_of_numpy_are_numbers():
    plain = ac.Variant(score=lambda score, q_idx: 2.5 * score + 3 * q_idx + 1.0 * q_idx).graph
    score = lambda score, q_idx: numpy.float32(2.5) * score + numpy.int64(3) * q_idx + q_idx * numpy.float16(1)
    assert ac.Variant(score=score).graph == plain


def test_a_float_constant_makes_a_number_of_an_index():
    score = ac.Variant(score=lambda score, q_idx, kv_idx: score + 1.0 * q_idx * kv_idx).graph["score"].expr
    assert "to_float" in str(score)
    indexed = lambda score, q_idx, slopes: score + slopes[1.0 * q_idx]
    with pytest.raises(SpecError, match="not an index"):
        ac.Variant(score=indexed, inputs={"slopes": SLOPES})


def test_algebra_leaves_only_the_vocabulary():
    for score in (
        lambda score: ac.sqrt(score**2),
        lambda score: (score**2) ** 0.3,
        lambda score: ac.log(ac.exp(score)),
        lambda score: ac.exp(ac.log(score) * 2),
    ):
        ac.Variant(score=score)  # the verifier refuses any other node
    root = ac.Variant(score=lambda score: ac.sqrt(score**2)).graph
    assert root == ac.Variant(score=lambda score: ac.abs(score)).graph


def test_exponentials_are_gathered_so_that_they_do_not_overflow():
    apart = lambda score, row: ac.exp(score) * ac.exp(-row.max(score)) / row.sum(ac.exp(score) / ac.exp(row.max(score)))
    assert ac.Variant(normalizer=apart).graph == ac.Variant().graph


def test_reductions_are_named_by_what_they_are():
    first = ac.Variant(normalizer=lambda score, row: ac.exp(score) / (row.sum(score) + row.sum(ac.exp(score))))
    second = ac.Variant(
        normalizer=lambda score, row: (lambda b, a: ac.exp(score) / (a + b))(row.sum(ac.exp(score)), row.sum(score))
    )
    assert first.graph == second.graph
    unused = ac.Variant(normalizer=lambda score, row: (row.count(), row.max(score), ac.softmax(score, row))[2])
    assert unused.graph == ac.Variant().graph


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"branches": 2}, "no reduction says how their weights add up"),
        (
            {"normalizer": lambda score, row: ac.exp(row.cumsum(ac.log(1 - ac.sigmoid(score))))},
            r"'cumsum'(.|\n)*one value a row; make the running sums in PyTorch",
        ),
        (
            {
                "reduction": lambda weight, v_vec, row, h, e: row.sum(weight * v_vec) + e[h],
                "inputs": {"e": ac.Input("h", "d")},
            },
            r"e\[h\](.|\n)*multiply v by one, or add one to it, before the op, and the output behind it",
        ),
    ],
)
def test_what_is_said_in_another_place(stages, message):
    with pytest.raises(SpecError, match=message):
        ac.Variant(**stages)
    if stages == {"branches": 2}:
        with pytest.raises(SpecError, match=f"spec.toml:1(.|\n)*{message}"):
            ac.loads_toml("branches = 2", file="spec.toml")
