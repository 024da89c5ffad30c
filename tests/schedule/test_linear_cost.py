"""What the model says of calls in linear time, beside what was measured."""

import pytest

from attncc.schedule.device import device_for
from attncc.schedule.linear import LinearSizes
from attncc.schedule.linear_cost import choose_plan, chunk_cost, crossover, quadratic_us

#: microseconds of a forward on an H200, heads of 128, 16 of them, bf16: bench/notes-linear.md
MEASURED = [
    (1, 8192, 0, False, 92.5),
    (1, 65536, 0, False, 512.0),
    (2, 8192, 0, False, 154.5),
    (2, 8192, 1, False, 176.4),
    (2, 8192, 1, True, 580.0),
]


@pytest.mark.parametrize(("sequences", "length", "rows", "by_channel", "us"), MEASURED)
def test_a_forward_takes_what_was_measured(sequences, length, rows, by_channel, us):
    cost = chunk_cost(LinearSizes("bf16", sequences, 16, length, 128, 128, by_channel, rows=rows), device_for("h200"))
    assert cost.us == pytest.approx(us, rel=0.15)
    assert cost.limit == ("prepare" if by_channel else "chain")
    assert cost.least < cost.memory < cost.us


def test_heads_that_fill_the_machine_hand_nothing_on():
    device = device_for("h100")
    few, many = (chunk_cost(LinearSizes("bf16", b, 16, 8192, 128, 128), device) for b in (2, 8))
    assert few.memory > few.least
    assert many.memory == many.least
    assert many.us < 4 * few.us


def test_pairs_by_channel_are_dear_so_that_chunks_are_worth_it_sooner():
    device = device_for("h100")
    plain, gated = (LinearSizes("bf16", 2, 16, 1024, 128, 128, by_channel) for by_channel in (False, True))
    assert quadratic_us(gated, device) > 5 * quadratic_us(plain, device)
    assert crossover(gated, device) < crossover(plain, device)
    assert (choose_plan(plain, device), choose_plan(gated, device)) == ("parallel", "chunk")
