import json

import pytest

from attncc.schedule.choose import read_table, table_text
from attncc.schedule.problem import KERNELS, KernelSchedule
from bench import tuned
from bench.suites.sweep import CASES, Cell, rotate


def schedules(count):
    return [KernelSchedule(16 << i, 32, 4, 2) for i in range(count)]


def test_rotation_shows_every_candidate_in_as_few_schedules_as_possible():
    candidates = {"forward": schedules(3), "dkdv": schedules(5), "dq": schedules(1)}
    combined = list(rotate(candidates))
    assert len(combined) == 5
    for kernel in KERNELS:
        assert {schedule.of(kernel) for schedule in combined} == set(candidates[kernel])


def test_a_cell_keeps_tokens_and_channels():
    shape = Cell("causal", 64, 8192).shape
    assert (shape.b, shape.h, shape.m, shape.d) == (4, 32, 8192, 64)
    assert "sigmoid" in CASES


def row(kernel, **changes):
    best = {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3, "us": 10.0}
    sizes = {"Hq": 16, "Hkv": 4, "M": 8000, "N": 8000, "Dqk": 128, "Dv": 128}
    return {"case": "causal", "digest": "d1", **sizes, "dtype": "bfloat16", "kernel": kernel, "best": best, **changes}


def test_a_sweep_becomes_a_table_that_attncc_reads(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(table_text(tuned.table({"rows": [row(kernel) for kernel in KERNELS]})))
    (found,) = read_table(path)
    assert found["match"] == {
        "digest": "d1",
        "dtype": "bf16",
        "d_qk": 128,
        "d_v": 128,
        "group": 4,
        "q_bucket": 8192,
        "kv_bucket": 8192,
    }
    assert found["schedule"]["dq"] == {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3}


def test_a_table_for_any_variant_does_not_name_one():
    (found,) = tuned.table({"rows": [row(kernel) for kernel in KERNELS]}, any_variant=True)
    assert "digest" not in found["match"]


def test_a_table_for_any_shape_names_head_dimensions_alone():
    (found,) = tuned.table({"rows": [row(kernel) for kernel in KERNELS]}, any_shape=True)
    assert found["match"] == {"digest": "d1", "dtype": "bf16", "d_qk": 128, "d_v": 128}


@pytest.mark.parametrize(
    ("rows", "finding"),
    [
        ([row("forward"), row("dq")], "no dkdv was swept"),
        ([*(row(kernel) for kernel in KERNELS), row("dq")], "two sweeps of dq"),
        ([{"case": "causal", "error": "RuntimeError: no"}], "the sweep of causal failed"),
    ],
)
def test_an_unfit_sweep_is_refused(rows, finding):
    with pytest.raises(ValueError, match=finding):
        tuned.table(json.loads(json.dumps({"rows": rows})))
