"""Every fault of a spec as text: the file, the line, and the user's own characters under the caret."""

from __future__ import annotations

import time

import pytest

import attncc as ac
from attncc.errors import SpecError
from attncc.language.textform import from_texts

H = '{ index = ["h"] }'


@pytest.mark.parametrize(
    ("stage", "text", "pointed", "message"),
    [
        ("score", "score + slops[h]", "slops", "does not see the name 'slops'(.|\n)*did you mean 'slopes'"),
        ("score", "score + foo[h]", "foo", "does not see the name 'foo'(.|\n)*declare a tensor in inputs"),
        ("score", "score * slopes", "score * slopes", r"must be indexed(.|\n)*write slopes\[h\]"),
        ("mask", "q_idx - kv_idx", "q_idx - kv_idx", "expected a boolean, got an index"),
        ("mask", "kv_idx <= q_idx and score > 0", "score", "before any score is known"),
        ("normalizer", "score * v_vec", "v_vec", "only the reduction stage sees the value vectors"),
        ("score", "__import__('os').system('true')", "__import__('os').system", "attributes are not part"),
        ("score", "__import__('os')", "__import__", "no function is called '__import__'"),
        ("score", "open('x')", "open", "no function is called 'open'"),
        (
            "score",
            "clamp(score, 0, 1)",
            "clamp",
            r"no function is called 'clamp'(.|\n)*minimum\(maximum\(x, low\), high\)",
        ),
        ("mask", "causal and sliding_window(-4)", "sliding_window(-4)", "the size of a sliding_window is -4"),
        ("score", "tanhh(score)", "tanhh", "no function is called 'tanhh'(.|\n)*did you mean 'tanh'"),
        ("score", "eval('1')", "eval", "no function is called 'eval'"),
        ("score", "score.expr", "score.expr", "an attribute is not part of the language"),
        ("score", "().__class__", "().__class__", "an attribute is not part"),
        ("score", "(lambda x: x)(score)", "(lambda x: x)(score)", "only functions of the vocabulary can be called"),
        ("score", "lambda x: x", "lambda x: x", "a lambda is not part"),
        ("score", "f'{score}'", "f'{score}'", "an f-string is not part"),
        ("score", "'text'", "'text'", "str is not part"),
        ("score", "[score for x in score]", "[score for x in score]", "a comprehension is not part"),
        ("score", "(x := score)", "x := score", "':=' is not part"),
        ("score", "import os", "import os", "an import is not part"),
        ("score", "score @ score", "score @ score", "the operator @ is not part"),
        ("score", "score << 1", "score << 1", "the operator << is not part"),
        ("score", "score ^ 2", "score ^ 2", r"the operator \^ is not part(.|\n)*a \*\* b"),
        ("mask", "kv_idx <= q_idx & kv_idx > 3", "q_idx & kv_idx", "joins its neighbours(.|\n)*write `and`"),
        ("mask", "causal | kv_idx > 3", "causal | kv_idx", "joins its neighbours(.|\n)*write `or`"),
        ("mask", "causal && full", "&", "invalid syntax(.|\n)*`and`, `or` and `not`"),
        ("normalizer", "softmux", "softmux", "did you mean 'softmax'"),
        ("mask", "q_idx in (1, 2)", "q_idx in (1, 2)", "the comparison In is not part"),
        ("mask", "1 & 2", "1 & 2", "expected a boolean"),
        ("score", "score + (5 >> 1)", "5 >> 1", "the operator >> is not part"),
        ("score", "score + True", "score + True", "expected a number, got a boolean"),
        ("score", "-causal", "causal", "does not see the name 'causal'"),
        ("mask", "-causal", "-causal", "expected a number, got a boolean"),
        ("mask", "sliding_window", "sliding_window", "needs arguments"),
        ("mask", "sliding_window()", "sliding_window()", "missing 1 required positional argument"),
        ("mask", "sliding_window(**slopes)", "sliding_window(**slopes)", r"\*\* is not part"),
        ("mask", "prefix('kv_len')", "prefix('kv_len')", "'kv_len' already means something else"),
        ("mask", "causal(align='up')", "causal(align='up')", "align is 'end' or 'start'"),
        ("score", "score[h]", "score[h]", "'score' is not a tensor"),
        ("reduction", "row.sum(weight[0] * v_vec)", "weight[0]", "'weight' is not a tensor(.|\n)*with branches=2"),
        (
            "score",
            "score @ slopes",
            "score @ slopes",
            "the operator @ is not part(.|\n)*sums over heads go around the op",
        ),
        (
            "mask",
            "(b >> kv_idx) % 2 == 1",
            "b >> kv_idx",
            r"the operator >> is not part(.|\n)*write x \* 2\*\*n, x // 2\*\*n",
        ),
        ("mask", "1 << kv_idx > 8", "1 << kv_idx", "the operator << is not part"),
        ("mask", "causal ^ prefix(2)", "causal ^ prefix(2)", r"the operator \^ is not part"),
        ("mask", "kv_idx in [1, 2]", "kv_idx in [1, 2]", "comparison In is not part(.|\n)*write x == 1 or x == 2"),
        ("score", "dropout(score)", "dropout", "no formula draws numbers(.|\n)*as an input over"),
        ("similarity", "dot(rope(q_vec), k_vec)", "rope", "rotate q and k before the call"),
        ("score", "-logsigmoid(score)", "logsigmoid", r"write -softplus\(-x\)"),
        ("score", "score + slopes[h, b]", "slopes[h, b]", "has 1 dimension .* read with 2 indices"),
        ("score", "score + slopes[0:1]", "slopes[0:1]", "slices are not part"),
        ("score", "tanh", "tanh", r"'tanh' is a function(.|\n)*write tanh\(...\)"),
        ("score", "score + exp(x=score)", "exp(x=score)", "takes no keyword arguments"),
        ("score", "score + log(0)", "log(0)", "no finite real value"),
        ("score", "score + (0 - 1) ** 0.5", "score + (0 - 1) ** 0.5", "complex is not a value"),
        ("score", "score + 1 / 0", "1 / 0", "division by zero"),
        ("score", "score + 9**9**9", "9**9**9", "too large"),
        ("score", "score * 1e999", "score * 1e999", "inf is not finite"),
        ("score", "where(q_idx > 3, score)", "where(q_idx > 3, score)", "where takes 3 arguments"),
        ("score", "where(q_idx, score, 1)", "where(q_idx, score, 1)", "expected a boolean, got an index"),
        ("normalizer", "row", "row", "'row' must be followed by a reduction"),
        ("normalizer", "row.prod(score)", "row.prod", "no row reduction is called 'prod'"),
        ("normalizer", "row.sum()", "row.sum()", "takes 1 argument"),
        ("normalizer", "row.count(score)", "row.count(score)", "takes 0 argument"),
        ("normalizer", "softmax + 1", "softmax", "stands alone"),
        ("normalizer", "softmux", "softmux", "does not see the name 'softmux'"),
        ("score", "exp = score; exp", "exp", "'exp' already has a meaning"),
        ("score", "x = score", "x = score", "must end with an expression(.|\n)*to compare, write =="),
        ("score", "torch.tanh(score)", "torch.tanh", r"attributes are not part(.|\n)*write tanh\(...\)"),
        ("score", "score and 3", "score and 3", r"expected a boolean(.|\n)*e\.g\. \"score > 0\""),
        ("score", "score +", '"', "invalid syntax"),
        ("score", "(score", "(", "was never closed"),
        ("score", "score kv_idx", "kv_idx", "invalid syntax"),
        ("score", "score if q_idx > 3", "score if q_idx > 3", "expected 'else'"),
        ("reduction", "row.sum(weight) * v_vec", "row.sum(weight) * v_vec", "must be one row.sum"),
        ("reduction", "row.sum(weight * tanh(v_vec))", "tanh(v_vec)", "linear in v_vec"),
        ("score", "", '"', "the stage is empty"),
    ],
)
def test_the_caret_stands_under_the_users_characters(stage, text, pointed, message):
    toml = f'name = "test"\n\n[stages]\n{stage}   =   """{text} """\n\n[inputs]\nslopes = {H}\n'
    with pytest.raises(SpecError, match=message) as caught:
        ac.loads_toml(toml, file="folder/spec.toml")
    span = caught.value.span
    assert caught.value.stage == stage
    assert (span.file, span.line) == ("folder/spec.toml", 4)
    assert span.text == toml.splitlines()[3]
    assert span.text[span.col : span.end_col] == pointed


