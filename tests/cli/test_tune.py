import json
from contextlib import nullcontext

import pytest
import torch

from attncc.cli import sizes
from attncc.runtime import tune
from attncc.runtime.race import LostDeviceError, TrialError
from attncc.schedule import device as devices
from attncc.schedule.cache import Cache
from attncc.schedule.choose import read_table
from attncc.schedule.device import device_for


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    monkeypatch.setattr("attncc.cli.tune.compilers", lambda: nullcontext(0))


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")


@no_gpu
def test_without_a_gpu_nothing_is_tuned(attncc, own_cache):
    result = attncc("tune", "causal")
    assert result.exit_code == 2
    assert "no GPU that torch can use" in result.stderr
    assert list(own_cache.iterdir()) == []


class Stick:
    """Every candidate takes as long as its tile is high; those of `wrong` rows may not win."""

    wrong = 0
    cramped = False

    def __init__(self, graph, shape, dtype, where, scalars):
        self.scalars = scalars

    def begin(self, trials):
        pass

    def check(self, kernel, schedule):
        if schedule.of(kernel).block_m == self.wrong:
            raise TrialError("wrong: out")

    def time(self, kernel, schedule, best_us):
        return float(schedule.of(kernel).block_m)

    def against(self, backward):
        return {"cuDNN (plain softmax)": (12.5, None)}


