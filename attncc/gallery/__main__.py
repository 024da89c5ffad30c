"""`python -m attncc.gallery`: write shelf.json and README.md anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attncc import variants
from attncc.gallery.entries import entry
from attncc.gallery.page import page


def data(entries: list[dict[str, Any]]) -> str:
    """shelf.json: the entries without what only the page shows."""
    short = [{key: value for key, value in e.items() if key not in ("details", "picture", "spec")} for e in entries]
    return json.dumps(short, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write both files beside this one."""
    folder = Path(__file__).parent
    entries = [entry(name) for name in (*variants.names(), *variants.recurrences())]
    (folder / "shelf.json").write_text(data(entries), encoding="utf-8")
    (folder / "README.md").write_text(page(entries), encoding="utf-8")


if __name__ == "__main__":
    main()
