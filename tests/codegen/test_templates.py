"""Templates are translated once, and again when they change."""

import sys

import jinja2
import pytest

from attncc.codegen.templates import environment_of

TEXT = "{{ name }} is {% if good %}good{% else %}bad{% endif %}."


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a template, and one beside it for bytecode."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "bytecode"))
    (tmp_path / "a.py.j2").write_text(TEXT)
    return tmp_path


def rendered(folder):
    """What the template gives in an environment of its own, as in a new process."""
    return environment_of([folder]).get_template("a.py.j2").render(name="x", good=True)


def bytecode(folder):
    (found,) = (folder / "bytecode").rglob("*.pyc")
    return found


def test_bytecode_is_read_where_it_lies(folder, monkeypatch):
    assert rendered(folder) == "x is good."
    monkeypatch.setattr(jinja2.Environment, "compile", lambda *a, **k: pytest.fail("translated again"))
    assert rendered(folder) == "x is good."


def test_a_changed_template_is_translated_again(folder):
    rendered(folder)
    (folder / "a.py.j2").write_text("{{ name }} was {{ good }}\n")
    assert rendered(folder) == "x was True\n"


def test_another_release_of_jinja_translates_again(folder, monkeypatch):
    rendered(folder)
    before = bytecode(folder).read_bytes()
    monkeypatch.setattr(jinja2, "__version__", "0.1")
    rendered(folder)
    assert bytecode(folder).read_bytes()[:16] != before[:16]  # what tells that it is current


@pytest.mark.parametrize("left", [0, 10, 16, 40])
def test_bytecode_that_was_cut_short_is_no_loss(folder, left):
    rendered(folder)
    bytecode(folder).write_bytes(bytecode(folder).read_bytes()[:left])
    assert rendered(folder) == "x is good."


def test_where_nothing_can_be_written_nothing_is(folder):
    (folder / "bytecode").write_text("no folder")
    assert rendered(folder) == "x is good."


def test_an_undefined_slot_is_an_error(folder):
    with pytest.raises(jinja2.UndefinedError, match="good"):
        environment_of([folder]).get_template("a.py.j2").render(name="x")


def test_an_error_names_the_line_of_the_template(folder):
    rendered(folder)
    with pytest.raises(jinja2.UndefinedError) as caught:  # from bytecode
        environment_of([folder]).get_template("a.py.j2").render(good=True)
    assert caught.traceback[-1].lineno == 0  # line 1, as pytest counts
    assert str(caught.traceback[-1].path).endswith("a.py.j2")
