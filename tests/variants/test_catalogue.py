"""The catalogue names what ships, all of it, and nothing else; what it calls a kernel has a plan and gradients."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import attncc as ac
from attncc import recipes, variants
from attncc.catalogue import VERDICTS, mechanisms
from attncc.codegen.plan import Plan
from attncc.runtime.op import AttentionOp
from tests.variants.by_hand import draw
from tests.variants.owed import MECHANISMS, PAPERS

ROWS = mechanisms()
VERDICT = {row.name: row.verdict for row in ROWS}
#: what serves where a survey asks for one kernel, for several, or for a scan or nothing at all
SERVES = {"Y": {"kernel"}, "2": {"kernel", "program"}, "S": set(VERDICTS), "-": set(VERDICTS)}


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_an_answer_ships(row):
    assert row.verdict in VERDICTS
    assert row.by
    for name in row.by:
        room, _, member = name.rpartition(".")
        assert room in ("", "recipes", "outputs")
        if room == "":
            variants.get(member)
        elif room == "recipes":
            assert member in recipes.__all__
        else:
            assert hasattr(ac.outputs, member)
    if row.verdict != "kernel":
        assert any(name.startswith("recipes.") for name in row.by)
    sources = [variants.get(name).graph.cites for name in row.variants]
    assert row.paper or any(sources) or any(name.startswith("recipes.") for name in row.by)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if any(name.startswith("outputs.") for name in row.by)], ids=lambda r: r.name
)
def test_an_output_can_be_asked_of_the_variant_beside_it(row):
    """A similarity of its own has no kernel for outputs; what wants both is a recipe."""
    for name in row.variants:
        graph = variants.get(name).graph
        assert graph.has_dot
        assert graph.core is graph


def test_every_variant_and_every_recipe_answers_something():
    answered = {name for row in ROWS for name in row.by}
    assert {*variants.names(), *variants.recurrences()} <= answered
    assert {f"recipes.{name}" for name in recipes.__all__} <= answered


def test_names_and_families():
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert len(ROWS) >= 100


@pytest.mark.parametrize("name", MECHANISMS)
def test_what_is_owed_has_the_verdict_that_is_asked_for(name):
    asked, answers = MECHANISMS[name]
    assert {VERDICT[row] for row in answers} <= SERVES[asked]


@pytest.mark.parametrize("title", PAPERS)
def test_a_paper_has_an_answer(title):
    assert all(row in VERDICT for row in PAPERS[title])


def rows_of(heads, dim=8):
    return draw(1, heads, 6, dim).float()


NEAR = ac.compile(ac.Variant(mask=ac.window(2, 2)))
#: recipes that the catalogue calls one kernel
CALLS = {
    "weighted_groups": lambda: recipes.weighted_groups(
        ac.compile("causal"), rows_of(4), rows_of(4), rows_of(4), *(draw(4, 1, 1).float() for _ in "kv"), groups=2
    ),
    "shared_heads": lambda: recipes.shared_heads(*(rows_of(1) for _ in "qkv"), *(draw(4, 8).float() for _ in "qkv")),
    "collinear": lambda: recipes.collinear(ac.compile("causal"), *(rows_of(2) for _ in "qtv"), draw(4).float()),
    "neural": lambda: recipes.neural(
        *(rows_of(2, 4) for _ in "qkv"), draw(1, 4).float(), *(draw(1).float() for _ in "bw")
    ),
    "relational": lambda: recipes.relational(
        ac.compile("causal"), *(rows_of(2) for _ in "qks"), *(rows_of(3) for _ in "qk"), draw(2, 8, 3).float()
    ),
    "rescaled": lambda: recipes.rescaled(NEAR, *(rows_of(2) for _ in "qkv"), draw(1, 2, 6, 1).float(), rows_of(2)),
    "one_query": lambda: recipes.one_query(draw(2, 8).float(), rows_of(2), rows_of(2)),
}


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.verdict == "kernel" and not row.variants], ids=lambda r: r.name
)
def test_a_recipe_that_is_one_kernel_is_one_call(row, monkeypatch):
    calls, call = [], AttentionOp.__call__
    monkeypatch.setattr(AttentionOp, "__call__", lambda op, *a, **k: calls.append(op) or call(op, *a, **k))
    (run,) = [CALLS[name] for name in (by.removeprefix("recipes.") for by in row.by) if name in CALLS]
    assert run().isfinite().all()
    assert len(calls) == 1


@pytest.mark.parametrize("name", sorted({name for row in ROWS if row.verdict == "kernel" for name in row.variants}))
def test_a_kernel_has_a_plan_and_a_backward(name):
    """Values are tests/runtime's and tests/variants'. A recurrence compiles only where it has both."""
    if name in variants.recurrences():
        assert isinstance(ac.compile(name), ac.RecurrenceOp)
        return
    assert Plan(variants.get(name).graph).has_backward is None


@pytest.mark.parametrize("file", sorted(Path(variants.__file__).parent.glob("[a-z]*.py")), ids=lambda f: f.stem)
def test_a_spec_has_at_most_fifteen_lines(file):
    """Of code: neither its docstrings nor comments, imports or blank lines."""
    text = file.read_text()
    nodes = [node for node in ast.parse(text).body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    said = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    spanned = {i for node in nodes for i in range(node.lineno, (node.end_lineno or 0) + 1)}
    spanned -= {i for n in said for i in range(n.lineno, (n.end_lineno or 0) + 1)}
    code = [line.strip() for i, line in enumerate(text.splitlines(), 1) if i in spanned]
    assert len([line for line in code if line and not line.startswith("#")]) <= 15
