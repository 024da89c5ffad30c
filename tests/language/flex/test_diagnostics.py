"""What a score_mod or mask_mod cannot be: each is refused at its own line, with a way out."""

from __future__ import annotations

import math
import random

import pytest
import torch

import attncc as ac

TABLE = torch.arange(4.0)


def branch(score, b, h, q_idx, kv_idx):
    if q_idx > kv_idx:  # here
        return score
    return -score


def conditional(score, b, h, q_idx, kv_idx):
    return score if kv_idx < 4 else 0 * score  # here


def builtin_max(score, b, h, q_idx, kv_idx):
    return score + max(q_idx, kv_idx)  # here


def chained(score, b, h, q_idx, kv_idx):
    return score * (0 < q_idx < kv_idx)  # here


def augmented(score, b, h, q_idx, kv_idx):
    score += 1  # here
    return score


def in_place(score, b, h, q_idx, kv_idx):
    return score.mul_(2)  # here


def stored(score, b, h, q_idx, kv_idx):
    TABLE[0] = 1.0  # here
    return score + TABLE[h]


def drawn(score, b, h, q_idx, kv_idx):
    return score + torch.rand(4)[h]  # here


def dropped(score, b, h, q_idx, kv_idx):
    return torch.nn.functional.dropout(score, 0.1)  # here


def unknown(score, b, h, q_idx, kv_idx):
    return torch.special.bessel_j0(score)  # here


def python_math(score, b, h, q_idx, kv_idx):
    return score / math.sqrt(q_idx + 1)  # here


def python_range(score, b, h, q_idx, kv_idx):
    return score + sum(i for i in range(q_idx))  # here


def python_list(score, b, h, q_idx, kv_idx):
    return score * [1.0, 2.0][h]  # here


def data(score, b, h, q_idx, kv_idx):
    return score * TABLE.max().item()  # here


def data_branch(score, b, h, q_idx, kv_idx):
    return score * (2 if TABLE[0] > 0 else 3)  # here


def own_score(score, b, h, q_idx, kv_idx):
    return torch.where(score > 1, score, -torch.inf)  # here


def infinite(score, b, h, q_idx, kv_idx):
    return torch.exp(torch.where(q_idx > kv_idx, score, -torch.inf))  # here


def negated(score, b, h, q_idx, kv_idx):
    return -torch.where(q_idx > kv_idx, score, -torch.inf)  # here


def too_many(score, b, h, q_idx, kv_idx):
    return score + TABLE[h, q_idx]  # here


def fraction(score, b, h, q_idx, kv_idx):
    return score + TABLE[q_idx / 2]  # here


def condition(score, b, h, q_idx, kv_idx):
    return score + TABLE[q_idx > 2]  # here


def whole(score, b, h, q_idx, kv_idx):
    return score + TABLE  # here


def long(score, b, h, q_idx, kv_idx):
    return score + (torch.zeros(9, 5000)[h] * TABLE[0]).sum()  # here


def nothing(score, b, h, q_idx, kv_idx):
    pass  # here


def boolean(score, b, h, q_idx, kv_idx):
    return q_idx > kv_idx  # here


def missing(score, b, h, q_idx, kv_idx):
    return score + undefined  # here  # noqa: F821


def raises(score, b, h, q_idx, kv_idx):
    raise ValueError("not today")  # here


def shapes(score, b, h, q_idx, kv_idx):
    return score.reshape(3)  # here


def detached(score, b, h, q_idx, kv_idx):
    return score * score.detach()  # here


def inner(score, b, h, q_idx, kv_idx):
    def helper(x):
        return x.sort()  # here

    return helper(score)


def shifted(score, b, h, q_idx, kv_idx):
    return score + ((TABLE.int()[h] >> kv_idx) & 1)  # here


