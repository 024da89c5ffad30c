import importlib
import json
import re

import pytest

import attncc as ac
from attncc.errors import UnsupportedError
from attncc.schedule.cache import Cache


@pytest.fixture
def nothing_shipped(monkeypatch):
    """Without the tables of measured schedules, so that the model chooses."""
    monkeypatch.setattr(importlib.import_module("attncc.schedule.choose"), "_table", lambda device: ())


def test_a_shipped_schedule_is_named_as_measured():
    assert "is measured, and shipped with attncc" in ac.compile("causal", backend="triton").explain(target="h100")


def test_explain_says_what_is_derived_and_chosen(nothing_shipped, attncc):
    text = attncc("explain", "alibi", "--target", "h100", "--q-len", "2048").stdout
    assert "exp(row_max_0 - row_max_0_new), free of s" in text
    assert "dqk" in text
    assert "scale*(dp - delta)*exp(score - lse)" in text
    assert "dslopes[h]" in text
    assert "NVIDIA H100" in text
    assert text.count("\n-> ") == 3
    assert "first choice: the lines with ->" in text
    assert "where * limits" in text
    assert "the cost model's first choice" in text


def test_json_counts_the_tiles_of_the_real_mask(attncc):
    words = ("explain", "causal", "--target", "sm_80", "--q-len", "1024", "--json", "--top", "3")
    found = json.loads(attncc(*words).stdout)
    assert found["device"]["name"] == "a100"
    assert list(found["kernels"]) == ["forward", "dkdv", "dq"]
    for kernel in found["kernels"].values():
        block_m, block_n = kernel["chosen"]["block_m"], kernel["chosen"]["block_n"]
        tiles = kernel["tiles"]
        visible = {(q // block_m, k // block_n) for q in range(1024) for k in range(q + 1)}
        assert tiles["full"] + tiles["mixed"] == len(visible)
        assert tiles["total"] == (1024 // block_m) * (1024 // block_n)
        assert len(kernel["candidates"]) == 3
        assert kernel["candidates"][0]["us"] <= kernel["candidates"][1]["us"]


def test_scalars_shapes_and_gradients_reach_the_answer(attncc):
    words = ("sliding_window", "--target", "l4", "--kv-heads", "4", "--head-dim", "96", "--head-dim-v", "64")
    text = attncc("explain", *words, "--set", "window=128", "--dtype", "fp16").stdout
    assert "H=16/4 M=8192 N=8192 D=96/64 fp16 window=128" in text
    pairs = attncc("explain", "dense_bias", "--target", "h100", "--q-len", "256").stdout
    assert "dbias[b, h, q_idx, kv_idx]" in pairs
    assert "\npair\n    tiles of" in pairs


def test_the_command_and_the_op_say_the_same(attncc):
    op = ac.compile("softcap")
    assert op.explain(q_len=512, target="h100") == attncc(
        "explain", "softcap", "--q-len", "512", "--target", "h100"
    ).stdout.rstrip("\n")


def test_the_op_explains_its_own_schedule_and_refuses_unknown_scalars():
    ks = ac.KernelSchedule(64, 32, 4, 2)
    text = ac.compile("softcap", schedule=ac.Schedule(ks, ks, ks, origin="user")).explain(q_len=512, target="h100")
    assert "the schedule is as given" in text
    assert len(re.findall(r"\n-> +64x32     4      2", text)) == 3
    assert "in Triton (" not in text
    with pytest.raises(ac.InputError, match="no scalar 'cup'"):
        ac.compile("softcap").explain(target="h100", cup=3.0)
    with pytest.raises(ac.InputError, match="did you mean 'q_len'"):
        ac.compile("softcap").explain(target="h100", qlen=512)


def test_the_table_of_candidates_fits_a_terminal_of_80(attncc):
    text = attncc("explain", "alibi", "--target", "h100", "--top", "12").stdout
    rows = [line for line in text.splitlines() if re.match(r"(->|  ) +(gluon )?\d+x\d+ ", line)]
    assert len(rows) >= 36
    assert max(map(len, rows)) <= 80
    assert all(row.count("*") == 1 for row in rows)


def test_a_gradient_with_a_long_index_leaves_the_other_lines_as_wide_as_they_are(attncc):
    """T5's bucket is ten comparisons long, and its gradient is named by it."""
    lines = attncc("explain", "t5_bias", "--target", "h100").stdout.splitlines()
    derived = lines[lines.index("backward, derived") :]
    assert next(line for line in derived if line.startswith("  dv_vec ")).endswith("= weight*dout")
    assert all(len(line) < 100 for line in derived[:8])
    assert any(line.startswith("  dtable[minimum(abs(") and " = sum over the pairs" in line for line in derived)


def test_a_variant_without_a_backward_says_why(attncc, monkeypatch):
    def refuse(*_):
        raise UnsupportedError("nobody knows its derivative")

    monkeypatch.setattr("attncc.codegen.plan.differentiate", refuse)
    result = attncc("explain", "causal", "--target", "h100", "--q-len", "256")
    assert result.exit_code == 0
    assert "none: nobody knows its derivative" in result.stdout
    assert "dkdv" not in result.stdout


def test_each_pass_over_the_keys_is_explained(attncc):
    result = attncc("explain", "--normalizer", "relu(score - row.mean(score))", "--target", "h100", "--q-len", "256")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert "forward: pass 1 of 2 over the keys, because the weight needs row_sum_0 and row_sum_1" in text
    assert "forward: the last of 2 passes over the keys, because" in text
    assert "row_part_0 (a sweep of its own)" in text
    text = " ".join(attncc("explain", "entmax15", "--target", "h100", "--q-len", "256").stdout.split())
    assert "row_root_0 = row.root(lambda t: row.sum(relu(score/2 - t)**2) - 1, row_max_0 - 1, row_max_0)" in text


@pytest.mark.parametrize(
    ("words", "finding"),
    [
        (("--target", "h900"), "known architectures: sm_80"),
        (("--target", "cpu"), "nothing to predict"),
        (("--heads", "6", "--kv-heads", "4"), "6 query heads are no multiple of 4"),
        (("--head-dim", "4096", "--target", "rtx3090", "--dtype", "fp32"), "does not fit"),
    ],
)
def test_impossible_requests_are_refused(attncc, words, finding):
    result = attncc("explain", "full", *words)
    assert result.exit_code == 2
    assert finding in result.stderr


def test_a_tuned_schedule_is_named_as_such_and_a_corrupt_one_is_a_warning(nothing_shipped, attncc, own_cache):
    from attncc.codegen.plan import Plan
    from attncc.codegen.problem import problem_of
    from attncc.runtime.explain import sizes_of
    from attncc.schedule.choose import schedule_key
    from attncc.schedule.device import device_for

    problem = problem_of(Plan(ac.variants.get("causal").graph), sizes_of(512), "bf16", "ieee", {})
    key = schedule_key(problem, device_for("h100"))
    ks = ac.KernelSchedule(16, 32, 1, 2)
    schedule = ac.Schedule(ks, ks, ks, origin="tuned")
    Cache().put(key, {"kind": "schedule", "schedule": schedule.to_json()})
    words = ("explain", "causal", "--target", "h100", "--q-len", "512")
    assert "measured on this machine" in attncc(*words).stdout
    (own_cache / f"{key}.json").write_text("{")
    result = attncc(*words)
    assert result.exit_code == 0
    assert "the cost model's first choice" in result.stdout
    assert "warning: the cache entry" in result.stderr


def test_a_roofline_is_drawn_and_told(attncc, tmp_path):
    roof = tmp_path / "roof.svg"
    words = ("explain", "softcap", "--target", "h100", "--q-len", "1", "--kv-len", "8192", "--heads", "32")
    result = attncc(*words, "--kv-heads", "8", "--roofline", str(roof))
    assert result.exit_code == 0
    assert "the share of it that each kernel reaches" in result.stdout
    assert "forward, predicted" in roof.read_text()
    again = attncc(*words, "--kv-heads", "8", "--roofline", str(tmp_path / "no" / "roof.svg"))
    assert again.exit_code == 2
    assert "cannot be written" in again.stderr


@pytest.mark.parametrize(
    ("dim", "said"),
    [
        ("128", "its programs take turns where the order must be fixed; dq makes dQ where the gradient of sink"),
        ("256", "a second kernel in Gluon makes dQ; dq makes it where gradients of sink are wanted"),
    ],
)
def test_which_kernel_makes_dq(nothing_shipped, attncc, dim, said):
    text = attncc("explain", "sink", "--target", "h100", "--q-len", "4096", "--head-dim", dim).stdout
    assert said in " ".join(text.split())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "sink",
            "dkdv sums dQ in a fixed order, in which its programs take turns; dq makes dQ where the gradient of sink",
        ),
        ("prefix_lm", "dq makes dQ, for the order of sums is fixed"),
    ],
)
def test_what_sums_dq_in_a_fixed_order(nothing_shipped, name, said):
    op = ac.compile(name, backend="gluon", deterministic=True)
    text = op.explain(q_len=4096, target="h100")
    assert said in " ".join(text.split())
    assert "free order" not in text


