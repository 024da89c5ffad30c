"""Locate the data files (kernel templates, schedules), in a checkout and in an installed wheel alike."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Literal

from attncc.errors import AttnccError

_PACKAGE = Path(__file__).resolve().parent


def path(name: Literal["templates", "schedules"]) -> Path:
    """The folder `name`: at the top of the checkout, else inside the installed package; AttnccError if in neither."""
    checkout = _PACKAGE.parent
    candidates = [_PACKAGE / "_data" / name]
    if (checkout / "pyproject.toml").is_file():  # without it, the package's parent is a site-packages folder
        candidates.insert(0, checkout / name)
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise AttnccError(
        f"attncc's {name} folder is missing from {_PACKAGE}",
        remedy="the installation is incomplete: install attncc again",
    )


@cache
def fingerprint() -> str:
    """Changes whenever a file that decides what is generated changes, so that a checkout never reads its own past."""
    files = [*_PACKAGE.rglob("*.py"), *path("templates").rglob("*.j2")]
    facts = sorted((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
