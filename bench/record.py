"""Result files: one JSON per suite with the machine, the versions and the rows, written anew after every row."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def slug(name: str) -> str:
    """A GPU's name as a folder: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment() -> dict[str, Any]:
    """What a reader needs to repeat a run: GPU, versions, commit, date (UTC) and command line."""
    import torch
    import triton

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu-{platform.machine()}"
    return {
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "attncc": _attncc_version(),
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
    }


def _attncc_version() -> str:
    try:
        return version("attncc")
    except PackageNotFoundError:  # run from a checkout that is not installed
        from attncc.version import __version__

        return str(__version__)


def _commit() -> str | None:
    """The commit measured, with "+changes" if files differ from it. $BENCH_COMMIT says it where there is no git."""
    if said := os.environ.get("BENCH_COMMIT"):
        return said

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@dataclass
class Results:
    """The rows of one suite. `add` rewrites the file atomically, so that an interrupted run keeps what it measured."""

    suite: str
    path: Path
    quick: bool = False
    meta: dict[str, Any] = field(default_factory=environment)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **row: Any) -> dict[str, Any]:
        """Append a row and write the file."""
        self.rows.append(row)
        self.write()
        return row

    def note(self, key: str, value: Any) -> None:
        """Put a fact about the whole run into the file's head."""
        self.meta[key] = value
        self.write()

    def write(self) -> None:
        """Write the file: a temporary one first, then a rename."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = {"suite": self.suite, **self.meta, **({"quick": True} if self.quick else {})}
        # One row a line: a later run's difference then reads row by row.
        rows = ",\n".join("    " + json.dumps(row) for row in self.rows)
        text = json.dumps(head, indent=2)[:-2] + f',\n  "rows": [\n{rows}\n  ]\n}}\n'
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text)
        os.replace(temporary, self.path)


def load(path: Path) -> dict[str, Any]:
    """A result file as written by `Results`."""
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def keep(path: Path, key: str, value: Any) -> None:
    """Put a fact into the head of a result file that is there."""
    data = load(path)
    suite, rows, quick = data.pop("suite"), data.pop("rows"), data.pop("quick", False)
    Results(suite, path, quick, {**data, key: value}, rows).write()
