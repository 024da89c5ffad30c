from __future__ import annotations

import importlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attncc as ac
from attncc.errors import SpecError
from attncc.ir.verify import verify
from attncc.runtime.evaluate import evaluate
from attncc.variants.t5_bias import bucket

PACKAGE = Path(ac.__file__).parent
NAMES = ac.variants.names()


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_is_one_file_with_its_source(name):
    variant = ac.variants.get(name)
    assert variant.name == name
    assert variant.graph.cites
    verify(variant.graph)
    assert importlib.import_module(f"attncc.variants.{name}").__doc__


def test_every_file_is_on_the_shelf():
    files = {path.stem for path in (PACKAGE / "variants").glob("*.py")} - {"__init__"}
    assert files == {*NAMES, *ac.variants.recurrences()}


def test_unknown_names():
    with pytest.raises(SpecError, match="no shipped variant is called 'alibe'(.|\n)*did you mean 'alibi'"):
        ac.variants.get("alibe")
    with pytest.raises(SpecError, match="`attncc list` shows the"):
        ac.variants.get("xyzzy")
    with pytest.raises(SpecError, match="no shipped variant"):
        ac.variants.get("__init__")


def test_inputs_and_defaults():
    found = {
        name: {d.name: d.pattern for d in ac.variants.get(name).graph.inputs}
        | {s.name: s.default for s in ac.variants.get(name).graph.scalars}
        for name in NAMES
    }
    assert {name: inputs for name, inputs in found.items() if inputs} == {
        "sliding_window": {"window": 1024},
        "flash_window": {"left": 1024, "right": 0},
        "prefix_lm": {"prefix": ("b",)},
        "document": {"doc": ("b", "kv_idx")},
        "alibi": {"slopes": ("h",)},
        "softcap": {"cap": 50.0},
        "gemma2_global": {"cap": 50.0},
        "gemma2_local": {"cap": 50.0, "window": 4096},
        "t5_bias": {"table": ("bucket", "h")},
        "dense_bias": {"bias": ("b", "h", "q_idx", "kv_idx")},
        "sink": {"sink": ("h",)},
        "min_p": {"least": 0.02},
        "top_theta": {"theta": ("h",), "dense_keys": 64},
        "qk_temperature": {"tau": ("b", "h", "q_idx")},
        "cosine": {"tau": ("h",)},
        "additive": {"v_a": ("h", "d")},
        "trilinear": dict.fromkeys(("w_q", "w_k", "w_qk"), ("h", "d")),
        "location": {"table": ("h", "kv_idx", "d")},
        "gaussian_position": {"center": ("h",), "spread": ("h",)},
        "gmm": dict.fromkeys(("w", "mu", "sigma"), ("b", "q_idx", "component")),
        "afa": dict.fromkeys(("rate", "sigma2", "eta2", "gamma2", "nu", "tau"), ("h",)),
        "head_gates": {"gate": ("b", "h", "q_idx")},
        "reversed": {"gate": ("b", "h", "kv_idx")},
        "shared_weights": {"total": ("b", "h", "q_idx")},
        "taylorshift": {"tau": ("h",)},
        "local_gaussian": {"center": ("b", "h", "q_idx"), "reach": 10.0},
        "ssmax": {"gain": ("h",)},
        "bam": dict.fromkeys(("strength", "power", "skew"), ("h",)),
        "bee_rag": {"beta": ("b", "documents"), "doc": ("b", "kv_idx")},
        "transformer_xl": {"content": ("h", "d"), "lags": ("b", "h", "q_idx", "distance")},
        "meta_tokens": {"reach": 2048, "tokens": 128},
        "parallel_context": {"segment": ("b", "kv_idx"), "query": ("b",)},
        "arrow": {"segment": ("b", "kv_idx")},
        "isolation": {"subject": ("b", "q_idx"), "key_subject": ("b", "kv_idx"), "reference": ("b", "kv_idx")},
        "split_heads": {"doc": ("b", "kv_idx"), "full_heads": 1},
        "kerple": dict.fromkeys(("r1", "r2"), ("h",)),
        "forgetting": {"f": ("b", "h", "kv_idx")},
        "object_queries": {"foreground": ("b", "kv_idx")},
        "mega": {"table": ("h", "distance")},
        "sdm": {"table": ("distance",), "bits": 64},
        "faceformer": {"slopes": ("h",), "period": 30},
        "alignment": {"keys": 2},
        "image_gain": {"gain": ("h",), "image": ("b", "kv_idx")},
        "key_gain": {"gain": ("b", "kv_idx")},
        "pooling": {"energy": ("b", "h", "kv_idx"), "keep": ("b", "h", "kv_idx")},
        "relative_bias": {"table": ("h", "distance")},
        "bico": {"far_q": ("b", "h", "q_idx", "d"), "far_k": ("b", "h_kv", "kv_idx", "d")},
        "differential": {"lam": ("h",)},
        "retention": {"rates": ("h",)},
        "lightning": {"rates": ("h",)},
        "simple_gla": {"g": ("b", "h", "kv_idx")},
        "ssd": {"dt": ("b", "h", "kv_idx"), "rate": ("h",)},
        "gla": {"g": ("b", "h", "kv_idx", "d")},
        "rwkv6": {"g": ("b", "h", "kv_idx", "d"), "u": ("h", "d")},
    }


