"""The regret table without a GPU: which cells and candidates race, and what is made of their times."""

import json
import random
from dataclasses import replace

import pytest
import torch

from attncc.runtime.race import order
from attncc.schedule import KernelSchedule, cost, hopper, load_device, ranked
from attncc.schedule.choose import read_table, table_text
from attncc.schedule.model import model
from bench import ahead
from bench.held_out import drawn, held_out, reading
from bench.record import Results, keep, load
from bench.regret import Measured, Regret, markdown, of_direction, regrets, summary
from bench.regret_cells import REACHES, Trial, cells, first_choices, plan, problem_of
from bench.suites import regret
from bench.tuned import corrections

DEVICE = load_device("h100")


@pytest.fixture(scope="module")
def planned():
    """The plans of one shape, forward and backward: of which the model leaves the backward to Triton."""
    return [plan(replace(cell, shape=replace(cell.shape, b=8)), DEVICE) for cell in cells()[:2]]


def test_there_are_cells_enough_of_every_kind():
    found = cells()
    assert len(set(found)) == len(found) >= 60
    assert len({cell.variant for cell in found}) >= 12
    assert {64, 96, 128, 192, 256} <= {cell.shape.d for cell in found}
    assert {512, 16384} <= {cell.shape.m for cell in found}
    assert any(cell.shape.m == 1 for cell in found)
    assert any(cell.shape.group > 1 and cell.mode == "backward" for cell in found)
    assert any(cell.shape.m != cell.shape.n for cell in found if cell.mode == "backward")


def test_candidates_of_both_languages_race_and_the_first_choices_do(planned):
    forward, backward = planned
    tilings = [trial.schedule.forward for trial in forward.trials]
    assert {ks.backend for ks in tilings} == {"triton", "gluon"}
    assert {forward.model.forward, forward.used.forward} <= set(tilings)
    assert len(set(tilings)) == len(tilings)
    assert any(trial.whole for trial in backward.trials)
    parts = {trial.schedule.dkdv for trial in backward.trials}, {trial.schedule.dq for trial in backward.trials}
    assert backward.model.dkdv in parts[0]
    assert backward.model.dq in parts[1]


def test_every_candidate_races_once_and_the_promising_first(planned):
    forward, backward = planned
    problem = problem_of(forward.cell)
    tilings = [trial.schedule.forward for trial in forward.trials]
    assert sorted(map(str, tilings)) == sorted(str(ks) for ks, _ in ranked("forward", problem, DEVICE, None))
    dkdv, dq = ({trial.schedule.of(part) for trial in backward.trials} for part in ("dkdv", "dq"))
    assert dkdv >= {ks for ks, _ in ranked("dkdv", problem, DEVICE, None)}
    assert dq >= {ks for ks, _ in ranked("dq", problem, DEVICE)}
    first = dict(ranked("forward", problem, DEVICE, None))
    for number, trials in enumerate(forward.rounds):
        ratios = [first[t.schedule.forward].us / first[forward.model.forward].us for t in trials]
        slow = [r for r, t in zip(ratios, trials, strict=True) if t.schedule.forward.backend == "triton"]
        assert all(ratio <= REACHES[number] for ratio in slow)
    assert len(forward.rounds[0]) < len(tilings) // 2


def test_rounds_of_a_cell_come_in_order_and_end_with_the_time(planned):
    from concurrent.futures import Future

    def job(finished):
        future = Future()
        if finished:
            future.set_result(None)
        return future

    found = object.__new__(ahead.Ahead)
    one, two = planned
    found._waiting = [(one, 0, [job(False)]), (two, 0, [job(True)]), (one, 1, [job(True)]), (two, 1, [])]
    assert list(found.ready(0.0)) == [(two, 0), (two, 1)]


class Bench:
    """Stands for the GPU: every candidate gives the same values."""

    def __init__(self, cell):
        pass

    def call(self, schedule):
        def run():
            Bench.now = schedule
            return {"out": torch.ones(4)}

        return run


def test_later_rounds_go_on_where_the_first_stopped(planned, monkeypatch):
    forward, _ = planned
    fast = forward.rounds[-1][0].schedule.forward
    timed = []

    def device_us(call, calls):
        call()
        timed.append(Bench.now.forward)
        us = 50.0 if Bench.now.forward == fast else 100.0 if Bench.now.forward.backend == "gluon" else 200.0
        return {"all": us, "dkdv": 0.0, "dq": 0.0}

    monkeypatch.setattr(regret, "Bench", Bench)
    monkeypatch.setattr(regret, "device_us", device_us)
    standing = regret.Standing(forward)
    standing.race(0)
    row = standing.row()
    assert row["reach"] == REACHES[0]
    assert row["left_out"] == len(forward.trials) - len(forward.rounds[0])
    for number in range(1, len(REACHES)):
        timed.clear()
        standing.race(number)
        if number < len(REACHES) - 1:  # nothing of it comes near the best: no second race
            assert len(timed) == len(forward.rounds[number])
    row = standing.row()
    assert (row["reach"], row["left_out"], row["best_us"]) == (None, 0, 50.0)
    assert len(row["measured"]["whole"]) == len(forward.trials)


