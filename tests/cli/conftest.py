"""The command line in this process: `attncc("show", "alibi")` gives the result with its exit code and both streams."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from click.testing import Result
from typer.testing import CliRunner

from attncc.cli import app


@pytest.fixture
def attncc() -> Callable[..., Result]:
    def run(*words: str) -> Result:
        result = CliRunner().invoke(app, list(words))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


SPEC = """
name = "mine"
[stages]
score = "score - slope * abs(kv_idx - q_idx)"
mask = "kv_idx <= q_idx and q_idx - kv_idx < window"
[scalars]
slope = 0.1
window = 9
"""


@pytest.fixture
def spec(tmp_path):
    """A spec file that is in no repository."""
    path = tmp_path / "mine.toml"
    path.write_text(SPEC)
    return path
