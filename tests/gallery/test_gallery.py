"""The page and its data are those of the code as it stands, and show what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import attncc as ac
from attncc import gallery, variants
from attncc.gallery.__main__ import data
from attncc.gallery.entries import LENGTH, entry, picture
from attncc.gallery.page import page

FOLDER = Path(gallery.__file__).parent
_DRAWN = re.compile(rf"^[ ░▒▓█~=≡·-]{{{LENGTH}}}$", re.MULTILINE)
#: characters of a hundred that may differ: weights on the border of two shades, on another machine
_BORDERLINE = 1


@pytest.fixture(scope="module")
def entries():
    return [entry(name) for name in (*variants.names(), *variants.recurrences())]


def test_both_files_are_up_to_date(entries):
    told = "make them anew: python -m attncc.gallery"
    assert (FOLDER / "shelf.json").read_text("utf-8") == data(entries), told
    kept, made = ((FOLDER / "README.md").read_text("utf-8"), page(entries))
    assert _DRAWN.sub("", kept) == _DRAWN.sub("", made), told
    pictures = ["".join(_DRAWN.findall(text)) for text in (kept, made)]
    assert len(pictures[0]) == len(variants.names()) * LENGTH * LENGTH // 2
    different = sum(a != b for a, b in zip(*pictures, strict=True))
    assert different <= len(pictures[0]) * _BORDERLINE // 100, told


def test_what_the_page_shows_is_the_spec(entries):
    """The lines under each picture are Python, and make the variant."""
    for e in entries:
        names: dict[str, object] = {}
        exec(compile(e["spec"], e["name"], "exec"), names)
        made = names[e["name"]]
        assert isinstance(made, ac.Variant)
        assert made.graph.digest == e["digest"]
        lines = [line for line in e["spec"].splitlines() if line.strip() and not line.startswith(("import", "from"))]
        assert len(lines) <= 30


def test_facts_of_some(entries):
    by_name = {e["name"]: e for e in entries}
    assert by_name["causal"]["kernels"] == ["forward", "delta", "dkdv", "dq"]
    assert by_name["sigmoid"]["kernels"] == ["forward", "dkdv", "dq"]
    assert by_name["dense_bias"]["kernels"][-1].startswith("dbias")
    assert by_name["entmax15"]["passes"] == 3
    assert by_name["alibi"]["gradients"] == ["q", "k", "v", "slopes"]
    assert by_name["mla"]["gradients"] == ["q", "k"]
    assert by_name["retention"]["linear"]
    assert not by_name["causal"]["linear"]
    assert by_name["gated_delta_net"]["gradients"] == ["q", "k", "v", "initial_state", "beta", "g"]
    assert {"prepare", "carry", "prepare_back", "carry_back", "gradients"} <= set(by_name["delta_net"]["kernels"])
    assert all(e["gradients"] and e["kernels"] for e in entries)


def test_the_shelf_is_read_without_torch():
    assert [e["name"] for e in gallery.shelf()] == [*variants.names(), *variants.recurrences()]
    assert json.loads((FOLDER / "shelf.json").read_text("utf-8"))[0]["digest"] == variants.get("full").graph.digest


def test_a_picture_shows_its_mask():
    lines = picture(variants.get("causal").graph)
    assert len(lines) == LENGTH // 2
    assert [line.count("·") for line in lines] == [LENGTH - 2 * (row + 1) for row in range(LENGTH // 2)]
    assert any(c in "-~=≡" for line in picture(variants.get("cog").graph) for c in line)
    assert torch.tensor([line.count("█") for line in lines]).sum() > 0
