"""Random specs: what the passes derive against autograd through the reference, and the kernels against both.

A few hundred in every run of the tests, always the same; `make fuzz` draws thousands, new ones each time. What failed
once stands in FIXED for good.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, seed, settings

import attncc as ac
from attncc.errors import UnsupportedError
from attncc.runtime.op import AttentionOp
from attncc.runtime.verify import Exam, Shape, verify_variant
from attncc.schedule import KernelSchedule, Schedule
from tests.passes.test_differentiate import test_the_backward_is_that_of_autograd as backward_is_autograds
from tests.strategies.specs import OVER_QUERIES, SEVERAL_PASSES, Spec, specs

#: small tiles, so that small sizes have several
_TILE = KernelSchedule(16, 16, 1, 1)
_SCHEDULE = Schedule(_TILE, _TILE, _TILE)

#: specs that failed once, smallest form
FIXED = [
    # a broadcast dimension at another index than the loop's: its element is everywhere but beyond the keys
    Spec(
        """
[stages]
score = "score + by_key[b, kv_idx - 1]"
[inputs]
by_key = { index = ["b", "kv_idx"], grad = true }
""",
        Shape(2, 2, 1, 9, 7, 8, 8, broadcast=("kv_idx",)),
        seed=0,
    ),
    Spec(
        """
[stages]
score = "score + by_doc[b, doc[b, q_idx] + doc[b, kv_idx]]"
[inputs]
by_doc = { index = ["b", "docs"], grad = true }
doc = { index = ["b", "kv_idx"], dtype = "int" }
""",
        Shape(2, 2, 1, 9, 7, 8, 8, broadcast=("b", "kv_idx")),
        seed=1,
    ),
    # a gradient of each pair, collected by an index that is none of the loop's
    Spec(
        """
[stages]
score = "score + table[(q_idx + 2 * kv_idx) % 7] * (1 + 0.5 * near[h, (kv_idx - q_idx) % 6])"
[inputs]
table = { index = ["bucket"], grad = true }
near = { index = ["h", "distance"], grad = true }
""",
        Shape(1, 3, 1, 11, 18, 4, 4),
        seed=2,
    ),
    # scores so large that an exponent's own rounding shows in gradients
    Spec(
        """
[stages]
score = "score + slope[h] * (kv_idx - q_idx) * 3"
[inputs]
slope = { index = ["h"], grad = true }
""",
        Shape(1, 2, 1, 20, 24, 16, 8),
        seed=3,
    ),
]


def derivation(spec: Spec) -> None:
    """In float64: the derived backward gives autograd's gradients."""
    try:
        torch.manual_seed(spec.seed)
        backward_is_autograds(spec.variant, replace(spec.shape, broadcast=()))
    except UnsupportedError:
        assume(False)


def kernels(spec: Spec) -> None:
    """In float32, through the interpreter: outputs and gradients are as near the reference as plain PyTorch's."""
    try:
        op = ac.compile(spec.variant, schedule=_SCHEDULE)
    except UnsupportedError:
        assume(False)
    rows = verify_variant(spec.variant, shapes=[spec.shape], op=op)
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]


def parts(spec: Spec) -> None:
    """The same of the outputs where the keys are dealt to several programs, and the heads of a group share a tile."""
    shape = replace(spec.shape, heads=spec.shape.kv_heads * (1 + spec.seed % 3), q_len=1 + spec.seed % 7)
    schedule = replace(_SCHEDULE, forward=replace(_TILE, splits=1 + spec.seed % 4))
    op = ac.compile(spec.variant, schedule=schedule)
    if not isinstance(op, AttentionOp) or op.plan.facts.whole_rows:
        assume(False)
    rows = Exam(spec.variant, shape, "cpu", torch.float32, spec.seed, gradients=False).rows(op)
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]


@pytest.mark.parametrize("spec", FIXED, ids=range(len(FIXED)))
def test_what_failed_once(spec):
    derivation(spec)
    kernels(spec)


#: the same of those that have several ops: there is no one derivation
FIXED_PHASES = [
    # the log of a column sum of 0, and its slope
    Spec(
        """
[stages]
score = "-score"
normalizer = "relu(score) / (1 + col.sum(relu(score)))"
""",
        Shape(1, 1, 1, 2, 2, 4, 16),
        seed=2,
    ),
    # a policy that a mask has no use for
    Spec(
        """
dead_rows = "open"
[stages]
mask = "True"
""",
        Shape(2, 1, 1, 3, 5, 4, 8),
        seed=2,
    ),
]


@pytest.mark.parametrize("spec", FIXED_PHASES, ids=range(len(FIXED_PHASES)))
def test_what_failed_once_in_phases(spec):
    kernels(spec)


def drawn(check: Callable[[Spec], None], examples: int, **options: Any) -> Callable[[], None]:
    """A test of its own over `examples` of every hundred that the profile asks for; `options` are those of `specs`."""
    counted = settings(
        max_examples=max(settings().max_examples * examples // 100, 1),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    return counted(given(specs(**options))(check))


@pytest.mark.parametrize("shard", range(4))
def test_derivations(shard):
    run = drawn(derivation, 50)
    (seed(shard)(run) if settings().derandomize else run)()


@pytest.mark.parametrize("shard", range(4))
def test_kernels(shard):
    run = drawn(kernels, 5)
    (seed(shard)(run) if settings().derandomize else run)()


def test_parts_of_the_keys():
    run = drawn(parts, 8)
    (seed(0)(run) if settings().derandomize else run)()


def test_kernels_of_several_passes():
    run = drawn(kernels, 8, longest=20, normalizers=SEVERAL_PASSES)
    (seed(0)(run) if settings().derandomize else run)()


def test_kernels_over_queries_and_rows_without_keys():
    run = drawn(kernels, 6, longest=20, normalizers=OVER_QUERIES, dead_rows=("zero", "open"))
    (seed(0)(run) if settings().derandomize else run)()
