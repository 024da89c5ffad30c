import json

from attncc.runtime import doctor


def test_everything_is_tried():
    findings = {f.name: f for f in doctor.examine()}
    assert list(findings) == [
        *("attncc", "torch", "triton", "sympy", "GPU"),
        *("assembler", "cross-compilation", "interpreter", "cache folder", "plots"),
    ]
    assert all(f.ok for f in findings.values())
    assert "registers" in findings["cross-compilation"].detail


def test_a_failure_is_a_finding_and_the_exit_code(attncc, monkeypatch):
    def broken():
        raise FileNotFoundError("no ptxas")

    for name in ("_cross_compilation", "_interpreter"):
        monkeypatch.setattr(doctor, name, lambda: "works")
    monkeypatch.setattr(doctor, "_assembler", broken)
    result = attncc("doctor")
    assert result.exit_code == 1
    assert "broken" in result.stdout
    assert "FileNotFoundError: no ptxas" in result.stdout
    entries = json.loads(attncc("doctor", "--json").stdout)
    assert [e["name"] for e in entries if not e["ok"]] == ["assembler"]


def test_a_cache_folder_that_cannot_be_made_is_broken(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(blocked / "cache"))
    assert not doctor._tried("cache folder", doctor._cache_folder).ok
