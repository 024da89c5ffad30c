import json
import xml.etree.ElementTree as xml

import pytest

pytest.importorskip("matplotlib")

from bench.plot import draw_all

DATA = {
    "gpu": "Some GPU",
    "rows": [
        {
            "case": case,
            "M": 8192,
            "mode": mode,
            "attncc": {"tflops": 437.0},
            "peers": {"flex": {"tflops": 211.0}, "cudnn": {"error": "no"}},
        }
        for case in ("causal", "softcap")
        for mode in ("forward", "backward")
    ],
}


@pytest.fixture
def drawn(tmp_path):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "dense.json").write_text(json.dumps(DATA))
    return list(draw_all(tmp_path))


def test_the_plot_stands_beside_its_results_and_has_their_figures(drawn):
    assert [p.name for p in drawn] == ["dense.svg"]
    text = " ".join("".join(e.itertext()) for e in xml.parse(drawn[0]).iter("{http://www.w3.org/2000/svg}text"))
    assert text.count("437") == 4
    assert text.count("211") == 4
    assert "Some GPU" in text
    assert "softcap" in text


def test_drawing_again_changes_nothing(drawn):
    first = drawn[0].read_bytes()
    list(draw_all(drawn[0].parent.parent))
    assert drawn[0].read_bytes() == first


def test_the_background_is_transparent(drawn):
    root = xml.parse(drawn[0]).getroot()
    background = root.find(".//{http://www.w3.org/2000/svg}g[@id='patch_1']/{http://www.w3.org/2000/svg}path")
    assert "opacity: 0" in background.get("style") or "fill: none" in background.get("style")
