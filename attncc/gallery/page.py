"""The gallery as Markdown."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from attncc import recipes
from attncc.catalogue import VERDICTS, mechanisms

_HEAD = """# What ships

Made by `python -m attncc.gallery`. Each variant is a file of a few lines; forward, backward, decoding and merging are
derived from it. In a picture rows are queries, two a character, and columns are keys: darker is a larger weight, `·` is
hidden, and `-~=≡` are negative weights, for random q and k.
"""


def page(entries: Sequence[dict[str, Any]]) -> str:
    """The whole page."""
    return "\n".join([_HEAD, *_contents(entries), *_variants(entries), *_recipes(), *_mechanisms()]) + "\n"


def _contents(entries: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for family, members in groupby(entries, key=lambda e: e["family"]):
        links = ", ".join(f"[{e['name']}](#{e['name']})" for e in members)
        lines.append(f"- **{family}**: {links}")
    return [*lines, "- [recipes](#recipes)", "- [every mechanism, and what answers it](#mechanisms)", ""]


def _variants(entries: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for family, members in groupby(entries, key=lambda e: e["family"]):
        lines += [f"## {family.capitalize()}", ""]
        for e in members:
            lines += _variant(e)
    return lines


def _variant(e: dict[str, Any]) -> list[str]:
    formulas = [f"{stage}: {text}" for stage, text in e["stages"].items()]
    return [
        f"### {e['name']}",
        "",
        e["title"],
        *(["", e["details"]] if e["details"] else []),
        "",
        "```text",
        *formulas,
        "```",
        "",
        f"{facts(e)}. {e['cites']}",
        "",
        *(["```text", *e["picture"], "```", ""] if e["picture"] else []),
        "```python",
        e["spec"],
        "```",
        "",
    ]


def facts(e: dict[str, Any]) -> str:
    """The derived facts, in a line."""
    passes = {0: "a state from token to token", 1: "1 pass over the keys"}.get(e["passes"])
    found = [passes or f"{e['passes']} passes over the keys", f"{len(e['kernels'])} kernels"]
    found += [f"{e['before']} calls before"] if e["before"] else []
    found += [f"gradients of {', '.join(e['gradients'])}" if e["gradients"] else "forward only"]
    return "; ".join([*found, *(["an O(N) form"] if e["linear"] else [])])


def _recipes() -> list[str]:
    lines = ["## Recipes", "", "Short programs of compiled ops, in `attncc.recipes`.", ""]
    for name in recipes.__all__:
        documentation = inspect.cleandoc(getattr(recipes, name).__doc__ or "").partition("\n\n")[0]
        lines.append(f"- `{name}`: {' '.join(documentation.split())}")
    return [*lines, ""]


def _mechanisms() -> list[str]:
    lines = ["## Mechanisms", "", *(f"- *{verdict}*: {meaning}" for verdict, meaning in VERDICTS.items()), ""]
    lines += ["| mechanism | verdict | answered by | |", "|---|---|---|---|"]
    for row in mechanisms():
        by = ", ".join(f"[{name}](#{name})" if "." not in name else f"`{name}`" for name in row.by)
        lines.append(f"| {row.name.replace('|', chr(92) + '|')} | {row.verdict} | {by} | {row.note} |")
    return lines