def test_kernels_that_overlap_count_once():
    assert regret.busy([(0.0, 10.0), (4.0, 12.0), (5.0, 6.0), (20.0, 21.0)]) == 13.0
    assert regret.busy([]) == 0.0


def test_first_choices_are_of_the_model_alone(planned):
    forward, _ = planned
    assert first_choices(problem_of(forward.cell), DEVICE) == forward.model


def test_trials_of_the_same_kernels_compile_once(planned):
    forward, backward = planned
    first, second = (replace(forward.model, dq=KernelSchedule(16, n, 4, 2)) for n in (16, 32))
    assert Trial(first, "forward").kernels == Trial(second, "forward").kernels
    gluon = next(trial for trial in backward.trials if trial.whole)
    assert Trial(replace(gluon.schedule, dq=first.dq), "backward").kernels == gluon.kernels
    triton = next(trial for trial in backward.trials if not trial.whole)
    assert Trial(replace(triton.schedule, dq=first.dq), "backward").kernels != triton.kernels


def row(plan, **times):
    measured = {"whole": [], "dkdv": [], "dq": [], "beside_us": 5.0}
    for kernel, entries in times.items():
        measured[kernel] = [{**ks.to_json(), "us": us} for ks, us in entries]
    return {"case": plan.cell.variant, **plan.cell.shape.row(), "mode": plan.cell.mode, "measured": measured}


def test_a_forward_is_held_against_the_fastest(planned):
    forward, _ = planned
    others = [t.schedule.forward for t in forward.trials if t.schedule.forward != forward.model.forward]
    found = of_direction(row(forward, whole=[(forward.model.forward, 110.0), (others[0], 100.0)]), DEVICE)
    assert (found.us, found.best, found.best_us, found.measured) == (110.0, str(others[0]), 100.0, True)
    assert found.share == pytest.approx(0.1)
    unmeasured = of_direction(row(forward, whole=[(others[0], 100.0)]), DEVICE)
    assert not unmeasured.measured


def test_a_backward_is_one_kernel_or_two_and_what_is_beside(planned):
    _, backward = planned
    dkdv, dq, fast = backward.model.dkdv, backward.model.dq, KernelSchedule(128, 32, 8, 2)
    gluon = next(trial.schedule.dkdv for trial in backward.trials if trial.whole)
    assert dkdv.backend == "triton"  # at eight times 512 tokens the model takes it
    parts = {"dkdv": [(dkdv, 50.0)], "dq": [(dq, 40.0), (fast, 30.0)]}
    found = of_direction(row(backward, whole=[(gluon, 90.0)], **parts), DEVICE)
    assert (found.us, found.best_us) == (95.0, 85.0)
    assert found.best == f"{dkdv} | {fast}"
    assert of_direction(row(backward, whole=[(gluon, 80.0)], **parts), DEVICE).best == str(gluon)


