"""Attention in linear time: what a plan cannot do, and inputs that are missing or do not fit."""

from __future__ import annotations

import pytest
import torch

import attncc as ac
from attncc.errors import InputError, UnsupportedError
from tests.runtime.linear_cases import FULL, agree, drawn


def test_what_a_plan_cannot_do_is_said():
    (q, k, v), _ = drawn("linear_attention", length=8)
    op = ac.compile("linear_attention")
    state = torch.zeros(1, 2, 16, 25)
    assert op(q[:, :, :5], k, v).shape == (1, 2, 5, 24)  # other tokens: every pair
    with pytest.raises(UnsupportedError, match="5 queries and 8 keys are not the same tokens"):
        op(q[:, :, :5], k, v, plan="chunk")
    with pytest.raises(UnsupportedError, match="use plan='chunk'"):
        op(q, k, v, plan="parallel", output_final_state=True)
    with pytest.raises(UnsupportedError, match=r"'lse' is one of pairs(.|\n)*leave out what is of a state"):
        op(q, k, v, outputs=("out", "lse"), initial_state=state)
    with pytest.raises(UnsupportedError, match=r"not the same tokens\n *leave out what is of a state"):
        op(q[:, :, :5], k, v, output_final_state=True)
    assert len(op(q, k, v, outputs=("out", "lse"))) == 2
    with pytest.raises(InputError, match=r"pass torch.float32 \(1, 2, 16, 25\)"):
        op(q, k, v, initial_state=state[..., :24])
    with pytest.raises(InputError, match="one of 16, 32, 64$"):
        ac.compile("gla")(q, k, v, g=torch.zeros(1, 2, 8, 16), chunk_size=128)
    with pytest.raises(InputError, match="one of 16, 32, 64, 128"):
        op(q, k, v, chunk_size=48)
    for options, said in (
        ({"chunk_size": "64"}, "chunk_size is '64', not a whole number"),
        ({"cu_seqlens": [0, 8]}, "cu_seqlens is of type list, not a tensor"),
        ({"cu_seqlens": torch.tensor([[0, 8]])}, "cu_seqlens is not a tensor of at least 2 integers"),
        ({"initial_state": [state]}, "initial_state is of type list, not a tensor"),
        ({"position": -1}, "position is -1, not a number of tokens"),
        ({"position": 1.5}, "position is 1.5, not a number of tokens"),
    ):
        with pytest.raises(InputError, match=said):
            op(q, k, v, **options)
    every = ac.compile(FULL["linear"])
    for options in ({"output_final_state": True}, {"plan": "recurrent"}, {"cu_seqlens": torch.tensor([0, 8])}):
        with pytest.raises(UnsupportedError, match="no state from token to token"):
            every(q, k, v, **options)
    with pytest.raises(InputError, match="does not rise from 0 to the 8 tokens"):
        op(q, k, v, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(InputError, match="plan is 'fast'"):
        ac.compile("linear_attention", plan="fast")
    with pytest.raises(UnsupportedError, match=r"the factor 'exp\(cap\*tanh\(.*depends on query and key together"):
        ac.compile("softcap", plan="chunk")
    assert type(ac.compile("simple_gla", plan="parallel")) is ac.AttentionOp


def test_a_gradient_that_only_all_pairs_have():
    """The part of the weight that is free of the score has a factor whose gradient chunks do not have."""

    def raised(score, b, h, q_idx, kv_idx, g):
        return (score + 1) * ac.exp(ac.cumsum(g[b, h, q_idx]) - ac.cumsum(g[b, h, kv_idx]))

    inputs = {"g": ac.Input("b", "h", "kv_idx", grad=True)}
    op = ac.compile(ac.Variant(name="raised", score=raised, normalizer=ac.identity, mask=ac.causal, inputs=inputs))
    (q, k, v), _ = drawn("raised", length=2100)
    g = torch.full((1, 2, 2100), -0.1)
    assert op._chosen(q, k, v, "auto", ("out",), False, None) == "chunk"
    for plan in ("chunk", "recurrent"):
        with pytest.raises(
            UnsupportedError, match=r"whose gradient to 'g' is not derived yet[^~]*a component of q and k"
        ):
            op(q, k, v, g=g.requires_grad_(), plan=plan)
        op(q[:, :, :9], k[:, :, :9], v[:, :, :9], g=g[:, :, :9].detach(), plan=plan)
    with pytest.raises(UnsupportedError, match="not derived yet"):
        op(q, k, v, g=g, output_final_state=True)
    assert op._with_gradients("chunk", "auto", False, {"g": g}) == "parallel"
    with torch.no_grad():
        assert op._with_gradients("chunk", "auto", False, {"g": g}) == "chunk"


def test_a_gradient_of_a_term_that_only_all_pairs_have():
    """The same where that part is made of a key: (1 + q) . exp(k) + 1 has a sum over k in it."""
    shifted = ac.Variant(
        similarity=lambda q_vec, k_vec: ac.dot(q_vec, ac.exp(k_vec)) + ac.sum_d(ac.exp(k_vec)) ** 2,
        normalizer=ac.identity,
    )
    op = ac.compile(shifted)
    (q, k, v), _ = drawn("shifted", length=9)
    exact = ac.reference(shifted, q.double(), k.double(), v.double())
    agree([op(q.requires_grad_(), k, v, plan="chunk")], [exact], 1e-5)
    with pytest.raises(UnsupportedError, match="whose gradient to 'k' is not derived yet"):
        op(q, k.requires_grad_(), v, plan="chunk")
    op(q, k, v).sum().backward()
    assert k.grad is not None


def test_missing_and_misshapen_gates():
    (q, k, v), _ = drawn("simple_gla", length=8)
    op = ac.compile("simple_gla")
    for plan in ("chunk", "parallel"):
        with pytest.raises(InputError, match="needs the input 'g'"):
            op(q, k, v, plan=plan)
        with pytest.raises(InputError, match="has size 7, expected 8"):
            op(q, k, v, g=torch.zeros(1, 2, 7), plan=plan)
        with pytest.raises(InputError, match=r"'g' has shape \(1, 2, 8, 1\), expected 3 dimensions"):
            op(q, k, v, g=torch.zeros(1, 2, 8, 1), plan=plan)
        with pytest.raises(InputError, match="'g'.*is of type float, not a tensor"):
            op(q, k, v, g=-0.5, plan=plan)
        # a name is of the formula, not of the sums that kernels of all pairs are given
        with pytest.raises(InputError, match="no input 'rate'(.|\n)*it takes g$"):
            op(q, k, v, g=torch.zeros(1, 2, 8), rate=0.5, plan=plan)
        with pytest.raises(InputError, match="no input 'cu_seqlen'(.|\n)*did you mean 'cu_seqlens'"):
            op(q, k, v, g=torch.zeros(1, 2, 8), cu_seqlen=torch.tensor([0, 8]), plan=plan)


REFUSED = {
    "score": ("score * tanh(g[b, h, q_idx] - g[b, h, kv_idx])", "identity", "tanh(g[b, h, q_idx] - g[b, h, kv_idx])"),
    "normalizer": ("score * g[b, h, kv_idx]", "exp(score)", "exp(score)"),
}


@pytest.mark.parametrize("stage", REFUSED)
def test_a_gate_that_does_not_split_is_refused_where_it_is_written(stage):
    score, normalizer, shown = REFUSED[stage]
    variant = ac.loads_toml(
        f'name = "gate"\n[stages]\nscore = "{score}"\nmask = "kv_idx <= q_idx"\nnormalizer = "{normalizer}"\n'
        '[inputs]\ng = { index = ["b", "h", "kv_idx"] }\n'
    )
    with pytest.raises(UnsupportedError, match="depends on query and key together") as refused:
        ac.compile(variant, plan="chunk")
    error = refused.value
    assert error.stage == stage
    assert error.span.text[error.span.col : error.span.end_col].strip('"').endswith(shown)


def test_a_state_of_what_has_none_is_refused_by_name():
    (q, k, v), _ = drawn("simple_gla", length=19)
    with pytest.raises(InputError, match=r"no input 'output_final_state'\n.*which factor does not split"):
        ac.compile("causal")(q, k, v, output_final_state=True)
