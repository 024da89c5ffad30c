import json
import subprocess
import sys

import pytest

from attncc.codegen import crosscompile

SMALL = ("--head-dim", "32", "--q-len", "128")


def test_the_file_names_its_costs_and_needs_no_attncc(attncc, spec, tmp_path):
    kernel = tmp_path / "kernel.py"
    result = attncc("compile", str(spec), "--target", "h100", *SMALL, "-o", str(kernel))
    assert result.exit_code == 0
    assert f"wrote {kernel}" in result.stdout
    assert all(name in result.stdout for name in ("forward_kernel", "dkdv_kernel", "dq_kernel", "registers"))
    # a stand-in of that name makes any import of attncc fail
    (tmp_path / "attncc.py").write_text("raise ImportError('the file imports attncc')\n")
    subprocess.run([sys.executable, "-c", "import kernel; kernel.attention"], cwd=tmp_path, check=True)


def test_json_gives_registers_spills_and_shared_memory(attncc):
    found = json.loads(attncc("compile", "causal", "--target", "sm_89", *SMALL, "--json").stdout)
    assert found["target"] == "sm_89"
    assert {"forward_kernel", "dkdv_kernel", "dq_kernel"} <= set(found["kernels"])
    for usage in found["kernels"].values():
        assert 0 < usage["registers"] <= 255
        assert usage["spill_bytes"] >= 0
    assert found["kernels"]["forward_kernel"]["shared_bytes"] > 0
    assert found["files"] == []


@pytest.mark.parametrize(("emit", "target", "start"), [("ptx", "sm_80", b"//"), ("cubin", "sm_80", b"\x7fELF")])
def test_emitted_code_is_one_file_a_kernel(attncc, tmp_path, emit, target, start):
    path = tmp_path / f"out.{emit}"
    words = ("compile", "causal", "--target", target, *SMALL, "--emit", emit, "-o", str(path))
    assert attncc(*words).exit_code == 0
    forward = tmp_path / f"out.forward_kernel.{emit}"
    assert forward.read_bytes().lstrip().startswith(start)
    assert not path.exists()


@pytest.mark.parametrize(
    ("words", "finding"),
    [
        (("--target", "sm_10"), "no device or architecture 'sm_10'"),
        (("--emit", "ptx", "--target", "h100"), "needs a file"),
        (("--target", "h100", *SMALL, "-o", "/absent/folder/k.py"), "cannot be written"),
    ],
)
def test_impossible_requests_are_refused(attncc, words, finding):
    result = attncc("compile", "causal", *words)
    assert result.exit_code == 2
    assert finding in result.stderr


def test_a_language_that_has_no_kernel_is_said(attncc):
    result = attncc("compile", "causal", "--target", "a100", "--backend", "gluon", "--head-dim", "32")
    assert "forward is in Triton: Gluon kernels are for sm_90, and this is sm_80" in result.stderr
    assert "dkdv is in Triton" in result.stderr
    assert "in Triton" not in attncc("compile", "causal", "--target", "a100", "--head-dim", "32").stderr


def test_a_kernel_that_spills_is_compiled_with_another_tiling_and_explained(attncc, spec, monkeypatch):
    tilings = []

    def compiled(module, graph, schedule, *rest, **options):
        tilings.append(schedule.dkdv)
        spills = 40 if len(tilings) == 1 else 0
        return {"dkdv_kernel": crosscompile.CompiledKernel("dkdv_kernel", 255, spills, 1024, "", b"", "ptx")}

    monkeypatch.setattr(crosscompile, "cross_compile", compiled)
    words = (str(spec), "--target", "a100", *SMALL)
    found = json.loads(attncc("compile", *words, "--json").stdout)
    first, second = tilings
    assert found["schedule"]["dkdv"] == second.to_json() != first.to_json()
    assert found["kernels"]["dkdv_kernel"]["spill_bytes"] == 0
    explained = json.loads(attncc("explain", *words, "--json").stdout)["kernels"]["dkdv"]
    assert explained["chosen"] == second.to_json()
    assert [c["spilled_bytes"] for c in explained["candidates"] if c["schedule"] == first.to_json()] == [40]
    assert attncc("explain", *words).stdout.count("spills 40 bytes") == 1
    tilings.clear()
    attncc("compile", *words)
    assert tilings[0] == second  # what was found out is kept


