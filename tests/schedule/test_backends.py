"""Which language a kernel is taken in: what is asked for, what is measured, what is predicted."""

from dataclasses import replace
from functools import cache

import pytest

import attncc as ac
from attncc.codegen.plan import Plan
from attncc.codegen.problem import problem_of
from attncc.errors import AttnccError
from attncc.resources import path
from attncc.schedule import device_for, hopper
from attncc.schedule.choose import backend_of, choose, read_table
from attncc.schedule.device import parse_device
from attncc.schedule.problem import KernelSchedule, WarpWork
from tests.hopper_served import NO_BACKWARD, NO_FORWARD
from tests.schedule.problems import full_live, problem

MEASURED = device_for("h100")
H100 = replace(MEASURED, gluon=())


def backends(schedule):
    return schedule.forward.backend, schedule.dkdv.backend, schedule.dq.backend


def test_what_is_asked_for_is_taken_where_there_is_one():
    assert backends(choose(problem(), H100, backend="triton")) == ("triton", "triton", "triton")
    assert backends(choose(problem(), H100, backend="gluon")) == ("gluon", "gluon", "triton")
    assert backends(choose(problem("fp32"), H100, backend="gluon")) == ("triton", "triton", "triton")
    assert backends(choose(problem(d_qk=256), H100, backend="gluon")) == ("gluon", "gluon", "triton")
    assert backends(choose(problem(d_qk=48), H100, backend="gluon")) == ("gluon", "triton", "triton")
    assert backends(choose(problem(), device_for("a100"), backend="gluon")) == ("triton", "triton", "triton")


def test_the_scheduler_takes_gluon_where_its_file_says_that_it_was_measured():
    assert backends(choose(problem(), H100)) == ("triton", "triton", "triton")
    assert backends(choose(problem(), replace(H100, gluon=("forward",)))) == ("gluon", "triton", "triton")
    assert backends(choose(problem(), MEASURED)) == ("gluon", "gluon", "triton")
    assert "h100.toml" in backend_of("forward", problem(), H100)[1]
    assert "predicted" in backend_of("forward", problem(), MEASURED)[1]


def test_the_backward_of_wide_heads_is_measured_for_itself():
    narrow = replace(H100, gluon=("forward", "dkdv"))
    assert backends(choose(problem(d_qk=256), narrow)) == ("gluon", "triton", "triton")
    assert "dkdv_wide under gluon: not measured" in backend_of("dkdv", problem(d_qk=256), narrow)[1]
    assert backends(choose(problem(d_qk=256), MEASURED)) == ("gluon", "gluon", "triton")


def test_heads_of_a_group_go_to_programs_of_their_own_where_that_is_worth_its_sums():
    assert choose(problem(heads=28, kv_heads=4), MEASURED).dkdv.splits == 7
    assert choose(problem(), MEASURED).dkdv.splits == 0
    few_queries = problem(batch=64, heads=8, kv_heads=1, length=128, kv_len=8192, live=full_live)
    assert choose(few_queries, MEASURED, backend="gluon").dkdv.splits == 0


def test_three_warpgroups_have_three_tiles_of_keys_under_way():
    narrow = problem(d_qk=64, length=8192, live=full_live)
    chosen = choose(narrow, MEASURED, backend="gluon").forward
    assert (chosen.block_m, chosen.num_stages) == (192, 3)
    assert choose(problem(length=8192), MEASURED, backend="gluon").forward.num_stages == 2


def test_a_shipped_schedule_keeps_what_is_in_its_backend():
    row = read_table(path("schedules") / "tuned" / "h100" / "d128.json")[0]["match"]
    known = problem(row["dtype"], row["d_qk"], digest=row["digest"])
    shipped, mixed = choose(known, H100), choose(known, replace(H100, gluon=("forward",)))
    assert shipped.origin == "shipped"
    assert mixed.origin == "model"
    assert (mixed.dkdv, mixed.dq) == (shipped.dkdv, shipped.dq)


