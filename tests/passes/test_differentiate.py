"""The derived backward, evaluated on all pairs in float64, against autograd through the reference."""

from __future__ import annotations

import pytest
import torch

import attncc as ac
from attncc.ir.symbols import RAW_SCORE
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
    rows |= pairs.attained(online, rows)
    saved = {s.name: pairs.rows(e, rows) for s, e in derived.saved}
    delta = (dout * out).sum(-1, keepdim=True) - dlse.unsqueeze(-1)
    values = {**saved, "delta": delta, "dp": dout @ pairs.v.mT}
    raw = {RAW_SCORE: graph["raw_score"].expr}
    for symbol, expr in derived.parts:
        term = pairs(expr.xreplace(raw), **values)
        values[symbol.name] = torch.where(pairs.visible, term, 0.0).sum(-1, keepdim=True)
    values |= {symbol.name: pairs.rows(expr, values) for symbol, expr in derived.cotangents}

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
    assert formula(backward.weight) == "exp(score - lse)"
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


def swept(name):
    """The sums over keys that the backward takes beside its own."""
    return [formula(e) for _, e in derived(name).parts]


def test_a_mere_shift_passes_no_gradient_on():
    for name in ("min_p", "top_theta", "kept_probabilities", "two_sums"):
        backward = derived(name)
        assert not any("_at" in s.name for s, _ in backward.saved)
        assert backward.cotangents == ()


def test_a_gradient_through_statistics_takes_one_sweep_at_most():
    assert swept("entmax15") == ["-2*relu(score/2 - row_root_0)", "-2*dp*relu(score/2 - row_root_0)"]
    assert [formula(e) for _, e in derived("entmax15").cotangents] == [
        "-row_part_1*where(row_part_0 == 0, 0, 1/row_part_0)"
    ]
    assert swept("below_the_largest") == ["-dp*step(score + 1 - row_max_0)"]
    assert swept("over_the_largest") == []  # its cotangent is delta


def test_what_is_held_back_gets_no_gradient():
    assert "delta" not in {s.name for s in derived("held_back").dqk.free_symbols}
    assert "delta" in {s.name for s in derived("not_less_than_one").dqk.free_symbols}
    assert derived("half_held_back").parts == ()
