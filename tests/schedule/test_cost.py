from __future__ import annotations

from dataclasses import replace

import pytest

from attncc.schedule import KERNELS, KernelSchedule, PairCosts, device_for, predict, ranked
from attncc.schedule.cost import Prediction
from attncc.schedule.device import INTERPRETER

from .problems import causal_live, full_live, problem

H100 = device_for("h100")
KS = KernelSchedule(128, 128, 8, 3)


def shape(ks):
    return ks.block_m, ks.block_n, ks.num_warps


def first(kernel, work, device=H100):
    return ranked(kernel, work, device)[0][0]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("device", ["a100", "rtx3090", "l4", "h100", "b200", "mi300x"])
def test_a_prediction_is_sane(kernel, device):
    card, work = device_for(device), problem()
    for _, found in ranked(kernel, work, card):
        assert set(found.terms) == {"tensor", "sfu", "alu", "memory", "launch"}
        assert found.limit == max(found.terms, key=found.terms.__getitem__)
        assert found.us >= max(found.terms.values())
        assert all(term > 0 for term in found.terms.values())


def test_no_prediction_beats_the_matmul_units():
    """Two matmuls of 2*S*S*D a head, half of them masked, at the card's peak rate."""
    flops = 8 * 16 * 2 * (2 * 4096 * 4096 * 128) / 2
    at_peak = flops / (989 * 1e6)
    assert predict("forward", KS, problem(), H100).us > at_peak
    assert predict("forward", KS, problem(), H100).us < 4 * at_peak


def test_hopper_first_choices_are_those_that_measure_well():
    assert shape(first("forward", problem(d_qk=128))) in {(128, 128, 8), (64, 64, 4)}
    assert shape(first("forward", problem(d_qk=64))) in {(128, 128, 4), (128, 128, 8), (128, 64, 8), (128, 64, 4)}
    assert shape(first("forward", problem(d_qk=128, live=full_live))) == (128, 128, 8)
    assert shape(first("dkdv", problem(d_qk=128))) in {(32, 64, 4), (64, 64, 4)}
    assert shape(first("dkdv", problem(d_qk=64))) == (64, 64, 4)
    assert shape(first("dq", problem(d_qk=128))) in {(128, 64, 8), (128, 128, 8), (64, 64, 4)}
    for dim in (64, 128, 256):
        assert first("forward", problem(d_qk=dim)).num_stages >= 2


@pytest.mark.parametrize("device", ["rtx3090", "l4", "rtx4090", "rtx5090"])
def test_consumer_cards_get_tiles_that_leave_them_room(device):
    ks = first("forward", problem(d_qk=128), device_for(device))
    assert ks.block_m in (64, 128)
    assert ks.block_n in (32, 64)


def test_twice_the_tiles_take_twice_the_time():
    causal, full = problem(live=causal_live), problem(live=full_live)
    ratio = predict("forward", KS, full, H100).us / predict("forward", KS, causal, H100).us
    assert 1.7 < ratio < 2.0


def test_only_mixed_tiles_pay_for_the_mask():
    expensive = PairCosts(fma=200, int=200)
    full = problem(live=full_live)
    assert predict("forward", KS, full, H100) == predict("forward", KS, problem(live=full_live, mask=expensive), H100)
    assert predict("forward", KS, problem(mask=expensive), H100).us > predict("forward", KS, problem(), H100).us


def test_the_limit_is_what_the_variant_uses_most():
    def limit(pair, work=None):
        return predict("forward", KS, problem(forward=pair, live=full_live), H100).limit

    assert limit(PairCosts(fma=6, sfu=1)) == "tensor"
    assert limit(PairCosts(fma=6, sfu=8)) == "sfu"
    assert limit(PairCosts(fma=100, sfu=1)) == "alu"
    assert limit(PairCosts(fma=6, sfu=1, loads=8)) == "memory"
    tiny = problem(batch=1, heads=1, length=128)
    assert predict("forward", KS, tiny, H100).limit == "launch"


def test_more_bandwidth_or_more_sms_are_never_slower():
    work = problem()
    slow, fast = (
        device_for("h100"),
        replace(H100, sms=264, tensor_tflops={k: 2 * v for k, v in H100.tensor_tflops.items()}),
    )
    assert predict("forward", KS, work, fast).us < predict("forward", KS, work, slow).us
    assert predict("forward", KS, work, device_for("h200")).us <= predict("forward", KS, work, slow).us


def test_what_may_spill_comes_last():
    from attncc.schedule.registers import spilled_registers

    work, a100 = problem(d_qk=256), device_for("a100")
    spills = [spilled_registers("dq", ks, work, a100) > 0 for ks, _ in ranked("dq", work, a100)]
    assert any(spills)
    assert spills == sorted(spills)


def test_on_warp_groups_a_spill_must_gain_much():
    from attncc.schedule.model import model
    from attncc.schedule.registers import spilled_registers

    for dim in (64, 128):
        (best, found), *others = ranked("dkdv", problem(d_qk=dim), H100)
        assert not spilled_registers("dkdv", best, problem(d_qk=dim), H100)
        for ks, prediction in others:
            if spilled_registers("dkdv", ks, problem(d_qk=dim), H100):
                assert found.us <= model().triton.spill_risk * prediction.us


def test_a_heavy_variant_gets_a_smaller_tile_sooner():
    heavy = PairCosts(fma=24, sfu=4)
    plain = first("forward", problem(live=full_live))
    chosen = first("forward", problem(forward=heavy, live=full_live))
    assert chosen.block_m * chosen.block_n < plain.block_m * plain.block_n


def test_a_mask_that_hides_everything_costs_a_launch():
    nothing = problem(live=lambda q, k: lambda m, n: type(full_live(1, 1)(1, 1))(0, 0, 1))
    found = predict("forward", KS, nothing, H100)
    assert isinstance(found, Prediction)
    assert 0 < found.us < predict("forward", KS, problem(), H100).us


def test_the_interpreter_can_be_ranked():
    ((ks, found),) = ranked("forward", problem(length=64, batch=1, heads=1), INTERPRETER)
    assert ks.num_stages == 1
    assert found.us > 0


def test_in_gluon_exponentials_and_other_arithmetic_of_a_tile_are_one_after_the_other():
    tiling = KernelSchedule(128, 128, 8, 2, "gluon")
    light, heavy = (predict("forward", tiling, problem(forward=PairCosts(fma=n, sfu=1.0)), H100) for n in (4.0, 12.0))
    assert light.limit == "tensor"
    assert heavy.limit == "alu"
    assert heavy.terms["alu"] < heavy.terms["tensor"]  # each alone would be hidden