@pytest.mark.parametrize(
    ("value", "line", "pointed"),
    [
        ("'score + foo'", 3, "foo"),
        ('"  score + foo"', 3, "foo"),
        ('"""\nx = 1\nscore + foo"""', 5, "foo"),
        ('"""\n    x = 1\n    score + foo\n"""', 5, "foo"),
        ('"""x = 1\n       score + foo\n"""', 4, "foo"),
        ("'''\n    # é: a comment\n    (score +\n       foo)\n'''", 6, "foo"),
        ("'ä = 1; score + foo'", 3, "foo"),
    ],
)
def test_places_within_multi_line_and_indented_texts(value, line, pointed):
    toml = f'name = "test"\n[stages]\nscore = {value}\n'
    with pytest.raises(SpecError, match="'foo'") as caught:
        ac.loads_toml(toml, file="spec.toml")
    span = caught.value.span
    assert (span.file, span.line) == ("spec.toml", line)
    assert span.text == toml.split("\n")[line - 1]
    assert span.text[span.col : span.end_col] == pointed


@pytest.mark.parametrize(
    "toml",
    ['stages = { score = "score + foo" }', '[stages]\nscore = "score + \\u0066oo"'],
    ids=["an inline table", "an escape"],
)
def test_where_the_files_columns_are_unknown_the_text_itself_is_shown(toml):
    with pytest.raises(SpecError, match="'foo'") as caught:
        ac.loads_toml(toml, file="spec.toml")
    span = caught.value.span
    assert span.file.startswith("spec.toml")
    assert span.file.endswith("score")
    assert span.text == "score + foo"
    assert span.text[span.col : span.end_col] == "foo"


