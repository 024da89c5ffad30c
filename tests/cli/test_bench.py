import json

import pytest
import torch

from attncc.runtime import tune
from attncc.runtime.race import TrialError
from attncc.schedule import device as devices
from attncc.schedule.device import device_for


class Stick:
    """A forward takes 100 microseconds, a backward 400."""

    wrong = False

    def __init__(self, graph, shape, dtype, where, scalars):
        self.shape = shape

    def begin(self, trials):
        pass

    def check(self, kernel, schedule):
        if self.wrong:
            raise TrialError("wrong: out")

    def time(self, kernel, schedule, best_us):
        return 100.0 if kernel == "forward" else 400.0

    def against(self, backward):
        return {"cuDNN": (120.0, 380.0), "FlashAttention-2": (None, None)}


@pytest.fixture
def stick(monkeypatch):
    monkeypatch.setattr(tune, "gpu", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(tune, "Track", Stick)
    monkeypatch.setattr(devices, "device_of", lambda where: device_for("h100"))


def test_without_a_gpu_nothing_is_timed(attncc):
    if torch.cuda.is_available():
        pytest.skip("what is said without a GPU")
    result = attncc("bench", "causal")
    assert result.exit_code == 2
    assert "no GPU that torch can use" in result.stderr


def test_cases_stand_beside_the_machine_and_pytorch(attncc, stick, tmp_path):
    roof = tmp_path / "roof.svg"
    words = ("bench", "full", "mla", "--shapes", "B2 H16 M2048 D128", "--against", "--roofline", str(roof))
    result = attncc(*words)
    assert result.exit_code == 0
    assert "full  B2 H16 M2048 N2048 D128 bf16  on NVIDIA H100" in result.stdout
    assert "687.2 TFLOP/s" in result.stdout  # 4 * 2 * 16 * 2048^2 * 128 operations in 100 microseconds
    assert "cuDNN" in result.stdout
    assert "<svg" in roof.read_text()


def test_json_for_programs(attncc, stick):
    (case,) = json.loads(attncc("bench", "sigmoid", "--q-len", "512", "--json").stdout)
    assert [(p["name"], p["source"]) for p in case["points"]] == [
        ("forward", "predicted"),
        ("forward", "measured"),
        ("backward", "measured"),
    ]
    assert case["points"][1]["us"] == 100.0
    assert case["peers"] == {}


def test_a_wrong_result_is_not_timed(attncc, stick, monkeypatch):
    monkeypatch.setattr(Stick, "wrong", True)
    result = attncc("bench", "causal")
    assert result.exit_code == 1
    assert "wrong: out" in result.stderr
    assert "TFLOP/s" not in result.stdout


def test_formulas_on_the_command_line_are_one_spec(attncc, stick):
    result = attncc("bench", "causal", "full", "--score", "2 * score")
    assert result.exit_code == 2
    assert "are one spec" in result.stderr