def test_a_tuner_that_stops_early_knows_what_raced_by_then(planned):
    forward, _ = planned
    race = [ks for _, ks in order(problem_of(forward.cell), DEVICE, ("forward",))]
    times = [(ks, 100.0 - i) for i, ks in enumerate(race)]
    found = of_direction(row(forward, whole=times), DEVICE)
    early = -(-len(race) // 10)
    assert 1 < early < len(race) / 5
    assert (found.us, found.tenth_us, found.best_us) == (100.0, 101.0 - early, 101.0 - len(race))


def test_times_survive_json(planned):
    ks = KernelSchedule(16, 64, 4, 4, splits=7)
    measured = Measured.of(row(planned[0], whole=[(ks, 12.5)]))
    assert measured.best() == (str(ks), 12.5)


def test_where_the_model_loses_the_best_becomes_a_shipped_row(planned, tmp_path):
    forward, backward = planned
    fast = next(t.schedule.forward for t in forward.trials if t.schedule.forward != forward.model.forward)
    short = KernelSchedule(128, 32, 8, 2)
    pair = {"dkdv": [(backward.model.dkdv, 50.0)], "dq": [(short, 30.0), (backward.model.dq, 40.0)]}
    rows = [row(forward, whole=[(forward.model.forward, 110.0), (fast, 100.0)]), row(backward, **pair)]
    path = tmp_path / "table.json"
    path.write_text(table_text(corrections({"gpu": "NVIDIA H100 80GB HBM3", "rows": rows})))
    (found,) = read_table(path)
    assert found["match"]["kv_bucket"] == 512
    assert found["schedule"]["forward"] == fast.to_json()
    assert found["schedule"]["dq"] == short.to_json()
    assert corrections({"gpu": "NVIDIA H100 80GB HBM3", "rows": rows}, least=0.2) == []
    assert corrections({"gpu": "NVIDIA H100 80GB HBM3", "rows": rows[:1]}) == []


def test_a_first_choice_of_which_nothing_raced_is_left_out_by_name(planned, tmp_path):
    """As in a file of before Gluon had the kernel that is chosen now."""
    forward, backward = planned
    older = next(t.schedule.forward for t in forward.trials if t.schedule.forward.backend == "triton")
    assert forward.model.forward.backend == "gluon"
    pair = {"dkdv": [(backward.model.dkdv, 50.0)], "dq": [(backward.model.dq, 40.0)]}
    rows = [row(forward, whole=[(older, 100.0)]), row(backward, **pair)]
    path = tmp_path / "regret.json"
    path.write_text(json.dumps({"suite": "regret", "gpu": "NVIDIA H100 80GB HBM3", "rows": rows}))
    found, unknown = regrets(path)
    assert [entry.what for entry in found] == ["backward"]
    assert unknown == [f"causal forward: neither {forward.model.forward} nor any other of its order was measured"]


def test_the_page_says_how_much_is_lost_and_where_figures_come_from(tmp_path):
    found = [Regret(f"cell {i}", "backward", "a | b", i > 0, 100.0 + i, "b", 100.0, 100.0) for i in range(20)]
    assert summary(found).startswith("20 first choices: median regret 9.5%, 95th percentile 19.0%, worst 19.0%")
    assert "with the shipped schedules: median regret 0.0%" in summary(found)
    path = tmp_path / "regret.json"
    head = '"gpu": "G", "torch": "2", "triton": "3", "date": "2026-11-22T10", "commit": null, "command": "c"'
    path.write_text(f'{{{head}, "rows": []}}')
    text = markdown(path, found, ["cell 20 forward: nothing like it raced"])
    assert "left out: cell 20 forward: nothing like it raced" in text
    assert "| cell 0 | backward | a + b | ~100.0 | b | 100.0 | 0.0% |" in text
    assert "G, torch 2, triton 3, 2026-11-22, commit unknown: `c`" in text


def test_a_variant_is_judged_by_the_constants_that_serve_the_others():
    variants = ["causal", "causal", "cog", "relu"]
    for_causal, for_cog, for_neither = [0.0, 0.0, 0.5, 0.1], [0.3, 0.4, 0.0, 0.0], [0.2, 0.2, 0.3, 0.2]
    # without causal's own cells the second is the best, without cog's the first
    assert held_out(variants, [for_causal, for_cog, for_neither]) == [0.3, 0.4, 0.5, 0.1]


def test_constants_are_drawn_near_the_shipped_ones_and_put_back():
    before = cost.FIT, hopper.FIT
    one, two = (drawn(random.Random(seed)) for seed in (1, 2))
    assert one != two
    assert one.triton.exchange / model().triton.exchange == pytest.approx(1, abs=1)
    assert max(one.decode.matmul_share.values()) <= 1
    with reading(one):
        assert (one.triton, one.gluon_forward) == (cost.FIT, hopper.FIT)
    assert before == (cost.FIT, hopper.FIT)


def test_what_was_found_without_a_variants_own_cells_is_kept_in_the_file_and_told(tmp_path):
    results = Results("regret", tmp_path / "regret.json", meta={"gpu": "NVIDIA H200"})
    results.add(case="causal", error="nothing")
    keep(results.path, "held_out", {"draws": 3, "regret": "median 1%", "mean": "2%", "any": "3%"})
    data = load(results.path)
    assert data["held_out"]["draws"] == 3
    assert data["rows"] == results.rows
    head = {"torch": "2", "triton": "3", "date": "2026-11-22T10", "commit": None, "command": "c"}
    for key, value in head.items():
        keep(results.path, key, value)
    found = [Regret("cell", "forward", "a", True, 1.0, "a", 1.0)]
    assert "3 random draws" in markdown(results.path, found)


@pytest.mark.parametrize(
    ("reaches", "said"),
    [
        ([None, None], "All candidates raced. Microseconds"),
        (
            [None, 2.0, 1.75],
            "raced in 1 of 3 cells; in the others all of Gluon's, and all that the model predicts",
        ),
    ],
)
def test_the_page_says_how_far_the_search_went(tmp_path, reaches, said):
    path = tmp_path / "regret.json"
    head = '"gpu": "G", "torch": "2", "triton": "3", "date": "2026-11-22T10", "commit": null, "command": "c"'
    path.write_text(f'{{{head}, "rows": {json.dumps([{"reach": reach} for reach in reaches])}}}')
    assert said in markdown(path, [Regret("cell", "forward", "a", True, 1.0, "a", 1.0)])