def test_an_unusual_formula_ends_up_without_spills(attncc, tmp_path):
    """Its first choice has a few, which no estimate knew: a weight that falls off slowly, under a mask with strides."""
    (tmp_path / "slow.toml").write_text(
        '[stages]\nmask = "kv_idx <= q_idx and (q_idx - kv_idx < 128 or kv_idx % 64 == 63)"\n'
        'normalizer = "1 / (1 + score * score) / row.sum(1 / (1 + score * score))"\n'
    )
    words = (str(tmp_path / "slow.toml"), "--target", "sm_80", "--head-dim", "64")
    found = json.loads(attncc("compile", *words, "--json").stdout)
    assert [usage["spill_bytes"] for usage in found["kernels"].values()] == [0] * 4
    assert "spills" in attncc("explain", *words).stdout


def test_a_compiler_that_cannot_write_is_said(attncc, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "below"))
    result = attncc("compile", "causal", "--target", "sm_80", *SMALL)
    assert result.exit_code == 2
    assert "Triton cannot write what it compiles" in result.stderr
    assert "TRITON_CACHE_DIR=folder" in result.stderr


@pytest.mark.parametrize(
    ("head_dim", "stages"),
    [
        (128, 'mask = "kv_idx <= q_idx and kv_idx % 4 != 3"\nnormalizer = "maximum(score, 0) ** 3"\n'),
        (64, 'mask = "causal"\nscore = "score - log(1 + abs(q_idx - kv_idx))"\n'),
        (
            128,
            'mask = "kv_idx <= q_idx and kv_idx % 4 != 3"\nscore = "score + w[h] * log(1 + abs(q_idx - kv_idx))"\n'
            'normalizer = "p = exp(2 * tanh(score)); p / row.sum(p)"\n[inputs]\nw = { index = ["h"], grad = true }\n',
        ),
        (128, 'mask = "causal"\nnormalizer = "softplus(score) / row.sum(softplus(score))"\n'),
    ],
    ids=["relu cubed", "distance", "sharp, by distance", "softplus"],
)
def test_no_kernel_of_an_unusual_formula_spills_on_hopper(attncc, tmp_path, head_dim, stages):
    """Whole tiles of dK and dV spill 8 to 184 bytes of these; in strips of queries they do not, and stay in Gluon."""
    (tmp_path / "unusual.toml").write_text(f"[stages]\n{stages}")
    words = (str(tmp_path / "unusual.toml"), "--target", "sm_90", "--head-dim", str(head_dim))
    found = json.loads(attncc("compile", *words, "--json").stdout)
    assert {name: usage["spill_bytes"] for name, usage in found["kernels"].items() if usage["spill_bytes"]} == {}
    assert not any(usage["faults"] for usage in found["kernels"].values())
    dkdv = found["schedule"]["dkdv"]
    assert dkdv["backend"] == "gluon"
    explained = attncc("explain", *words).stdout
    assert f"a tile in {dkdv['strips']} strips of queries" in explained


@pytest.mark.parametrize(("name", "said"), [("simple_gla", True), ("causal", False)])
def test_forms_that_the_file_has_not_are_said(attncc, name, said):
    result = attncc("compile", name, "--target", "sm_80", *SMALL)
    assert result.exit_code == 0
    assert ("the file takes g_sum: g.cumsum(2)" in " ".join(result.stderr.split())) is said
    assert ("not in the file: the forms in linear time" in " ".join(result.stderr.split())) is said
