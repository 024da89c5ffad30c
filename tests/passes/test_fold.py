"""The unit of the score: what a kernel computes is the score again, and exp2 stands for exp everywhere."""

from __future__ import annotations

import math

import pytest
import sympy
import torch

import attncc as ac
from attncc.ir import symbols as sym
from attncc.ir.vocabulary import absolute, maximum, sign, where
from attncc.passes.fold import LN2, S, exp2, fold, lower_exp, nested, per_ln2, scaled_after, signed, with_sign
from attncc.passes.similarity import similarity
from attncc.passes.stream import renamed, stream
from attncc.runtime.evaluate import evaluate
from attncc.runtime.samples import Shape, sample_inputs

from .dense import NAMES, Pairs, variant

SHAPE = Shape(2, 4, 2, 5, 7, 4, 3)


def plain(expr):
    """A kernel's expression in the vocabulary of the reference."""
    expr = expr.replace(exp2, lambda x: sympy.exp(LN2 * x)).replace(with_sign, lambda f, x: f * sign(x))
    return expr.xreplace({LN2: sympy.Float(math.log(2.0), 17)})


def folded(name):
    graph = variant(name).graph
    pairs = Pairs(graph, sample_inputs(graph, SHAPE, torch.float64, seed=3))
    core = similarity(graph).core
    online = stream(core)
    return online, fold(core, online), pairs


@pytest.mark.parametrize("name", NAMES)
def test_the_folded_score_is_the_score(name):
    _, found, pairs = folded(name)
    unit = LN2 * found.unit if found.log2 else found.unit
    torch.testing.assert_close(pairs(plain(unit * found.score)), pairs(sym.SCORE), rtol=1e-12, atol=1e-13)
    assert (pairs(plain(unit)) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_terms_keep_their_value_in_the_new_unit(name):
    online, found, pairs = folded(name)
    # any finite maxima will do: the algebra must not depend on which
    some = pairs(sym.SCORE).abs().amax(-1, keepdim=True) + 0.5
    ln2 = math.log(2.0) if found.log2 else 1.0
    s = {S.name: pairs(plain(found.score))}
    known: dict[str, torch.Tensor] = {}  # the statistics of earlier sweeps, which are plain numbers
    for step in (*online.before, online):
        maxima = {m.name: some for m in step.max_symbols}
        for running in (*step.sums, *([online.numerator] if step is online else [])):
            lowered = found.apply_online(running.term, step.max_symbols)
            assert not lowered.has(sympy.exp)
            value = pairs(plain(lowered), **s, **known, **{name: m / ln2 for name, m in maxima.items()})
            torch.testing.assert_close(value, pairs(running.term, **known, **maxima), rtol=1e-11, atol=1e-13)
        for _, operand in step.maxes:
            value = pairs(plain(found.maximum_of(operand)), **s, **known) * ln2
            torch.testing.assert_close(value, pairs(operand, **known), rtol=1e-11, atol=1e-13)
        known |= {**maxima, **{r.symbol.name: some for r in step.sums}}
        if step is not online and step.root is not None:
            known[step.root.symbol.name] = -some


@pytest.mark.parametrize("name", NAMES)
def test_a_tile_that_raises_no_maximum_rescales_by_1(name):
    """By exactly 1: a long row has thousands of such tiles, and a factor of 1 + 1e-7 each would add up."""
    online, found, _ = folded(name)
    for step in (*online.before, online):
        same = {renamed(m): m for m in step.max_symbols}
        for running in (*step.sums, *([online.numerator] if step is online else [])):
            assert found.apply_online(running.rescale, step.max_symbols).xreplace(same) in (1, exp2(0))


def test_the_scale_and_the_constant_become_one_factor():
    graph = ac.Variant().graph
    found = fold(graph, stream(graph))
    assert found.log2
    assert (found.score, found.unit) == (sym.QK, sym.SCALE / LN2)
    assert found.maximum_of(sym.SCORE) == found.unit * S


def test_without_an_exponential_there_is_no_constant():
    graph = ac.variants.get("relu").graph
    found = fold(graph, stream(graph))
    assert not found.log2
    assert (found.score, found.unit) == (sym.QK, sym.SCALE)


X, Y = sympy.Symbol("x", real=True), sympy.Symbol("y", real=True)
EXPRESSIONS = [
    sympy.exp(X),
    sympy.exp(LN2 * X - LN2 * Y),
    sympy.exp(X - Y) * sympy.exp(-Y) + 1,
    1 / (1 + sympy.exp(-X)) ** 2,
    sympy.exp(-sympy.exp(-X)),
    sympy.exp(absolute(LN2 * X) - maximum(LN2 * Y, 0)),
    sympy.exp(2 * (X + LN2 * Y)),
    sympy.log(1 + sympy.exp(X)),
]


@pytest.mark.parametrize("expr", EXPRESSIONS, ids=str)
def test_lowering_keeps_the_value(expr):
    env = {"x": torch.linspace(-4, 4, 41, dtype=torch.float64)[:, None], "y": torch.linspace(-2, 3, 11).double()}
    lowered = lower_exp(expr)
    assert lowered.has(exp2)
    assert not lowered.has(sympy.exp)
    torch.testing.assert_close(evaluate(plain(lowered), env), evaluate(plain(expr), env), rtol=1e-13, atol=0)


def test_the_constant_leaves_where_it_can():
    assert lower_exp(sympy.exp(LN2 * X - LN2 * Y)) == exp2(X - Y)
    assert per_ln2(LN2 * absolute(X)) == absolute(X)
    assert per_ln2(maximum(LN2 * X, LN2 * Y)) == maximum(X, Y)
    assert lower_exp(sympy.exp(LN2 * X - maximum(LN2 * Y, 0))) == exp2(X - maximum(Y, 0))
    assert lower_exp(X + 1) == X + 1


def test_a_sign_times_something_compares_instead():
    x, p = sympy.Symbol("x", real=True), sympy.Symbol("p", real=True)
    found = signed(p * exp2(x) * sign(x) + sign(x))
    assert found == where(x > 0, p * exp2(x), where(x < 0, -p * exp2(x), 0)) + sign(x)
    compared = signed(p * sign(x))
    for value in (-1.5, 0.0, 2.0):
        env = {"x": value, "p": 3.0}
        assert float(evaluate(compared, env, torch.float64, torch.device("cpu"))) == 3.0 * (value > 0) - 3.0 * (
            value < 0
        )


def test_exponentials_take_the_sign_of_a_score_in_one_operation():
    graph = ac.variants.get("cog").graph
    folded = fold(graph, stream(graph))
    assert folded.apply(sign(sym.SCORE) * sympy.exp(sym.SCORE)) == with_sign(exp2(folded.unit * S), S)
    # which is a product: what may be infinite where the sign is 0 is chosen
    assert not folded.apply(sign(sym.SCORE) / sym.SCORE).has(with_sign)


def test_a_magnitude_is_taken_before_its_positive_factor():
    k = sympy.Symbol("k", positive=True)
    assert scaled_after(absolute(k * LN2 * S) + absolute(-S)) == k * LN2 * absolute(S) + absolute(-S)


def test_a_polynomial_of_the_score_is_nested():
    a, b = sympy.symbols("a b", positive=True)
    found = nested(exp2(a) * (1 + a * S + b * S**2 / 2))
    assert found == exp2(a) * (1 + S * (a + b * S / 2))
    assert nested(1 + a * S) == 1 + a * S
