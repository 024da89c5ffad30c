import pytest
import torch

from attncc.runtime import tune
from attncc.schedule import device as devices
from attncc.schedule.device import device_for

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")


@no_gpu
def test_without_a_gpu_nothing_is_tuned(attncc, own_cache):
    result = attncc("tune", "causal")
    assert result.exit_code == 2
    assert "there is none that torch can use" in result.stderr
    assert list(own_cache.iterdir()) == []


def test_a_race_is_shown_and_kept(attncc, monkeypatch, spec):
    class Stick:
        """Every candidate takes as long as its tile is high; the highest tiles are wrong."""

        def __init__(self, graph, shape, dtype, where, scalars):
            assert scalars == {"slope": 0.1, "window": 5}

        def __call__(self, kernel, schedule):
            if schedule.of(kernel).block_m == 128:
                raise tune.TrialError("wrong: out")
            return float(schedule.of(kernel).block_m)

    monkeypatch.setattr(tune, "gpu", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(tune, "Track", Stick)
    monkeypatch.setattr(devices, "device_of", lambda where: device_for("h100"))
    words = ("tune", str(spec), "--q-len", "512", "--head-dim", "64", "--limit", "30", "--set", "window=5")
    result = attncc(*words)
    assert result.exit_code == 0
    assert "model's choice" in result.stdout
    assert all(kernel in result.stdout for kernel in ("forward", "dkdv", "dq"))
    again = attncc(*words)
    assert "results were there from an earlier race" in again.stdout
    assert "mine B1 H16 M512 N512 D64 bf16 on NVIDIA H100" in attncc("cache", "list").stdout.replace("\n", " ")


def test_a_wrong_scalar_is_refused_before_anything_runs(attncc):
    result = attncc("tune", "causal", "--set", "window=5")
    assert result.exit_code == 2
    assert "it has no scalars" in result.stderr