def test_the_two_window_conventions_differ_by_one():
    q, k, v = (torch.randn(1, 1, 12, 4) for _ in range(3))
    counted = ac.reference(ac.variants.get("sliding_window"), q, k, v, window=4)
    inclusive = ac.reference(ac.variants.get("flash_window"), q, k, v, left=3)
    torch.testing.assert_close(counted, inclusive, rtol=0, atol=0)
    assert not torch.equal(counted, ac.reference(ac.variants.get("flash_window"), q, k, v, left=4))


def test_t5_buckets_at_every_distance():
    """Against T5's own rule; its logarithm is of a float32, which happens to be right at each border."""
    m = 300
    graph = ac.Variant(
        inputs={"table": ac.Input("bucket")},
        score=lambda q_idx, kv_idx, q_len, kv_len, table: table[bucket(q_idx, kv_idx, q_len, kv_len)],
    ).graph
    env = {"q_idx": torch.arange(m)[:, None], "kv_idx": torch.arange(m), "q_len": m, "kv_len": m}
    got = evaluate(graph["score"].expr, env | {"table": torch.arange(32)})
    ahead = torch.arange(m) - torch.arange(m)[:, None]
    distance = ahead.abs()
    large = 8 + (torch.log(distance.float() / 8) / math.log(16) * 8).long().clamp(max=7)
    assert torch.equal(got, (ahead > 0).long() * 16 + torch.where(distance < 8, distance, large))
    assert set(got.unique().tolist()) == set(range(32)) - {16}  # 16 would be a distance of 0 ahead


def window_or_meta(q_idx, kv_idx, q_len, kv_len, reach, meta):
    position = q_idx + (kv_len - q_len)
    inside = (position - kv_idx <= reach) & (kv_idx - position <= 0)
    return (kv_idx <= position) & (inside | (kv_idx < meta))


EXAMPLES = {
    "gemma2_local": ac.variants.get("gemma2_local"),
    "alibi_sink": ac.Variant(
        score=ac.alibi(),
        mask=ac.causal,
        normalizer=importlib.import_module("attncc.variants.sink").softmax_with_sink,
        inputs={"sink": ac.Input("h", grad=True)},
    ),
    "signed_window": ac.Variant(
        mask=ac.window("left", "right"),
        normalizer=ac.cog,
        inputs={"left": ac.Scalar(256), "right": ac.Scalar(32)},
    ),
    "meta_tokens": ac.Variant(mask=window_or_meta, inputs={"reach": ac.Scalar(2048), "meta": ac.Scalar(128)}),
}


def test_every_example_is_here():
    assert {path.stem for path in (PACKAGE / "examples").glob("*.toml")} == EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_mean_what_their_python_form_does(name):
    text = ac.load_toml(PACKAGE / "examples" / f"{name}.toml")
    assert text.graph.cites
    assert text.graph == EXAMPLES[name].graph
    defaults = [{s.name: s.default for s in v.graph.scalars} for v in (text, EXAMPLES[name])]
    assert defaults[0] == defaults[1]


def test_reading_a_spec_needs_no_torch():
    code = "import sys, attncc; attncc.variants.get('alibi'); print(sorted({'torch', 'triton'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert run.stdout == "[]\n"
