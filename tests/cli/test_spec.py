"""What SPEC may be, and what a wrong one gets: text on stderr, exit code 2, no traceback."""

import pytest

from attncc.cli.spec import named, resolve
from attncc.errors import SpecError
from attncc.variants import get

PYTHON = """
import attncc as ac
from neighbour import WINDOW
local = ac.Variant(name="local", mask=ac.causal & ac.sliding_window(WINDOW))
number = 3
"""


@pytest.fixture
def python(tmp_path):
    (tmp_path / "neighbour.py").write_text("WINDOW = 16\n")
    path = tmp_path / "specs.py"
    path.write_text(PYTHON)
    return path


def test_a_shipped_name():
    assert resolve("alibi").graph == get("alibi").graph


def test_a_python_file_may_import_its_neighbours(python):
    assert named(f"{python}:local").graph == resolve(None, mask="causal & sliding_window(16)").graph


def test_a_toml_file_and_inline_texts_mean_the_same(spec):
    inline = resolve(None, score="score - 0.1 * abs(kv_idx - q_idx)", mask="kv_idx <= q_idx and q_idx - kv_idx < 9")
    assert named(str(spec)).graph["out"].expr == inline.graph["out"].expr


@pytest.mark.parametrize(
    ("words", "finding"),
    [
        ((), "there is no SPEC"),
        (("albi",), "did you mean 'alibi'?"),
        (("absent.toml",), "no such file: absent.toml"),
        (("absent.py:x",), "no such file: absent.py"),
        (("spec.json",), "no kind of spec"),
        (("alibi", "--mask", "True"), "both 'alibi' and --mask"),
        (("--mask", "kv_idx - q_idx"), "expected a boolean"),
        (("--mask", "__import__('os')"), "<mask>:1"),
        (("--normalizer", "v_vec"), "v_vec"),
    ],
)
def test_a_wrong_spec_is_an_error_with_a_reason(attncc, words, finding):
    result = attncc("show", *words)
    assert result.exit_code == 2
    assert finding in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        (":absent", "has no 'absent'"),
        (":number", "is int, not a Variant"),
        ("", "which variant?"),
        (":", "which variant?"),
    ],
)
def test_a_python_file_without_the_variant_says_what_it_has(attncc, python, name, finding):
    result = attncc("show", f"{python}{name}")
    assert result.exit_code == 2
    assert finding in result.stderr
    assert "its variants: local" in result.stderr


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("x = 1 / 0\n", ":1: ZeroDivisionError"),
        ("\nx = (\n", ":2: SyntaxError"),
        ("import attncc as ac\nx = ac.Variant(inputs={'exp': ac.Input('h')})\n", ":2: the input name 'exp' already"),
    ],
)
def test_a_python_file_that_does_not_run_says_where(attncc, tmp_path, text, finding):
    path = tmp_path / "broken.py"
    path.write_text(text)
    result = attncc("show", f"{path}:x")
    assert result.exit_code == 2
    assert f"broken.py{finding}" in result.stderr


def test_the_search_path_is_left_as_it_was(python):
    import sys

    before = list(sys.path)
    named(f"{python}:local")
    with pytest.raises(SpecError):
        named(f"{python}:absent")
    assert sys.path == before
