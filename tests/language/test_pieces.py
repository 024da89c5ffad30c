"""The masks and score modifiers that ship: what they show, pair by pair, and how they compose."""

from __future__ import annotations

import pytest
import torch

import attncc as ac
from attncc.errors import SpecError
from attncc.runtime.evaluate import evaluate

M, N = 6, 9


def shown(mask, **inputs):
    """The mask over all pairs, M x N, as nested lists of booleans."""
    graph = ac.Variant(mask=mask).graph
    env = {"q_idx": torch.arange(M)[:, None], "kv_idx": torch.arange(N), "q_len": M, "kv_len": N, "b": 0}
    return evaluate(graph["mask"].expr, env | inputs).expand(M, N).tolist()


def table(rule):
    """`rule(i, j)` over all pairs; i is the query's position among the keys."""
    return [[bool(rule(i + N - M, j)) for j in range(N)] for i in range(M)]


@pytest.mark.parametrize(
    ("mask", "rule"),
    [
        (ac.full, lambda i, j: True),
        (ac.causal, lambda i, j: j <= i),
        (ac.causal(align="start"), lambda i, j: j <= i - (N - M)),
        (ac.sliding_window(3), lambda i, j: i - j < 3),
        (ac.causal & ac.sliding_window(3), lambda i, j: 0 <= i - j < 3),
        (ac.window(3), lambda i, j: 0 <= i - j <= 3),
        (ac.window(3, 2), lambda i, j: -2 <= i - j <= 3),
        (ac.prefix(4), lambda i, j: j < 4),
        (ac.dilated(3), lambda i, j: (i - j) % 3 == 0),
        (ac.block_diagonal(4), lambda i, j: i // 4 == j // 4),
        (~ac.causal, lambda i, j: j > i),
        (ac.causal & ac.sliding_window(3) | ac.prefix(2), lambda i, j: 0 <= i - j < 3 or j < 2),
        (ac.causal & ~(ac.dilated(2) | ac.prefix(1)), lambda i, j: j <= i and (i - j) % 2 and j >= 1),
        (ac.causal & (lambda kv_idx: kv_idx != 2), lambda i, j: j <= i and j != 2),
        ((lambda kv_idx: kv_idx < 2) | ac.window(1), lambda i, j: j < 2 or 0 <= i - j <= 1),
        (lambda q_idx, kv_idx: q_idx == kv_idx, lambda i, j: i - (N - M) == j),
        (False, lambda i, j: False),
    ],
)
def test_masks(mask, rule):
    assert shown(mask) == table(rule)


def test_masks_that_read_inputs():
    doc = [0, 0, 1, 1, 1, 5, 5, 2, 2]
    assert shown(ac.document(), doc=torch.tensor([doc])) == table(lambda i, j: doc[i] == doc[j])
    assert shown(ac.padding(), lengths=torch.tensor([4])) == table(lambda i, j: j < 4)
    assert shown(ac.prefix("n"), n=torch.tensor([2])) == table(lambda i, j: j < 2)


def test_masks_of_named_scalars():
    assert shown(ac.causal & ac.sliding_window("w"), w=3) == table(lambda i, j: 0 <= i - j < 3)
    assert shown(ac.window("left", "right"), left=3, right=2) == table(lambda i, j: -2 <= i - j <= 3)
    graph = ac.Variant(mask=ac.window("left", "right")).graph
    assert {s.name: s.default for s in graph.scalars} == {"left": 1024, "right": 0}
    own = ac.Variant(mask=ac.sliding_window("w"), inputs={"w": ac.Scalar(7)}).graph
    assert [s.default for s in own.scalars] == [7]


def test_modifiers_apply_from_left_to_right():
    first = ac.Variant(score=ac.alibi() >> ac.softcap(30)).graph["score"].expr
    assert str(first).startswith("30*tanh")
    second = ac.Variant(score=ac.softcap(30) >> ac.alibi()).graph["score"].expr
    assert "slopes" in {s.name for s in second.args[0].free_symbols | second.args[1].free_symbols}
    assert first != second
    doubled = ac.Variant(score=(lambda score: score + 1) >> ac.softcap(2.0) >> (lambda score, h: score * h)).graph
    by_hand = ac.Variant(score=lambda score, h: 2.0 * ac.tanh((score + 1) / 2.0) * h).graph
    assert doubled == by_hand


def test_pieces_bring_their_inputs_and_the_users_declaration_wins():
    graph = ac.Variant(score=ac.alibi() >> ac.bias("z"), mask=ac.document("ids")).graph
    assert {d.name: (d.pattern, d.dtype, d.grad) for d in graph.inputs} == {
        "slopes": (("h",), "float", True),
        "z": (("b", "h", "q_idx", "kv_idx"), "float", True),
        "ids": (("b", "kv_idx"), "int", False),
    }
    fixed = ac.Variant(score=ac.alibi(), inputs={"slopes": ac.Input("h")}).graph
    assert not fixed.input("slopes").grad
    assert fixed.input("slopes").default is None


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (8, [2.0**-i for i in range(1, 9)]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),  # the paper's: four of four heads, then every other of eight
        (1, [2**-8]),
    ],
)
def test_alibi_slopes(heads, slopes):
    assert ac.alibi_slopes(heads) == slopes


@pytest.mark.parametrize("value", [0, 0.0])
def test_softcap_at_zero_is_refused(value):
    with pytest.raises(SpecError, match="division by zero"):
        ac.Variant(score=ac.softcap(value))


def test_functions_on_plain_numbers_are_pythons():
    assert (ac.maximum(2, 3), ac.abs(-2), ac.floor(2.7), ac.to_int(-2.7), ac.sqrt(9), ac.exp2(3)) == (3, 2, 2, -2, 3, 8)
    assert ac.log(8.0) / ac.log(2.0) == ac.log2(8.0) == 3
