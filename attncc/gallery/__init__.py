"""The shipped variants as data and as a page, both written by `python -m attncc.gallery`: `attncc list` prints
shelf.json; README.md shows every variant with its formula, a picture of its weights, and its definition."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any


def shelf() -> list[dict[str, Any]]:
    """One entry a shipped variant: formulas, digest, passes, kernels, gradients."""
    found: list[dict[str, Any]] = json.loads(files(__name__).joinpath("shelf.json").read_text(encoding="utf-8"))
    return found
