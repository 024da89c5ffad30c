from __future__ import annotations

import pytest

from attncc.errors import ScheduleError
from attncc.schedule import KERNELS, candidates, device_for, device_names, shared_memory
from attncc.schedule.device import INTERPRETER
from attncc.schedule.memory import tensor_memory
from attncc.schedule.registers import register_limit, registers

from .problems import full_live, problem

ALL_KERNELS = (*KERNELS, "pair")


@pytest.mark.parametrize("device", device_names())
@pytest.mark.parametrize(
    ("dtype", "precision", "d_qk", "d_v"),
    [
        ("bf16", "ieee", 64, 64),
        ("bf16", "ieee", 128, 128),
        ("fp16", "ieee", 256, 256),
        ("fp32", "ieee", 128, 128),
        ("fp32", "ieee", 256, 256),
        ("fp32", "tf32", 256, 256),
        ("bf16", "ieee", 192, 128),
        ("bf16", "ieee", 80, 80),
        ("fp16", "ieee", 512, 512),
    ],
)
def test_there_is_always_a_candidate_and_all_fit(device, dtype, precision, d_qk, d_v):
    card, work = device_for(device), problem(dtype, d_qk, d_v, precision=precision)
    for kernel in ALL_KERNELS:
        found = candidates(kernel, work, card)
        assert found
        assert len(set(found)) == len(found)
        for ks in found:
            assert shared_memory(kernel, ks, work, card) <= card.smem_per_block
            assert tensor_memory(kernel, ks, work, card) <= card.tmem_columns


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("device", ["a100", "h100", "b200", "rtx4090", "mi300x"])
def test_the_usual_sizes_leave_room_in_registers(kernel, device):
    card, work = device_for(device), problem()
    found = candidates(kernel, work, card)
    assert len(found) > 10
    assert any(registers(kernel, ks, work, card) <= register_limit(ks, card) for ks in found)


def test_nothing_fits_is_an_error_that_says_which_buffer_and_how_much():
    with pytest.raises(ScheduleError) as caught:
        candidates("dkdv", problem("fp32", 512), device_for("rtx4090"))
    error = caught.value
    assert (error.kernel, error.buffer, error.bytes_over) == ("dkdv", "k", 31744)
    assert "RTX 4090" in str(error)
    assert "31,744 more than the 101,376" in str(error)
    assert "k 32,768" in str(error)
    assert "smaller head dimensions (now 512 and 512)" in str(error)


def test_blocks_are_no_longer_than_the_sequences():
    for ks in candidates("forward", problem(length=1, kv_len=100, live=full_live), device_for("h100")):
        assert ks.block_m == 16
        assert ks.block_n <= 128
    assert candidates("forward", problem(length=3, kv_len=5, live=full_live), device_for("h100"))


@pytest.mark.parametrize(("length", "block"), [(1, 32), (20, 32), (64, 32), (128, 32), (256, 64), (100_000, 64)])
def test_the_interpreter_gets_one_small_tiling(length, block):
    (ks,) = candidates("forward", problem(length=length), INTERPRETER)
    assert (ks.block_m, ks.block_n) == (block, block)
