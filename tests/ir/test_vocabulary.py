"""The derivative rules and types of the vocabulary, against autograd of its own evaluation."""

from __future__ import annotations

import pytest
import sympy
import torch

from attncc.ir import vocabulary as voc
from attncc.language.values import arity
from attncc.runtime.evaluate import evaluate

X = sympy.Symbol("x", real=True)
Y = sympy.Symbol("y", real=True)
K = sympy.Symbol("k", integer=True)
UNARY = [name for name in voc.FUNCTIONS if arity(name) == 1 and name not in ("int", "float")]
POINTS = [-3.0, -0.7, 0.0, 0.4, 2.5]


def autograd(expr, at, **others):
    x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    value = evaluate(expr, {"x": x, **others})
    if not value.requires_grad:  # integers
        return torch.zeros_like(x)
    return torch.autograd.grad(value.sum(), x, materialize_grads=True)[0]


@pytest.mark.parametrize("name", UNARY)
def test_derivative_rules(name):
    expr = voc.FUNCTIONS[name](X)
    points = [0.3, 1.0, 2.5] if name == "log" else POINTS
    x = torch.tensor(points, dtype=torch.float64)
    got = evaluate(expr.diff(X), {"x": x}).expand(x.shape).double()
    torch.testing.assert_close(got, autograd(expr, points), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["maximum", "minimum"])
@pytest.mark.parametrize("swap", [False, True])
def test_ties_of_maximum_and_minimum(name, swap):
    expr = voc.FUNCTIONS[name](Y, X) if swap else voc.FUNCTIONS[name](X, Y)
    x, y = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor(2.0).double()
    got = evaluate(expr.diff(X), {"x": x, "y": y}).expand(3)
    below, above = (0, 1) if name == "maximum" else (1, 0)
    assert got.tolist() == [below, 1 if swap else 0, above]  # at the tie the second argument has it
    torch.testing.assert_close(got.double(), autograd(expr, x.tolist(), y=y))


def test_a_choice_has_the_derivative_of_what_it_chose():
    expr = voc.where(X > Y, X**2, voc.tanh(X))
    x, y = torch.tensor([-1.0, 0.5, 1.0, 2.0]).double(), torch.tensor(1.0).double()
    got = evaluate(expr.diff(X), {"x": x, "y": y})
    torch.testing.assert_close(got, autograd(expr, x.tolist(), y=y))


@pytest.mark.parametrize("expr", [voc.Read(Y, K), voc.sign(X), voc.step(X), voc.floordiv(K, 2), voc.mod(K, 3)])
def test_constants_of_differentiation(expr):
    assert expr.diff(X) == 0


@pytest.mark.parametrize(
    ("expr", "kind"),
    [
        (K + 1, "int"),
        (K / 2, "float"),
        (K < 2, "bool"),
        (voc.relu(K), "int"),
        (voc.relu(X), "float"),
        (voc.where(X > 0, K, 1), "int"),
        (voc.where(X > 0, K, X), "float"),
        (voc.floor(X), "int"),
        (voc.to_float(K), "float"),
        (voc.to_int(X > 0), "int"),
        (voc.floordiv(K, 3), "int"),
        (voc.Read(K, K), "int"),
        (voc.Read(Y, K), "float"),
        (sympy.true, "bool"),
    ],
)
def test_types(expr, kind):
    assert voc.type_of(expr) == kind


def test_constants_fold():
    assert voc.floordiv(sympy.Integer(-7), sympy.Integer(2)) == -4
    assert voc.mod(sympy.Integer(-7), sympy.Integer(2)) == 1
    assert voc.where(sympy.true, X, Y) == X
    assert voc.where(X > 0, Y, Y) == Y
    assert voc.to_int(K) == K