@pytest.fixture
def stick(monkeypatch):
    monkeypatch.setattr(tune, "gpu", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(tune, "Track", Stick)
    monkeypatch.setattr(devices, "device_of", lambda where: device_for("h100"))


def test_a_race_is_shown_and_kept(attncc, stick, spec, monkeypatch):
    monkeypatch.setattr(Stick, "wrong", 32)
    words = ("tune", str(spec), "--q-len", "512", "--head-dim", "64", "--limit", "30", "--set", "window=5")
    result = attncc(*words)
    assert result.exit_code == 0
    assert "model's choice" in result.stdout
    assert all(kernel in result.stdout for kernel in ("forward", "dkdv", "dq"))
    assert "<- best" in result.stderr
    assert "wrong: out" in result.stderr
    again = attncc(*words)
    assert "results were there from an earlier race" in again.stdout
    assert "mine B1 H16 M512 N512 D64 bf16 on NVIDIA H100" in attncc("cache", "list").stdout.replace("\n", " ")


def test_what_was_tuned_becomes_a_table_that_is_shipped(attncc, stick, tmp_path):
    """From the command line to what calls on such a GPU use."""
    file = tmp_path / "mine.json"
    assert "nothing in the cache was tuned on h100" in attncc("cache", "table", "h100", str(file)).stderr
    for name in ("causal", "alibi"):
        attncc("tune", name, "--shapes", "B1 H8 M700 D96", "--limit", "6")
    told = attncc("cache", "table", "h100", str(file), "--least", "1%").stdout
    assert f"of 2 to {file}" in told
    rows = read_table(file)
    assert {(row["match"]["d_qk"], row["match"]["q_bucket"]) for row in rows} == {(96, 1024)}
    tuned = [entry.value["schedule"] for entry in Cache().list() if entry.kind == "schedule"]
    assert {json.dumps(row["schedule"]) for row in rows} <= {json.dumps({**s, "origin": "shipped"}) for s in tuned}
    assert "is no percentage" in attncc("cache", "table", "h100", str(file), "--least", "much").stderr
    assert "a100" in attncc("cache", "table", "a100", str(file)).stderr


def test_several_specs_at_several_shapes_beside_pytorch(attncc, stick):
    shapes = "B1 H32/8 M1 N4096 D128, B2 H8 M512 D64"
    result = attncc("tune", "causal", "alibi", "--shapes", shapes, "--limit", "2", "--against")
    assert result.exit_code == 0
    for name in ("causal", "alibi"):
        assert f"{name}  B1 H32/8 M1 N4096 D128 bf16" in result.stdout
        assert f"{name}  B2 H8 M512 N512 D64 bf16" in result.stdout
    assert result.stdout.count("cuDNN (plain softmax)") == 4
    assert "split" in result.stdout


def test_one_of_several_that_fails_does_not_end_the_others(attncc, stick, monkeypatch):
    made = Stick.__init__

    def full(self, graph, shape, *rest):
        if shape.q_len == 4096:
            raise torch.OutOfMemoryError
        made(self, graph, shape, *rest)

    monkeypatch.setattr(Stick, "__init__", full)
    shapes = ("--shapes", "H8 M4096 D64, H8 M512 D64", "--limit", "2")
    result = attncc("tune", "causal", "alibi", *shapes)
    assert result.exit_code == 2
    assert result.stderr.count("do not fit in the memory of NVIDIA H100") == 2
    assert "2 of 4 ended with an error: causal B1 H8 M4096 N4096 D64; alibi B1 H8 M4096 N4096 D64" in result.stderr
    for name in ("causal", "alibi"):
        assert f"{name}  B1 H8 M512 N512 D64 bf16" in result.stdout


def test_a_lost_gpu_ends_all(attncc, stick, monkeypatch):
    def lost(self, kernel, schedule, best_us):
        raise LostDeviceError("an illegal access")

    monkeypatch.setattr(Stick, "time", lost)
    result = attncc("tune", "causal", "alibi", "--q-len", "512", "--limit", "2")
    assert result.exit_code == 2
    assert result.stderr.count("took the GPU with it") == 1


def test_what_is_cut_by_rule_is_said(attncc, stick):
    told = attncc("tune", "retention", "causal", "--q-len", "512", "--limit", "1").stderr
    assert "retention: this tunes the plan of all pairs" in told
    assert "causal: this" not in told
    refused = attncc("tune", "gated_delta_net")
    assert refused.exit_code == 2
    assert "there is nothing to tune: 'gated_delta_net' is a recurrence" in refused.stderr


def test_the_forward_alone(attncc, stick):
    shown = attncc("tune", "softcap", "--shapes", "B8 H32/8 M1 N8192", "--limit", "3", "--forward").stdout
    assert "forward" in shown
    assert "dkdv" not in shown


def test_a_budget_ends_a_race_and_says_what_is_left(attncc, stick):
    result = attncc("tune", "causal", "--q-len", "512", "--budget", "0.001s")
    assert result.exit_code == 0
    assert "candidates were left when the time was up" in result.stdout


def test_a_race_that_is_interrupted_says_what_is_kept(attncc, stick, monkeypatch):
    words = ("tune", "causal", "--q-len", "512", "--head-dim", "96", "--limit", "4")
    measured = []

    def time(self, kernel, schedule, best_us):
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(kernel)
        return 10.0

    with monkeypatch.context() as patch:
        patch.setattr(Stick, "time", time)
        result = attncc(*words)
    assert result.exit_code == 130
    assert "every result so far is in the cache" in result.stderr
    assert "5 of 12 results were there" in attncc(*words).stdout


def test_results_that_cannot_be_written_are_said_to_be_lost(attncc, stick, monkeypatch, tmp_path):
    words = ("tune", "causal", "--q-len", "512", "--head-dim", "96", "--limit", "2")
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setenv("ATTNCC_CACHE_DIR", str(tmp_path / "file" / "cache"))
        result = attncc(*words)
    assert result.exit_code == 0
    assert "results are lost: " in result.stderr
    assert "results are lost: " not in attncc(*words).stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--shapes", "B1 Q7"), "'Q7' in the shape 'B1 Q7' is no size"),
        (("--shapes", "M4/2"), "is no size"),
        (("--shapes", ","), "names no shape"),
        (("--budget", "soon"), "'soon' is no duration"),
        (("--budget", "0s"), "is no duration"),
    ],
)
def test_sizes_and_times_of_another_form_are_refused(attncc, stick, words, said):
    result = attncc("tune", "causal", *words)
    assert result.exit_code == 2
    assert said in result.stderr


def test_what_is_mistyped_is_said_before_anything_starts(attncc, monkeypatch):
    monkeypatch.setattr("attncc.cli.tune.compilers", lambda: pytest.fail("processes were started"))
    for words in (("--shapes", "4x16x4096x128"), ("--budget", "soon")):
        result = attncc("tune", "causal", *words)
        assert result.exit_code == 2
        assert "starting torch" not in result.stderr
        assert words[1] in result.stderr


def test_what_a_shape_leaves_out():
    defaults = {"b": 3, "h": 6, "h_kv": 2, "q_idx": 5, "kv_idx": 7, "d_qk": 16, "d_v": 8}
    assert sizes.shapes(["H4 M9", "n11 d32/64"], defaults) == [
        {**defaults, "h": 4, "h_kv": 4, "q_idx": 9, "kv_idx": 9},
        {**defaults, "kv_idx": 11, "d_qk": 32, "d_v": 64},
    ]
    assert [sizes.seconds(text) for text in ("90", "1.5m", " 2 h")] == [90, 90, 7200]


def test_a_wrong_scalar_is_refused_before_anything_runs(attncc):
    result = attncc("tune", "causal", "--set", "window=5")
    assert result.exit_code == 2
    assert "it has no scalars" in result.stderr