@pytest.mark.parametrize(
    ("toml", "line", "pointed", "message"),
    [
        ("name = 'x'\nscore = [1,\n", 2, None, "not valid TOML"),
        ("name = 'x\n", 1, None, "not valid TOML"),
        ("name = 'x'\nname = 'y'\n", 2, None, "not valid TOML"),
        ("[stages]\nmask = 'causal'\nmask = 'full'\n", 3, None, "not valid TOML"),
        ("nam = 'x'\n", 1, "nam", "unknown key 'nam'(.|\n)*did you mean 'name'"),
        ("[stage]\nmask = 'causal'\n", 1, "stage", "unknown table 'stage'(.|\n)*did you mean 'stages'"),
        ("[stages]\nmask = causal\n", 2, None, 'not valid TOML(.|\n)*score = "..."'),
        ("mask = 'causal'\n", 1, "mask", r"unknown key 'mask'(.|\n)*move it under \[stages\]"),
        ("[stages]\nmusk = 'causal'\n", 2, "musk", "unknown stage 'musk'(.|\n)*did you mean 'mask'"),
        ("[stages]\nmask = true\n", 2, "mask", "must be a string, got bool"),
        ("stages = 3\n", 1, "stages", "'stages' must be a table"),
        ("name = 3\n", 1, "name", "'name' must be a string"),
        ("[inputs]\nslopes = 3\n", 2, "slopes", "must be a table"),
        ("[inputs]\nslopes = { index = 'h' }\n", 2, "slopes", "must be a list of dimensions"),
        ("[inputs]\nslopes = { index = ['h'], gradient = true }\n", 2, "slopes", "no key 'gradient'"),
        ("[inputs]\nslopes = { index = ['h'], grad = 'no' }\n", 2, "slopes", "grad is true or false"),
        ("[inputs]\nslopes = { index = ['h'], dtype = 'half' }\n", 2, "slopes", "dtype is 'float' or 'int'"),
        ("[inputs]\nscore = { index = ['h'] }\n", 2, "score", "already means something else"),
        ("[scalars]\ncap = 'x'\n", 2, "cap", "an int or a float"),
        ("[scalars]\ncap = inf\n", 2, "cap", "a finite number"),
        ("[scalars]\nexp = 3\n", 2, "exp", "already means something else"),
    ],
)
def test_faults_of_the_file(toml, line, pointed, message):
    with pytest.raises(SpecError, match=message) as caught:
        ac.loads_toml(toml, file="spec.toml")
    span = caught.value.span
    assert (span.file, span.line) == ("spec.toml", line)
    assert pointed is None or span.text[span.col : span.end_col] == pointed


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (
            "[inputs]\nx = { index = ['h'] }\n[scalars]\nx = 3\n[stages]\nscore = 'score * x'",
            "an input and as a scalar",
        ),
        ("[inputs]\nx = { index = ['h'] }", "'x' is declared but no stage reads it"),
        ("[scalars]\ncap = 3.0", "the scalar 'cap' is declared but no stage reads it"),
    ],
)
def test_declarations_that_do_not_fit(toml, message):
    with pytest.raises(SpecError, match=message):
        ac.loads_toml(toml)