def test_dkdv_in_gluon_is_not_said_to_make_a_dq_that_dq_makes(nothing_shipped, attncc):
    cosine, causal = (attncc("explain", name, "--target", "h100").stdout for name in ("cosine", "causal"))
    assert "dq makes dQ, with what terms of the similarity pass on to it" in cosine
    for said in (", with dQ", "those in Gluon make dQ, too"):
        assert said not in cosine
        assert said in causal


def test_heads_of_a_group_that_have_programs_of_their_own_add_up_in_turns(nothing_shipped, attncc):
    grouped = ("--target", "h100", "--q-len", "4096", "--batch", "4", "--heads", "28", "--kv-heads")
    shared, apart = (attncc("explain", "causal", *grouped, kv_heads).stdout for kv_heads in ("4", "28"))
    assert "a program for each query head of a group; they add up dK and dV in turns" in shared
    assert "gluon 64x128, 7 parts" in shared
    assert "of a group" not in apart
    turns = "; its programs take turns where the order must be fixed"
    assert f"dkdv sums dQ in a free order{turns}" in shared
    assert f"dkdv sums dQ in a free order; a program has block after block of keys in that order{turns}" in apart
    biased = attncc("explain", "relative_bias", *grouped, "28").stdout
    assert "dkdv sums dQ and the gradient of table in a free order" in biased
