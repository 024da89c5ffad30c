import json


def test_a_sound_spec_has_no_errors(attncc):
    result = attncc("check", "full", "--strict")
    assert result.exit_code == 0
    assert "full: 0 errors, 0 warnings, 0 notes" in result.stdout


def test_a_warning_fails_only_when_strict(attncc):
    words = ("check", "--mask", "kv_idx < q_idx")
    result = attncc(*words)
    assert result.exit_code == 0
    assert "warning: <mask>:1: mask: a query may see no key: q_len=1, kv_len=1, q_idx=0" in result.stdout
    assert attncc(*words, "--strict").exit_code == 1


def test_what_cannot_be_compiled_is_an_error(attncc, tmp_path):
    path = tmp_path / "squared.toml"
    path.write_text('[stages]\nreduction = "row.sum(weight**2 * v_vec)"\n')
    result = attncc("check", str(path))
    assert result.exit_code == 1
    assert "is not the weight times a factor" in result.stdout


def test_a_spec_that_is_wrong_fails_with_its_place(attncc, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text('[stages]\nmask = "kv_idx - q_idx"\n')
    result = attncc("check", str(path))
    assert result.exit_code == 1
    assert "bad.toml:2: mask: expected a boolean" in result.stderr
    assert "^^^^" in result.stderr


def test_no_spec_is_no_finding(attncc):
    assert attncc("check", "absent.toml").exit_code == 2


def test_a_gradient_collected_from_every_pair_is_worth_a_note(attncc, tmp_path):
    path = tmp_path / "product.toml"
    path.write_text('[stages]\nscore = "score + t[q_idx * kv_idx]"\n[inputs]\nt = { index = ["n"], grad = true }\n')
    findings = json.loads(attncc("check", str(path), "--json").stdout)["findings"]
    reason = "the gradient of t[kv_idx*q_idx] is collected from one float32 a pair"
    noted = [f for f in findings if reason in f["reason"]]
    assert [f["level"] for f in noted] == ["note"]
