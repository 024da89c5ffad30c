from __future__ import annotations

import pytest
import sympy
import torch

from attncc.ir import vocabulary as voc
from attncc.runtime.closures import closure
from attncc.runtime.evaluate import FLOAT_FUNCTIONS, JOIN_FUNCTIONS, evaluate

K = sympy.Symbol("k", integer=True)
N = sympy.Symbol("n", integer=True)
X = sympy.Symbol("x", real=True)
T = sympy.Symbol("t", real=True)
I = sympy.Symbol("i", integer=True)  # noqa: E741


def test_integers_are_exact_where_floats_are_not():
    big = 2**53 + 1
    got = evaluate(voc.mod(K * 3 + 1, N) + voc.floordiv(K, N), {"k": torch.tensor([big]), "n": 7})
    assert got.dtype == torch.int64
    assert got.item() == (big * 3 + 1) % 7 + big // 7


@pytest.mark.parametrize("a", range(-7, 8))
@pytest.mark.parametrize("b", [-3, -1, 2, 5])
def test_floor_division_and_remainder_are_pythons(a, b):
    env = {"k": torch.tensor([a]), "n": torch.tensor([b])}
    assert evaluate(voc.floordiv(K, N), env).item() == a // b
    assert evaluate(voc.mod(K, N), env).item() == a % b


def test_integers_with_fractions_become_the_named_dtype():
    third = K / 3 + sympy.Rational(1, 7)
    assert evaluate(third, {"k": torch.tensor([1, 2])}).tolist() == [1 / 3 + 1 / 7, 2 / 3 + 1 / 7]
    assert evaluate(third, {"k": torch.tensor([1])}, torch.float32).dtype == torch.float32
    assert evaluate(sympy.log(K), {"k": 3}).item() == pytest.approx(1.0986122886681098, rel=1e-15)


def test_floats_keep_their_dtype_beside_integers_and_constants():
    half = torch.ones(3, dtype=torch.bfloat16)
    assert evaluate(2 * X + sympy.Float(0.3), {"x": half}, torch.float32).dtype == torch.bfloat16
    assert evaluate(X * K, {"x": half, "k": torch.arange(3)}, torch.float32).dtype == torch.float32


def test_comparisons_of_integers_with_floats_are_exact():
    k = torch.tensor([2**24 + 1])
    assert not evaluate(sympy.Eq(K, X), {"k": k, "x": float(2**24)}).item()
    assert evaluate(sympy.Gt(K, X), {"k": k, "x": float(2**24)}).item()


@pytest.mark.parametrize(("value", "floor", "trunc"), [(-1.5, -2, -1), (1.5, 1, 1), (-2.0, -2, -2)])
def test_floor_and_truncation(value, floor, trunc):
    assert evaluate(voc.floor(X), {"x": value}).item() == floor
    assert evaluate(voc.to_int(X), {"x": value}).item() == trunc


def test_booleans():
    env = {"k": torch.arange(5)}
    inside = sympy.And(K > 0, sympy.Not(sympy.Or(sympy.Eq(K, 2), K >= 4)))
    assert evaluate(inside, env).tolist() == [False, True, False, True, False]
    assert evaluate(voc.to_int(inside) * 2, env).tolist() == [0, 2, 0, 2, 0]
    assert evaluate(voc.where(inside, K, -K), env).tolist() == [0, 1, -2, 3, -4]
    assert evaluate(sympy.true, {}).item() is True


@pytest.mark.parametrize(("exponent", "expected"), [(2, 9.0), (-1, 1 / 3), (sympy.Rational(1, 2), 3**0.5), (K, 27.0)])
def test_powers(exponent, expected):
    assert evaluate(X**exponent, {"x": 3.0, "k": 3}).item() == pytest.approx(expected, rel=1e-15)


def test_integer_powers_stay_integers():
    h = sympy.Symbol("h", integer=True, nonnegative=True)
    assert evaluate(2**h, {"h": torch.tensor([0, 3, 40])}).tolist() == [1, 8, 2**40]
    assert evaluate(2 ** (-h), {"h": torch.tensor([0, 3])}).tolist() == [1.0, 0.125]


def test_softplus_is_exact_beyond_the_threshold_of_pytorchs():
    assert evaluate(voc.softplus(X), {"x": -40.0}).item() == pytest.approx(4.248354255291589e-18, rel=1e-12)
    assert evaluate(voc.softplus(X) - X, {"x": 25.0}).item() == pytest.approx(1.3887943864771144e-11, rel=1e-3)


def test_reads():
    table = torch.tensor([[1, 2, 3], [4, 5, 6]])
    env = {"t": table, "k": torch.tensor([-1, 0, 1, 2]), "i": torch.tensor(1)}
    assert evaluate(voc.Read(T, K, I), env).tolist() == [0, 2, 5, 0]
    assert evaluate(voc.Read(T, I, K), env).tolist() == [0, 4, 5, 6]
    assert evaluate(voc.Read(T, 0, 3), env).item() == 0
    assert evaluate(voc.Read(T), {"t": torch.tensor(7.0)}).item() == 7
    assert evaluate(voc.Read(T, K), {"t": torch.empty(0), "k": torch.arange(3)}).tolist() == [0, 0, 0]


def test_what_is_no_node_of_the_ir_is_refused():
    with pytest.raises(TypeError, match="gamma is no node of the IR"):
        evaluate(sympy.gamma(X), {"x": 1.0})


@pytest.mark.parametrize("function", [*FLOAT_FUNCTIONS, *JOIN_FUNCTIONS], ids=lambda f: f.__name__)
@pytest.mark.parametrize("x", [-1.5, 0.0, 2.0])
def test_a_closure_of_numbers_is_a_number(function, x):
    """A factor of a whole call, of scalars and lengths, has no tensor in it."""
    arguments = (X, T) if function in (voc.maximum, voc.minimum) else (X,)
    exact = evaluate(function(*arguments), {"x": torch.tensor(x, dtype=torch.float64), "t": 0.5})
    for expr in (function(*arguments), function(X, sympy.Float(0.5))) if len(arguments) == 2 else (function(X),):
        found = closure(expr)({"x": x, "t": 0.5})
        assert isinstance(found, int | float)
        assert found == pytest.approx(exact.item(), rel=1e-12, nan_ok=True)