def test_a_row_that_gluon_won_says_nothing_to_who_asks_for_triton():
    """Of the length at which both raced, beside one of the same formula at any length, which is of Triton's kernels."""
    rows = read_table(path("schedules") / "tuned" / "h100" / "regret.json")
    row = next(r for r in rows if r["match"]["q_bucket"] == 8192 and r["schedule"]["forward"]["block_n"] == 64)
    match = row["match"]
    known = problem(match["dtype"], match["d_qk"], length=8192, digest=match["digest"])
    assert choose(known, H100).forward == KernelSchedule.from_json(row["schedule"]["forward"])
    asked = choose(known, H100, backend="triton")
    assert asked.origin == "shipped"
    assert backends(asked) == ("triton", "triton", "triton")


@cache
def shipped(name):
    graph = ac.variants.get(name).graph
    sizes = {"b": 2, "h": 4, "h_kv": 2, "q_idx": 300, "kv_idx": 517, "d_qk": 64 * graph.branches, "d_v": 64}
    return problem_of(Plan(graph), sizes, "bf16", "ieee", {s.name: s.default for s in graph.scalars})


@pytest.mark.parametrize(("kernel", "left"), [("forward", NO_FORWARD), ("dkdv", NO_BACKWARD)])
def test_shipped_variants_that_are_left_to_triton(kernel, left):
    """A GPU's tests take the rest from the same list."""
    reasons = {name: hopper.refusal(kernel, shipped(name), H100) for name in ac.variants.names()}
    assert {name for name, reason in reasons.items() if reason is not None} == set(left)
    assert not {name: reasons[name] for name, begins in left.items() if not reasons[name].startswith(begins)}


@pytest.mark.parametrize("length", [1024, 2048, 8192])
def test_terms_that_are_passed_on_leave_dq_to_its_own_kernel_in_either_language(length):
    sizes = {"b": 32768 // length, "h": 16, "h_kv": 16, "q_idx": length, "kv_idx": length, "d_qk": 128, "d_v": 128}
    plans = [Plan(ac.variants.get(name).graph) for name in ("squared_distance", "causal")]
    passed_on, plain = (problem_of(plan, sizes, "bf16", "ieee", {}) for plan in plans)
    tile = KernelSchedule(64, 128, 8, 2, "gluon")
    alone, _ = hopper.predict("dkdv", tile, passed_on, MEASURED)
    with_dq, _ = hopper.predict("dkdv", tile, plain, MEASURED)
    assert alone < 0.9 * with_dq  # a matmul of five and dQ's sums less
    assert backend_of("dkdv", passed_on, MEASURED)[0] == "gluon"


def test_reasons():
    costs = problem().costs
    heavy = replace(problem(), costs=replace(costs, warps=WarpWork(slope=False, columns_apart=2)))
    more = replace(problem(), costs=replace(costs, warps=WarpWork(no_backward="because")))
    assert "registers" in hopper.refusal("dkdv", heavy, H100)
    assert hopper.refusal("dkdv", more, H100) == "because"
    assert hopper.refusal("forward", more, H100) is None
    assert hopper.refusal("dkdv", problem(d_qk=192, d_v=128), H100) is None
    sums = replace(problem(d_qk=192), costs=replace(costs, warps=WarpWork(columns=1)))
    assert "share the queries" in hopper.refusal("dkdv", sums, H100)
    assert "multiple of 8" in hopper.refusal("dkdv", problem(d_qk=100), H100)


def test_stages_that_keep_more_get_smaller_tiles():
    costs = problem().costs
    cog = replace(
        problem(), costs=replace(costs, forward=replace(costs.forward, fma=10), warps=WarpWork(vanishes=False))
    )
    assert {ks.block_n for ks in hopper.tilings("forward", problem(), H100)} == {64, 128}
    assert {ks.block_n for ks in hopper.tilings("forward", cog, H100)} == {64}


def test_a_device_file_names_kernels_that_gluon_has(tmp_path):
    text = (path("schedules") / "devices" / "h100.toml").read_text()
    file = tmp_path / "h100.toml"
    named = 'gluon = ["forward", "decode", "dkdv", "dkdv_wide"]'
    assert named in text
    file.write_text(text.replace(named, 'gluon = ["forward"]'))
    assert parse_device(file).gluon == ("forward",)
    file.write_text(text.replace(named, 'gluon = ["dq"]'))
    with pytest.raises(AttnccError, match="gluon"):
        parse_device(file)