def test_files(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[stages]\nmask = 'kv_idx'\n")
    with pytest.raises(SpecError, match="expected a boolean") as caught:
        ac.load_toml(path)
    assert caught.value.span.location == f"{path}:2"
    path.write_text("[stages]\nmask = 'causal'\n")
    assert ac.load_toml(path).name == "mine"
    path.write_text(path.read_text(), encoding="utf-8-sig")  # as some editors write it
    assert ac.load_toml(path).name == "mine"
    with pytest.raises(SpecError, match="no such file"):
        ac.load_toml(tmp_path / "other.toml")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="cannot read"):
        ac.load_toml(path)
    with pytest.raises(SpecError, match="cannot read"):
        ac.load_toml(tmp_path)


def test_windows_line_ends():
    toml = '[stages]\r\nscore = """\r\nx = 1\r\nscore + foo\r\n"""\r\n'
    with pytest.raises(SpecError, match="'foo'") as caught:
        ac.loads_toml(toml)
    assert caught.value.span.line == 4
    assert ac.loads_toml(toml.replace("foo", "x")).graph == ac.Variant(score=lambda score: score + 1).graph


@pytest.mark.parametrize(
    "text",
    [
        "+".join(["score"] * 300),
        "(" * 150 + "score" + ")" * 150,
        "-" * 5000 + "score",
        "+".join(["score"] * 20000),
        "score" + "[h]" * 5000,
    ],
    ids=["a long sum", "parentheses", "deep nesting", "a very long sum", "deep indexing"],
)
def test_hostile_texts_are_read_or_refused_soon(text):
    start = time.perf_counter()
    refused = None
    try:
        from_texts(score=text)
    except SpecError as error:
        refused = error.stage
    assert refused in (None, "score")
    assert time.perf_counter() - start < 5


def test_inline_texts_name_their_option():
    with pytest.raises(SpecError) as caught:
        from_texts(mask="kv_idx")
    assert str(caught.value).startswith("<mask>:1: mask: expected a boolean")


def test_a_stage_of_several_lines_is_at_its_result():
    """Where findings of the whole stage point, such as a denominator that may be 0."""
    toml = '[stages]\nnormalizer = """\np = score + 1\np / row.sum(p)\n"""\n'
    (stage,) = (s for s in ac.loads_toml(toml, file="spec.toml").graph.stages if s.name == "weight")
    assert (stage.span.line, stage.span.text[stage.span.col : stage.span.end_col]) == (4, "p / row.sum(p)")
