"""Machine code that one assembler made wrong is made again by the other."""

from dataclasses import replace

import pytest

import attncc as ac
from attncc.codegen.crosscompile_linear import cross_compile_linear
from attncc.codegen.module import load_source
from attncc.codegen.wgmma import Fault, wgmma_faults
from attncc.runtime import assembler
from attncc.runtime.assembler import sound
from attncc.runtime.recurrence import RecurrenceOp
from attncc.schedule.delta import delta_schedule
from attncc.schedule.device import device_for
from attncc.schedule.linear import LinearSizes


@pytest.fixture(scope="module")
def wrong():
    """A kernel of which ptxas 12.8 makes wrong code: the delta rule's equations backwards, 32 columns at once."""
    graph, device = ac.compile("delta_net").graph, device_for("sm_90")
    schedule = delta_schedule(LinearSizes("bf16", 2, 16, 8192, 64, 64), device)
    kernels = {"prepare_back": {**schedule.kernels["prepare_back"], "BLOCK": 32}}
    module = load_source(RecurrenceOp(graph).source(64, 64), "delta_net")
    schedule = replace(schedule, kernels=kernels)
    found = cross_compile_linear(module, schedule, device, "bf16", states="bf16", only=("prepare_back_kernel",))
    if not found["prepare_back_kernel"].faults:
        pytest.skip("an assembler without the fault")
    return found["prepare_back_kernel"]


def test_the_other_assembler_makes_it_again(wrong):
    image = sound("prepare_back_kernel", wrong.ptx, wrong.binary)
    assert image != wrong.binary
    assert wgmma_faults(image) == ()


def test_the_same_assembler_is_asked_to_optimize_nothing(wrong, monkeypatch):
    real = assembler.assembled
    monkeypatch.setattr(assembler, "assembled", lambda *args: real(*args) if args[2] else wrong.binary)
    with pytest.warns(RuntimeWarning, match=r"prepare_back_kernel is not optimized, and slow.*TRITON_PTXAS_PATH"):
        image = sound("prepare_back_kernel", wrong.ptx, wrong.binary)
    assert wgmma_faults(image) == ()


def test_it_is_said_where_all_are_wrong(wrong, monkeypatch):
    monkeypatch.setattr(assembler, "wgmma_faults", lambda image: (Fault("0x0040: HGMMA", "something"),))
    with pytest.warns(RuntimeWarning, match=r"prepare_back_kernel may be wrong.*0x0040.*TRITON_PTXAS_PATH"):
        assert sound("prepare_back_kernel", wrong.ptx, wrong.binary) == wrong.binary


def test_code_without_wgmma_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(assembler, "wgmma_faults", lambda image: pytest.fail("looked at"))
    assert sound("kernel", "mma.sync", b"code") == b"code"
