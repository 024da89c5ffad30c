import json
import os

import pytest
import torch

from attncc.runtime import verify
from attncc.runtime.verify import Check, Row, Shape

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")


def test_a_spec_is_verified_forward_and_backward(attncc, spec):
    result = attncc("verify", str(spec), "--device", "cpu", "--quick", "--json")
    assert result.exit_code == 0
    rows = json.loads(result.stdout)
    assert [row["result"] for row in rows] == ["out", "lse", "dq", "dk", "dv"]
    assert all(row["ok"] and row["variant"] == "mine" for row in rows)


def found(ok: bool, error: float = 1.0) -> list[Row]:
    return [Row(Shape(1, 1, 1, 8, 8, 16, 16), Check("dq", ok, error, 1.0, error, 1.0), True)]


@pytest.fixture
def verified(monkeypatch):
    """The variants that are asked for, none of which is run; those called sink are wrong."""
    names = []

    def fake(variant, device, dtype, shapes, seed):
        names.append(variant.name)
        return found(variant.name != "sink", float("nan") if variant.name == "sink" else 0.5)

    monkeypatch.setattr(verify, "verify_variant", fake)
    return names


def test_a_wrong_result_is_marked_and_fails(attncc, verified):
    result = attncc("verify", "causal", "sink", "--device", "cpu")
    assert result.exit_code == 1
    assert "WRONG" in result.stdout
    assert "1 of 2 results are right" in result.stdout
    rows = json.loads(attncc("verify", "sink", "--device", "cpu", "--json").stdout)
    assert rows[0]["max_error"] is None


def test_what_has_no_backward_says_so(attncc, tmp_path):
    spec = tmp_path / "pairs.toml"
    lines = ('name = "pairs"', "[stages]", 'similarity = "sum_d(tanh(q_vec + r[q_idx * kv_idx]))"', "[inputs]")
    spec.write_text("\n".join((*lines, 'r = { index = ["place", "d"], grad = true }', "")))
    result = attncc("verify", str(spec), "--device", "cpu", "--quick")
    assert result.exit_code == 0
    assert "2 of 2 results are right" in result.stdout
    assert "outputs alone were checked: no kernel makes the gradient of r[" in " ".join(result.stderr.split())


def test_several_processes_find_what_one_finds(attncc):
    words = ("verify", "causal", "relu", "--device", "cpu", "--quick", "--json")
    alone, beside = attncc(*words), attncc(*words, "--jobs", "2")
    assert alone.exit_code == beside.exit_code == 0
    assert json.loads(alone.stdout) == json.loads(beside.stdout)


def test_a_process_that_ends_costs_its_spec_alone(attncc, tmp_path, monkeypatch):
    spec = tmp_path / "ends.py"
    spec.write_text(
        "import os\nimport attncc as ac\n"
        "if os.getpid() != int(os.environ['ASKED']):\n    os._exit(1)\n"
        "ends = ac.Variant(name='ends')\n"
    )
    monkeypatch.setenv("ASKED", str(os.getpid()))
    result = attncc("verify", f"{spec}:ends", "relu", "--device", "cpu", "--quick", "--jobs", "2")
    assert result.exit_code == 1
    assert "relu" in result.stdout
    assert "ends: no results: its process ended" in result.stderr


def test_all_tells_a_line_of_each_and_what_is_wrong(attncc, verified):
    result = attncc("verify", "--all", "--device", "cpu")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    (causal,) = (line.split() for line in lines if " causal " in line)
    assert causal[:4] == ["ok", "causal", "1", "0.50"]
    assert len([line for line in lines if " sink " in line]) == 2
    assert f"{len(verified) - 1} of {len(verified)} results are right, of {len(verified)} variants" in result.stdout


def test_what_a_budget_leaves_out_is_named_and_fails(attncc, verified):
    result = attncc("verify", "causal", "relu", "--device", "cpu", "--budget", "0.000001s")
    assert result.exit_code == 1
    assert verified == []
    assert "0 of 0 results are right" in result.stdout
    for name in ("causal", "relu"):
        assert f"{name}: no results: not finished in time" in result.stderr


def test_all_means_all(attncc, verified):
    from attncc import variants

    attncc("verify", "--all", "--device", "cpu")
    assert verified == [*variants.names(), *variants.recurrences()]


@pytest.mark.parametrize(
    ("words", "finding"),
    [
        (("causal", "--device", "cpu", "--dtype", "bf16"), "use --dtype fp32 or fp16"),
        ((), "there is no SPEC"),
        (("--all", "causal"), "both --all and a spec"),
        (("albi",), "did you mean"),
    ],
)
def test_impossible_requests_are_refused(attncc, words, finding):
    result = attncc("verify", *words)
    assert result.exit_code == 2
    assert finding in result.stderr


@no_gpu
def test_a_missing_gpu_is_named(attncc):
    result = attncc("verify", "causal", "--device", "cuda")
    assert result.exit_code == 2
    assert "--device cpu" in result.stderr
