from __future__ import annotations

import pickle

import pytest

from attncc.errors import AttnccError, InputError, ScheduleError, Span, SpecError, UnsupportedError

MASK = Span("gemma.toml", 4, 8, 22, 'mask = "q_idx - kv_idx"')


def test_a_spec_error_points_at_its_expression():
    error = SpecError(
        "expected a boolean, got an index",
        stage="mask",
        span=MASK,
        remedy='did you mean a comparison, e.g. "q_idx - kv_idx < 4096"?',
    )
    assert str(error) == (
        "gemma.toml:4: mask: expected a boolean, got an index\n"
        '   mask = "q_idx - kv_idx"\n'
        "           ^^^^^^^^^^^^^^\n"
        '   did you mean a comparison, e.g. "q_idx - kv_idx < 4096"?'
    )


@pytest.mark.parametrize(
    ("span", "pointed"),
    [
        (Span("a.py", 1, 8, 11, "        foo + 1"), "foo + 1\n^^^"),
        (Span("a.py", 1, 2, 5, "\t\tfoo"), "foo\n^^^"),
        (Span("a.py", 1, 3, 6, "\tx\tfoo"), "x\tfoo\n \t^^^"),
        (Span("a.py", 1, 4, 90, "x = (a +\n"), "x = (a +\n    ^^^^"),  # goes on in the next line
        (Span("a.py", 1, 3, 3, "x ="), "x =\n   ^"),  # something is missing at the end
        (Span("a.py", 1, 0, 5, ""), "\n^"),
    ],
)
def test_carets_stand_under_the_span(span, pointed):
    assert span.pointed() == pointed


def test_parts_that_are_unknown_are_left_out():
    assert str(SpecError("no such name")) == "no such name"
    assert str(SpecError("no such name", stage="score")) == "score: no such name"
    assert str(UnsupportedError("no decode yet", remedy="use forward")) == "no decode yet\n   use forward"


def test_a_place_whose_line_nobody_kept_is_named_and_not_drawn():
    error = SpecError("no such name", stage="score", span=Span("<stdin>", 2, 8, 12, ""), remedy="did you mean h?")
    assert str(error) == "<stdin>:2: score: no such name\n   did you mean h?"


def test_at_fills_in_only_what_is_none():
    bare = SpecError("no such name", remedy="did you mean h?")
    placed = bare.at(MASK, "mask")
    assert (placed.span, placed.stage, placed.remedy) == (MASK, "mask", "did you mean h?")
    assert (bare.span, bare.stage) == (None, None)
    again = placed.at(Span("other", 1, 0, 1, "x"), "score")
    assert (again.span, again.stage) == (MASK, "mask")
    assert type(UnsupportedError("later").at(MASK)) is UnsupportedError


@pytest.mark.parametrize(
    "error",
    [
        SpecError("wrong", stage="mask", span=MASK, remedy="right it"),
        InputError("q has 3 dimensions", remedy="pass 4"),
        ScheduleError("nothing fits", kernel="dq", buffer="k tile", bytes_over=512, remedy="a smaller head"),
    ],
)
def test_errors_survive_a_process_border(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert isinstance(copy, AttnccError)
