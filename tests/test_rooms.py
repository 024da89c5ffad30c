"""Data flows one way, and so do imports: a room knows those above it in the README's table, and none below."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "attncc"
TABLE = (
    (ROOT / "README.md").read_text(encoding="utf-8").partition("| room | what happens there |")[2].partition("\n\n")[0]
)
ROWS = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in TABLE.splitlines() if row.startswith("| `")]
#: which row of the table a room stands in
PLACE = {room: number for number, row in enumerate(ROWS) for room in row}


def imported(tree: ast.AST) -> set[str]:
    """The rooms that a module imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name.split(".")[1] for name in found if name.startswith("attncc.")}


def test_the_table_names_every_room():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms - set(PLACE) == {"catalogue", "demo", "gallery", "integrations"}, "what stands beside the compiler"


@pytest.mark.parametrize("room", PLACE)
def test_a_room_imports_only_from_rooms_above_it(room):
    for path in sorted((PACKAGE / room).rglob("*.py")):
        others = imported(ast.parse(path.read_text(encoding="utf-8"))) & set(PLACE) - {room}
        assert not {other for other in others if PLACE[other] >= PLACE[room]}, path


def test_every_folder_of_the_package_is_a_package_that_says_what_it_is():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))), folder