REASONS = {
    shifted: "a shift by anything but a constant(.|\n)*a captured tensor of booleans",
    branch: "a branch in Python depends on an index or the score",
    conditional: "a branch in Python",
    builtin_max: "a branch in Python",
    chained: "a branch in Python",
    augmented: "add_ works in place",
    in_place: "mul_ works in place",
    stored: "__setitem__ works in place",
    drawn: "rand is random",
    dropped: "dropout is random",
    unknown: "special_bessel_j0 of an index or the score is not part of the language",
    python_math: "float of an index or the score",
    python_range: "index of an index or the score",
    python_list: "index of an index or the score",
    data: "item of a captured tensor would be fixed",
    data_branch: "bool of a captured tensor would be fixed",
    own_score: "a pair is hidden by its own score, where score <= 1",
    infinite: "minus infinity enters arithmetic",
    negated: "minus infinity enters arithmetic",
    too_many: "2 indices for a tensor of 1 dimension",
    fraction: "indexed by a number with a fraction",
    condition: "indexed by a condition",
    whole: r"the result is a tensor of shape \(4,\), not one element a pair",
    long: "5,000 elements of a captured tensor",
    nothing: "the result is NoneType, not a tensor",
    boolean: "the result is a boolean",
    missing: "the function raised NameError: name 'undefined' is not defined",
    raises: "the function raised ValueError: not today",
    shapes: "reshape: shape '\\[3\\]' is invalid for input of size 1",
    detached: "detach of an index or the score is not part of the language",
    inner: "sort of an index or the score is not part of the language",
}


@pytest.mark.parametrize("function", REASONS, ids=lambda f: f.__name__)
def test_refused_at_its_line(function):
    with pytest.raises(ac.SpecError, match=REASONS[function]) as caught:
        ac.from_flex(function)
    error = caught.value
    assert error.stage == "score_mod"
    assert error.span is not None
    assert error.span.file == __file__
    assert "# here" in error.span.text
    assert error.remedy is not None or function in (whole, missing, raises, shapes, too_many)


def test_what_is_no_function():
    with pytest.raises(ac.SpecError, match="the score_mod is int, not a function"):
        ac.from_flex(3)
    with pytest.raises(ac.SpecError, match="takes 1 positional argument but 5 were given"):
        ac.from_flex(lambda score: score)
    with pytest.raises(ac.SpecError, match="mask_mod: the result is a number, not a boolean: 'kv_idx'"):
        ac.from_flex(mask_mod=lambda b, h, q_idx, kv_idx: kv_idx)


def test_a_random_number_of_python_is_a_constant():
    """Nothing can see it; it is the same at each call, as in a compiled FlexAttention."""
    random.seed(0)
    variant = ac.from_flex(lambda score, b, h, q, k: score * random.random())
    assert float(variant.graph["score"].expr.as_coeff_Mul()[0]) == pytest.approx(0.8444218515250481)


def test_a_value_that_outlives_its_trace_is_refused_where_it_is_used():
    kept = []

    def leak(score, b, h, q_idx, kv_idx):
        kept.append(score)
        return score

    ac.from_flex(leak)
    with pytest.raises(ac.SpecError, match="runs after the trace"):
        kept[0] + 1
    assert repr(kept[0]) == "raw_score"


@pytest.mark.parametrize(
    ("mods", "message"),
    [
        ((lambda b, h, q, k: q >= k,), "the score_mod does not take the 5(.|\n)*as a mask_mod it would do: mask_mod=f"),
        ((None, lambda s, b, h, q, k: s), "the mask_mod does not take the 4(.|\n)*as a score_mod it would do"),
    ],
)
def test_a_function_of_other_arguments_is_refused_before_it_is_called(mods, message):
    with pytest.raises(ac.SpecError, match=message):
        ac.from_flex(*mods)


def test_arguments_with_defaults_and_any_number_of_them_will_do():
    ac.from_flex(lambda *given: given[0], lambda b, h, q, k, width=4: q - k < width)
