"""The race without a GPU: a measuring stick that knows which candidate is best, wrong, or broken."""

import pytest

import attncc as ac
from attncc.codegen.plan import Plan
from attncc.codegen.problem import problem_of
from attncc.runtime.explain import sizes_of
from attncc.runtime.samples import Shape
from attncc.runtime.tune import Trial, TrialError, race, sliced
from attncc.schedule.cache import Cache
from attncc.schedule.choose import choose, first_choice, schedule_key
from attncc.schedule.cost import ranked
from attncc.schedule.device import device_for
from attncc.schedule.problem import KERNELS

DEVICE = device_for("h100")


@pytest.fixture
def problem():
    """One for which no tuned schedule is shipped."""
    return problem_of(Plan(ac.variants.get("causal").graph), sizes_of(1024, d_qk=80), "bf16", "ieee", {})


def times(problem, wins=3, wrong=()):
    """A measuring stick by which the candidate ranked `wins` is fastest; those ranked in `wrong` may not win."""
    order = {kernel: [ks for ks, _ in ranked(kernel, problem, DEVICE)] for kernel in KERNELS}
    calls = []

    def measure(kernel, schedule):
        ks = schedule.of(kernel)
        rank = order[kernel].index(ks)
        calls.append((kernel, ks))
        if rank in wrong:
            raise TrialError("wrong: out")
        return 100.0 + abs(rank - wins)

    return measure, calls, order


def test_the_fastest_right_candidate_wins_and_is_chosen_from_then_on(problem):
    measure, _, order = times(problem, wins=3, wrong=(3,))
    cache = Cache()
    result = race(problem, DEVICE, KERNELS, measure, cache, limit=8)
    for kernel in KERNELS:
        assert result.schedule.of(kernel) == order[kernel][2]  # beside the wrong one, and ahead of the other neighbour
    assert choose(problem, DEVICE, cache) == result.schedule
    assert choose(problem, DEVICE, cache).origin == "tuned"


def test_the_models_first_choice_races_first_even_alone(problem):
    measure, calls, _ = times(problem)
    race(problem, DEVICE, KERNELS, measure, Cache(), limit=1)
    assert calls == [(kernel, first_choice(kernel, problem, DEVICE)) for kernel in KERNELS]


def test_every_result_is_on_disk_when_it_is_measured_and_a_race_goes_on(problem):
    measure, calls, _ = times(problem, wins=2)
    cache = Cache()

    def interrupted(kernel, schedule):
        if len(calls) == 5:
            raise KeyboardInterrupt
        return measure(kernel, schedule)

    with pytest.raises(KeyboardInterrupt):
        race(problem, DEVICE, KERNELS, interrupted, cache, limit=4)
    kept = Cache().get(schedule_key(problem, DEVICE))
    assert len(kept["trials"]) == 5
    first = list(calls)
    calls.clear()
    result = race(problem, DEVICE, KERNELS, measure, Cache(), limit=4)
    assert result.resumed == 5
    assert len(calls) == 12 - 5
    assert not set(calls) & set(first)
    assert choose(problem, DEVICE, Cache()) == result.schedule


def test_progress_is_told_of_every_trial(problem):
    measure, _, _ = times(problem, wrong=(1,))
    seen = []
    result = race(problem, DEVICE, ("forward",), measure, Cache(), limit=3, progress=lambda *args: seen.append(args))
    assert [(done, total) for done, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[1][2].failure == "wrong: out"
    assert [t for _, _, t in seen] == list(result.trials)
    assert result.first("forward").us == 103.0
    assert result.best("forward").us == 101.0


def test_a_kernel_without_a_right_candidate_is_an_error_that_says_why(problem):
    measure, _, _ = times(problem, wrong=range(1000))
    with pytest.raises(ac.ScheduleError, match="no candidate of the forward kernel won: wrong: out"):
        race(problem, DEVICE, ("forward",), measure, Cache(), limit=2)


def test_nothing_is_cached_when_nothing_won(problem):
    measure, _, _ = times(problem, wrong=range(1000))
    cache = Cache()
    with pytest.raises(ac.ScheduleError):
        race(problem, DEVICE, ("forward",), measure, cache, limit=2)
    assert choose(problem, DEVICE, cache) == choose(problem, DEVICE)


def test_trials_of_another_version_are_measured_again(problem):
    measure, calls, _ = times(problem)
    cache = Cache()
    race(problem, DEVICE, ("forward",), measure, cache, limit=2)
    key = schedule_key(problem, DEVICE)
    cache.put(key, {**cache.get(key), "trials": [{"kernel": "forward"}]})
    calls.clear()
    assert race(problem, DEVICE, ("forward",), measure, cache, limit=2).resumed == 0
    assert len(calls) == 2


def test_a_trial_survives_json():
    trial = Trial("dq", ac.KernelSchedule(64, 64, 4, 2), None, "wrong: dq")
    assert Trial.from_json(trial.to_json()) == trial


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (Shape(4, 16, 4, 8192, 8192, 128, 64), Shape(1, 4, 1, 512, 512, 128, 64)),
        (Shape(1, 8, 8, 1, 65536, 128, 128), Shape(1, 1, 1, 1, 512, 128, 128)),
        (Shape(2, 2, 2, 100, 300, 64, 64), Shape(1, 1, 1, 100, 300, 64, 64)),
    ],
)
def test_a_slice_keeps_what_a_schedule_depends_on(shape, expected):
    assert sliced(shape) == expected


@pytest.mark.gpu
def test_a_variant_is_tuned_on_this_gpu():
    import torch

    from attncc.runtime.tune import Track, gpu
    from attncc.schedule.device import device_of

    variant = ac.variants.get("alibi")
    op = ac.compile(variant)
    device = device_of(gpu())
    problem = problem_of(op.plan, sizes_of(1024, heads=4, d_qk=64), "fp16", op.engine.precision(), {})
    track = Track(variant.graph, Shape(1, 4, 4, 1024, 1024, 64, 64), "fp16", gpu(), {})
    result = race(problem, device, KERNELS, track, Cache(), limit=2)
    assert all(result.best(kernel).us > 0 for kernel in KERNELS)
    assert choose(problem, device, Cache()) == result.schedule
    q = torch.randn(1, 4, 1024, 64, device="cuda", dtype=torch.float16)
    assert ac.compile(variant)(q, q, q).isfinite().all()
