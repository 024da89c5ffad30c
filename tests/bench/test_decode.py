"""The decode suite's check and figures, on small shapes through the interpreter."""

import pytest
import torch

import attncc as ac
from bench.case import Shape
from bench.check import CheckFailedError
from bench.suites.decode import ALIBI, CELLS, FULL, SIGMOID, checked, figures, shape
from bench.timing import Timing

SMALL = Shape(b=2, h=4, m=1, d=16, hkv=2, n=70, dtype=torch.float16)


@pytest.mark.parametrize("case", [ALIBI, SIGMOID], ids=lambda case: case.name)
def test_a_right_result_passes(case):
    assert checked(ac.compile(case.variant), case, SMALL, "cpu") < 2e-3


def test_a_wrong_part_fails():
    op = ac.compile(FULL.variant)

    def forgets_a_key(q, k, v):
        return op(q, k[:, :, 1:], v[:, :, 1:])

    with pytest.raises(CheckFailedError, match="against the float64 reference"):
        checked(forgets_a_key, FULL, SMALL, "cpu")


def test_other_bits_fail():
    op, calls = ac.compile(FULL.variant), []

    def drifts(q, k, v):
        calls.append(1)
        return op(q, k, v) * (1 + len(calls) / 64)

    with pytest.raises(CheckFailedError, match="other bits"):
        checked(drifts, FULL, SMALL, "cpu")


def test_the_rate_is_that_of_keys_and_values():
    assert figures(shape(1, 65536), Timing(0.1, 0.0))["tbps"] == pytest.approx(2.684, abs=1e-3)


def test_the_issues_cells_are_there():
    sizes = [(s.b, s.n) for case, s in CELLS if case is FULL and s.m == 1]
    assert sizes == [(1, 65536), (8, 8192), (64, 8192), (8, 65536)]
    assert {case.name for case, _ in CELLS} >= {"softcap", "alibi"}
