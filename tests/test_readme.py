"""Every snippet of the README runs: Python blocks in order, TOML blocks as files beside them, each attncc command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import attncc as ac
from attncc.cli import app
from attncc.schedule.device import device_names, load_device, targets

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


def blocks(kind: str) -> list[str]:
    return [text for language, text in BLOCKS if language == kind]


def commands() -> list[tuple[str, list[str]]]:
    """Each command of the console blocks, with the lines of output that follow it."""
    found: list[tuple[str, list[str]]] = []
    for text in blocks("console"):
        for line in text.splitlines():
            if line.startswith("$ "):
                found.append((line[2:].partition("  #")[0].strip(), []))
            else:
                found[-1][1].append(line)
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with the TOML blocks under the names in their first lines."""
    for text in blocks("toml"):
        name = text.partition("\n")[0].removeprefix("# ").strip()
        assert name.endswith(".toml"), "a TOML block begins with the name of its file"
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_is_of_a_kind_that_is_run():
    assert {language for language, _ in BLOCKS} == {"python", "console", "toml"}
    assert len(BLOCKS) == TEXT.count("\n```") / 2


def test_the_toml_blocks_are_specs(folder):
    assert [ac.load_toml(path).name for path in sorted(folder.glob("*.toml"))] == ["local-decay"]


def test_the_python_blocks_run_in_order(folder):
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for number, text in enumerate(blocks("python"), start=1):
        # the line numbers of a traceback count within the block
        exec(compile(text, f"README.md, Python block {number}", "exec"), names)


@pytest.mark.parametrize(("command", "output"), commands(), ids=lambda x: x if isinstance(x, str) else "")
def test_the_commands_print_what_the_readme_shows(folder, command, output):
    program, *words = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return
    assert program == "attncc"
    if words[0] == "tune":
        if torch.cuda.is_available():
            pytest.skip("measures for minutes; tests/runtime/test_tune.py tunes at a small size")
        result = CliRunner().invoke(app, words)
        assert "no GPU that torch can use" in result.stderr
        return
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    printed = [line.rstrip() for line in result.stdout.splitlines()]
    for line in output:
        if line.strip() != "...":
            assert line.rstrip() in printed


def test_what_is_listed_is_what_ships():
    assert all(f"`{name}`" in TEXT for name in (*ac.variants.names(), *ac.variants.recurrences()))
    gpus = TEXT.partition("## GPUs")[2].partition("## ")[0].lower().replace(" ", "")
    assert all(name in gpus for name in device_names())
    assert all(target in gpus for target in targets())
    assert gpus.count(",") >= len({load_device(name).name for name in device_names()})


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / link).exists(), link
