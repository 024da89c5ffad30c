"""The derived backward, evaluated on all pairs in float64, against autograd through the reference."""

from __future__ import annotations

import pytest
import torch

import attncc as ac
from attncc.errors import UnsupportedError
from attncc.ir.text import formula
from attncc.passes.differentiate import differentiate
from attncc.passes.similarity import similarity
from attncc.passes.stream import stream
from attncc.runtime.reference import reference
from attncc.runtime.samples import Shape, sample_inputs

from .dense import NAMES, Pairs, gradient, variant

SHAPES = (Shape(2, 4, 2, 6, 9, 4, 3), Shape(1, 2, 1, 9, 5, 3, 4))
CLOSE = {"rtol": 1e-8, "atol": 1e-10}


def by_autograd(name, sample, differentiable, outputs, cotangents):
    leaves = {n: getattr(sample, n).clone().requires_grad_() for n in ("q", "k", "v")}
    inputs = {n: x.clone().requires_grad_() if n in differentiable else x for n, x in sample.inputs.items()}
    results = reference(variant(name), **leaves, outputs=outputs, **inputs)
    results = results if isinstance(results, tuple) else (results,)
    leaves |= {n: inputs[n] for n in differentiable}
    # the lse of a row that sees no key is -inf and constant
    loss = sum((torch.where(r.isfinite(), r, 0.0) * c).sum() for r, c in zip(results, cotangents, strict=True))
    return results[0], dict(
        zip(leaves, torch.autograd.grad(loss, tuple(leaves.values()), materialize_grads=True), strict=True)
    )


def by_derivation(graph, pairs, dout, dlse, out, differentiable, inputs):
    """out, dq, dk, dv and the inputs' gradients, as the kernels would compute them."""
    core = similarity(graph).core
    online = stream(core)
    derived = differentiate(core, online)
    rows = pairs.accumulate(online)
    saved = {s.name: pairs.rows(e, rows) for s, e in derived.saved}
    delta = (dout * out).sum(-1, keepdim=True) - dlse.unsqueeze(-1)
    values = {**saved, "delta": delta, "dp": dout @ pairs.v.mT}

    def shown(expr):
        return torch.where(pairs.visible, pairs(expr, **values), 0.0)

    def shared(x):
        b, h, n, d = x.shape
        return x.reshape(b, h // pairs.group, pairs.group, n, d).sum(2)

    weight, dqk = shown(derived.weight), shown(derived.dqk).double() * pairs(derived.dqk_scale)
    found = {"q": dqk @ pairs.k, "k": shared(dqk.mT @ pairs.q), "v": shared(weight.mT @ dout)}
    found |= {name: torch.zeros_like(inputs[name]) for name in differentiable}
    dsums = {name: torch.zeros_like(x) for name, x in pairs.sums.items()}
    for symbol, expr in derived.dsums:
        dsums[symbol.name] += shown(expr)
    for read, expr in derived.dreads:
        total, like = (dsums, pairs.sums) if read.input in dsums else (found, inputs)
        total[read.input] += gradient(pairs, read, shown(expr), like[read.input])
    moving = [name for name, x in pairs.sums.items() if x.requires_grad]
    if moving:  # what a sum over the head dimension means for its vectors is autograd's own here
        behind = {"q": pairs.q, "k": pairs.k, **{name: inputs[name] for name in differentiable}}
        passed = torch.autograd.grad(
            [pairs.sums[n] for n in moving], tuple(behind.values()), [dsums[n] for n in moving], materialize_grads=True
        )
        for name, x in zip(behind, passed, strict=True):
            found[name] = found[name] + (shared(x) if name == "k" else x)
    for read, expr in derived.row_dreads:
        seen = pairs.visible.any(-1, keepdim=True)
        cotangent = torch.where(seen, pairs.rows(expr, values), 0.0)
        found[read.input] += gradient(pairs, read, cotangent, inputs[read.input])
    return weight @ pairs.v, found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_backward_is_that_of_autograd(name, shape):
    graph = variant(name).graph
    sample = sample_inputs(graph, shape, torch.float64, seed=2)
    differentiable = tuple(d.name for d in graph.inputs if d.grad)
    inputs = {n: x.double() if n in differentiable else x for n, x in sample.inputs.items()}
    sample = type(sample)(sample.q, sample.k, sample.v, inputs)
    moving = {n: x.clone().requires_grad_() if n in differentiable else x for n, x in inputs.items()}
    pairs = Pairs(
        graph, type(sample)(sample.q.clone().requires_grad_(), sample.k.clone().requires_grad_(), sample.v, moving)
    )
    dout = torch.randn(shape.batch, shape.heads, shape.q_len, shape.d_v, dtype=torch.float64)
    dlse = torch.randn(dout.shape[:3], dtype=torch.float64)
    if stream(graph).lse is None:
        outputs, cotangents, dlse = ("out",), (dout,), torch.zeros_like(dlse)
    else:
        outputs, cotangents = ("out", "lse"), (dout, dlse)
    exact, expected = by_autograd(name, sample, differentiable, outputs, cotangents)
    out, found = by_derivation(graph, pairs, dout, dlse, exact.detach(), differentiable, moving)
    torch.testing.assert_close(out, exact, **CLOSE)
    assert found.keys() == expected.keys()
    for leaf, value in expected.items():
        torch.testing.assert_close(found[leaf], value, **CLOSE, msg=lambda text, leaf=leaf: f"d{leaf}: {text}")


def derived(name):
    graph = variant(name).graph
    return differentiate(graph, stream(graph))


def test_softmax_saves_lse_alone():
    backward = derived("causal")
    assert [s.name for s, _ in backward.saved] == ["lse"]
    assert formula(backward.weight) == "exp(-lse + score)"
    assert backward.needs_delta


def test_without_a_denominator_nothing_is_saved():
    for name in ("sigmoid", "relu", "relu2"):
        backward = derived(name)
        assert backward.saved == ()
        assert not backward.needs_delta


def test_where_no_exponential_moves_the_sums_are_saved():
    assert [s.name for s, _ in derived("taylor").saved] == ["row_sum_0"]
    assert [s.name for s, _ in derived("squares").saved] == ["row_max_0", "row_sum_0"]


def test_what_differs_between_query_heads_is_no_factor_of_the_program():
    backward = derived("by_head")
    assert {s.name for s in backward.dqk_scale.free_symbols} == {"scale", "kv_len"}


def test_only_inputs_that_ask_get_a_gradient():
    variant = ac.Variant(score=lambda score, h, m: score * m[h], inputs={"m": ac.Input("h")})
    assert differentiate(variant.graph, stream(variant.graph)).dreads == ()
    assert [r.input for r, _ in derived("alibi").dreads] == ["slopes"]
    assert [r.input for r, _ in derived("sink").row_dreads] == ["sink"]


@pytest.mark.parametrize(
    "normalizer",
    [
        lambda score, row: ac.exp(score - row.max(score)) / (row.sum(ac.exp(score - row.max(score))) + 1),
        lambda score, row: ac.exp(score - row.max(score)),
        lambda score, row: ac.exp(score - row.max(score)) / row.sum(ac.exp(score - row.max(score))) ** 2,
    ],
    ids=["a sum plus one", "no sum", "a squared sum"],
)
def test_a_weight_that_depends_on_the_maximum_alone_has_no_backward(normalizer):
    graph = ac.Variant(normalizer=normalizer).graph
    with pytest.raises(UnsupportedError, match="a gradient flows through the maximum") as refused:
        differentiate(graph, stream(graph))
    assert "test_differentiate.py" in str(refused.value)
