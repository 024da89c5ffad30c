import builtins
import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from attncc import variants
from attncc.cli.draw import mask_and_weights, picture


def test_list_names_every_variant_with_its_source(attncc):
    result = attncc("list", "--json")
    entries = json.loads(result.stdout)
    assert [e["name"] for e in entries] == [*variants.names(), *variants.recurrences()]
    assert all(e["title"] and e["cites"] and e["stages"] for e in entries)
    text = attncc("list", *{e["family"] for e in entries}).stdout
    assert all(name in text for name in variants.names())


def test_list_is_a_line_or_two_for_each_variant_and_has_all_of_those_that_are_named(attncc):
    lines = attncc("list").stdout.splitlines()
    names = [*variants.names(), *variants.recurrences()]
    assert [line.split()[0] for line in lines if line.split()[0] in names] == names
    assert len(lines) < 2 * len(names)
    assert not any("arXiv" in line for line in lines)
    full = attncc("list", "alibi", "plain").stdout
    assert "arXiv:2108.12409" in full
    assert "Attention Is All You" in full
    assert "slopes[h]" in full
    assert "sliding_window" not in full
    assert [e["name"] for e in json.loads(attncc("list", "plain", "--json").stdout)] == ["full", "causal"]


def test_what_an_encoding_lacks_is_written_in_ascii(tmp_path):
    """A picture keeps its shape; a name has question marks."""
    spec = tmp_path / "spec.toml"
    spec.write_text('name = "m\u00f6"\n[stages]\nmask = "kv_idx <= q_idx"\n', encoding="utf-8")
    command = [sys.executable, "-m", "attncc", "show", str(spec), "--q-len", "4"]
    shown = subprocess.run(
        command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith("m?\n")
    assert "  #,..\n  ###,\n" in shown.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("alib",), "is called 'alib'\n   did you mean 'alibi'?"),
        (("mask",), "did you mean 'masks'?"),
        (("zzz",), "attncc list shows the names"),
        (("--mechanisms", "alibi"), "--mechanisms lists all of them\n   leave out 'alibi'"),
    ],
)
def test_list_refuses_what_it_does_not_know(attncc, words, message):
    result = attncc("list", *words)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("words", [(), ("normalizers", "masks"), ("--mechanisms",)])
def test_a_narrow_terminal_gets_lines_that_fit_and_lose_nothing(attncc, words, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr("attncc.cli.output._Console.console", Console(width=80, file=shown))
    assert attncc("list", *words).exit_code == 0
    assert max(map(len, shown.getvalue().splitlines())) <= 80
    rows = json.loads(attncc("list", *words, "--json").stdout)
    found = set(re.findall(r"\S+", shown.getvalue()))
    assert all(found.issuperset(row["name"].split()) for row in rows)


def test_list_names_every_mechanism_with_its_answer(attncc):
    rows = json.loads(attncc("list", "--mechanisms", "--json").stdout)
    assert len(rows) > 100
    assert all(row["by"] and row["verdict"] for row in rows)
    text = attncc("list", "--mechanisms").stdout
    assert "Selective attention" in text
    assert "recipes.selective" in text


def test_what_list_and_show_print_can_be_pasted_back(attncc):
    entries = json.loads(attncc("list", "--json").stdout)
    for entry in entries:
        if entry["inputs"] or entry["scalars"] or entry["stages"] == {"normalizer": "softmax"}:
            continue  # inline texts declare no inputs
        if "value" in entry["stages"]:
            assert f"value      = {entry['stages']['value']}" in attncc("show", entry["name"]).stdout
            continue  # nor what v is
        words = [word for stage, text in entry["stages"].items() for word in (f"--{stage}", text)]
        shown = attncc("show", *words, "--ir").stdout
        assert entry["digest"] in shown, entry["name"]


def test_show_prints_formulas_declarations_and_the_mask(attncc):
    text = attncc("show", "gemma2_local", "--q-len", "8", "--set", "window=3").stdout
    assert "cap*tanh(score/cap)" in text
    assert "scalar       window = 4096" in text
    drawn = [line.strip() for line in text.splitlines() if set(line.strip()) and set(line.strip()) <= set("█▀▄·")]
    assert drawn == ["█▄······", "▀██▄····", "··▀██▄··", "····▀██▄"]
    assert "window = 3\n" in text
    text = attncc("show", "gemma2_local", "--q-len", "8").stdout
    assert re.search(r"window = \d, not 4096, to be seen at this size\n", text)


def test_show_says_what_a_shipped_variant_is(attncc, tmp_path):
    lines = attncc("show", "alibi").stdout.splitlines()
    assert (lines[0], lines[1]) == ("alibi", f"  {variants.about('alibi')[0]}")
    assert "arXiv" in lines[2]
    assert "delta rule" in attncc("show", "delta_net").stdout
    own = tmp_path / "own.toml"
    own.write_text('name = "alibi"\n[stages]\nmask = "causal"\n')
    assert attncc("show", str(own)).stdout.splitlines()[1].startswith("  similarity")


def test_show_ir(attncc):
    from attncc.ir.text import to_text

    assert attncc("show", "sink", "--ir").stdout.strip() == to_text(variants.get("sink").graph)


def test_a_long_mask_is_drawn_by_blocks_and_counted_exactly():
    drawn = picture(variants.get("causal").graph, 1000, 1000, 0, 1, {})
    assert drawn.step == 16
    assert drawn.visible == 1000 * 1001 // 2
    assert drawn.pixels.shape == (63, 63)
    assert torch.equal(drawn.pixels, torch.ones(63, 63, dtype=torch.bool).tril())


def test_strips_do_not_change_the_picture(monkeypatch):
    graph = variants.get("sliding_window").graph
    whole = picture(graph, 300, 200, 0, 1, {"window": 40})
    monkeypatch.setattr("attncc.cli.draw.CHUNK", 1024)
    in_strips = picture(graph, 300, 200, 0, 1, {"window": 40})
    assert torch.equal(whole.pixels, in_strips.pixels)
    assert whole.visible == in_strips.visible


def test_the_drawn_weights_are_the_softmax_of_the_visible_scores():
    mask, weights = mask_and_weights(variants.get("causal").graph, 12, 12, 1, 2, {})
    assert torch.equal(mask, torch.ones(12, 12, dtype=torch.bool).tril())
    assert torch.allclose(weights.sum(-1), torch.ones(12))
    assert not weights[~mask].any()


@pytest.mark.parametrize(("option", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_images(attncc, tmp_path, option, magic):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"mask.{option}"
    result = attncc("show", "cog", f"--{option}", str(path), "--q-len", "12")
    assert result.exit_code == 0
    assert path.read_bytes().startswith(magic)


def test_an_image_without_matplotlib_is_a_clear_error(attncc, tmp_path, monkeypatch):
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    result = attncc("show", "causal", "--svg", str(tmp_path / "mask.svg"))
    assert result.exit_code == 2
    assert "attncc[plot]" in result.stderr


@pytest.mark.parametrize(
    ("words", "finding"),
    [
        (("--head", "9"), "no head 9"),
        (("--q-len", "100000"), "too large to draw"),
        (("--set", "window"), "expected NAME=VALUE"),
        (("--set", "width=3"), "no scalar 'width'"),
        (("--set", "window=3.5"), "'window' is an integer"),
        (("--png", "/absent/folder/mask.png"), "cannot be written"),
    ],
)
def test_show_refuses_what_it_cannot_draw(attncc, words, finding):
    result = attncc("show", "sliding_window", *words)
    assert result.exit_code == 2
    assert finding in result.stderr
