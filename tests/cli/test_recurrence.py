"""Each command on a variant that is a recurrence: it does its work, or says why there is none."""

import json

import pytest

NO_FORM = """
[recurrence]
state = "exp(g[b, h, kv_idx]) * state - k_vec * dot(k_vec, state) + k_vec * v_vec"
[inputs]
g = { index = ["b", "h", "kv_idx"] }
"""


def test_show_prints_the_two_formulas(attncc):
    shown = attncc("show", "delta_net").stdout
    assert "state      = k_vec*(v_vec - dot(k_vec, state))*beta[b, h, kv_idx] + state" in shown
    assert "out        = scale*dot(q_vec, state)" in shown
    assert "matrix, a token" in attncc("show", "delta_net", "--ir").stdout
    assert "there is no mask to draw" in attncc("show", "delta_net", "--svg", "mask.svg").stderr


def test_check_finds_the_term_that_does_not_fit(attncc, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(NO_FORM)
    result = attncc("check", str(path))
    assert result.exit_code == 1
    assert "what is erased" in result.stdout
    assert "^^^" in result.stdout
    assert attncc("check", "gated_delta_net").exit_code == 0


def test_explain_has_the_proof(attncc):
    found = json.loads(attncc("explain", "gated_delta_net", "--target", "h100", "--json").stdout)
    assert found["family"] == "rank one"
    assert found["state"] == [128, 128]
    assert any("(I - (beta[b, h, kv_idx]) * k k')" in line for line in found["proof"])
    assert "a matrix that is rank one" in attncc("explain", "delta_net", "--target", "h100").stdout
    assert "not modelled" in attncc("explain", "delta_net", "--roofline", "roof.svg").stderr


@pytest.mark.parametrize("target", ["sm_90"])
def test_compile_counts_registers_and_writes_the_kernels(attncc, tmp_path, target):
    path = tmp_path / "delta.py"
    words = ("compile", "delta_net", "--target", target, "--head-dim", "32", "--q-len", "64")
    found = json.loads(attncc(*words, "-o", str(path), "--json").stdout)
    assert {"prepare_kernel", "carry_kernel", "step_kernel"} <= set(found["kernels"])
    assert all(kernel["registers"] for kernel in found["kernels"].values())
    assert "def carry_back_kernel(" in path.read_text()
