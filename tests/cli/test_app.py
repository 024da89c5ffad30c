import subprocess
import sys

import pytest

from attncc.version import __version__

COMMANDS = ("list", "show", "check", "explain", "compile", "verify", "tune", "bench", "cache", "doctor")


def test_help_names_every_command_and_teaches_specs(attncc):
    text = attncc("--help").stdout
    assert all(f"  {name} " in text for name in COMMANDS)
    assert "spec.py:name" in text
    assert "executed" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_has_examples_on_lines_of_their_own(attncc, name):
    text = attncc(name, "--help").stdout
    assert any(line.strip().startswith(f"attncc {name}") for line in text.splitlines())
    assert "\b" not in text


def test_no_line_about_a_command_is_cut_off(attncc):
    lines = attncc("--help").stdout.split("Commands:")[1].strip().splitlines()
    assert [line.split()[0] for line in lines] == [
        "list",
        "show",
        "check",
        "explain",
        "compile",
        "verify",
        "tune",
        "bench",
        "doctor",
        "cache",
    ]
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


def test_what_reads_and_predicts_needs_no_torch():
    """Importing it is most of what such a command would take."""
    program = """
import sys
from typer.testing import CliRunner
from attncc.cli import app
for words in ("check alibi", "explain alibi --target H100", "cache list", "show alibi --ir"):
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 0, result.output
    assert "torch" not in sys.modules, words
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_version(attncc):
    assert attncc("--version").stdout == f"attncc {__version__}\n"


def test_an_unknown_command_is_exit_code_2(attncc):
    assert attncc("compil").exit_code == 2


def test_the_module_runs_as_the_command_does_and_help_needs_no_torch():
    program = "import sys; from attncc.cli import app\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
    shown = subprocess.run([sys.executable, "-m", "attncc.cli", "show", "nope"], capture_output=True, text=True)
    assert shown.returncode == 2
    assert shown.stderr.startswith("SpecError: no shipped variant is called 'nope'")
