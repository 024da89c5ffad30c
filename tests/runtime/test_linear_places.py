"""Gates and factors that nobody shipped, of positions: by chunks against all pairs, and in packed sequences."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import attncc as ac
from attncc.errors import UnsupportedError
from tests.passes.test_linearize import timed
from tests.runtime.linear_cases import agree, drawn, with_gradients

RATE = {"rate": ac.Input("h", grad=True)}


def forgetting(score, h, rate, q_idx, kv_idx, q_len, kv_len):
    """A power of the positions' ratio: D(t) = -rate log(t + 1), which has no value before the first token."""
    return score * ac.exp(-rate[h] * (ac.log(q_idx + kv_len - q_len + 1) - ac.log(kv_idx + 1)))


def slowing(score, h, rate, q_idx, kv_idx, q_len, kv_len):
    return score * ac.exp(-rate[h] * (ac.sqrt(q_idx + kv_len - q_len) - ac.sqrt(kv_idx)))


def hastening(score, h, rate, q_idx, kv_idx, q_len, kv_len):
    i = q_idx + kv_len - q_len
    return score * ac.exp(-0.01 * rate[h] * (i * i - kv_idx * kv_idx))


def averaged(score, h, rate, q_idx, kv_idx, q_len, kv_len):
    """The mean over what is seen, each key with a weight by its place."""
    return score * (1 + rate[h] * kv_idx) / (q_idx + kv_len - q_len + 1)


def half_of_itself(score, h, rate, q_idx, kv_idx, q_len, kv_len):
    i = q_idx + kv_len - q_len
    return ac.where(kv_idx == i, score / (i + 2), score * ac.exp(rate[h] * (kv_idx - i)))


def bent(score, h, rate, q_idx, kv_idx, q_len, kv_len):
    s = score * rate[h] / (q_idx + kv_len - q_len + 1)
    return s + s**2


FORMULAS = {f.__name__: f for f in (forgetting, slowing, hastening, averaged, half_of_itself, bent)}


def variant(formula):
    return ac.Variant(name=formula.__name__, score=formula, mask=ac.causal, normalizer="identity", inputs=RATE)


def of(name):
    return drawn(name, length=37, d_v=16)[0], {"rate": torch.tensor([0.5, 0.1])}


@pytest.mark.parametrize("name", FORMULAS)
def test_chunks_are_all_pairs(name):
    tensors, inputs = of(name)
    cotangent = torch.randn(1, 2, 37, 16, generator=torch.Generator().manual_seed(2))
    spec = variant(FORMULAS[name])
    got = with_gradients(ac.compile(spec, plan="chunk"), tensors, inputs, cotangent, chunk_size=16)
    double = [x.double() for x in tensors], {n: x.double() for n, x in inputs.items()}
    exact = with_gradients(lambda *a, **i: ac.reference(spec, *a, **i), *double, cotangent.double())
    agree((got[0], *got[1]), (exact[0], *exact[1]), 3e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_packed_sequences_count_their_own_tokens(name):
    tensors, inputs = of(name)
    spec = variant(FORMULAS[name])
    packed = ac.compile(spec)(*tensors, **inputs, cu_seqlens=torch.tensor([0, 17, 17, 37]), chunk_size=16)
    parts = [ac.reference(spec, *(x[:, :, a:b].double() for x in tensors), **inputs) for a, b in pairwise((0, 17, 37))]
    agree([packed], [torch.cat(parts, 2).double()], 3e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_state_goes_on_at_its_position(name):
    tensors, inputs = of(name)
    op = ac.compile(variant(FORMULAS[name]))
    whole = op(*tensors, **inputs, plan="chunk")
    state = op(*(x[:, :, :20] for x in tensors), **inputs, output_final_state=True)[1]
    rest = [x[:, :, 20:] for x in tensors]
    for plan in ("chunk", "recurrent"):
        out = op(*rest, **inputs, initial_state=state, position=20, plan=plan)
        torch.testing.assert_close(out, whole[:, :, 20:], rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsupportedError, match="is of the position of a token, and a state comes in"):
        op(*rest, **inputs, initial_state=state)


@pytest.mark.parametrize(
    "mask", [ac.causal, lambda q_idx, kv_idx: kv_idx < q_idx, None], ids=["causal", "before", "all"]
)
def test_a_mean_counts_what_its_row_sees(mask):
    """As many keys as the query's place says; the first row of a mask that hides the token itself sees none."""
    spec = ac.Variant(name="mean", normalizer=lambda score, row: score / ac.sqrt(row.count()), mask=mask)
    (q, k, v), _ = of("mean")
    ends = (0, 37) if mask is None else (0, 17, 17, 37)
    exact = [ac.reference(spec, *(x[:, :, a:b].double() for x in (q, k, v))) for a, b in pairwise(ends) if a < b]
    packed = {} if mask is None else {"cu_seqlens": torch.tensor(ends)}
    agree([ac.compile(spec)(q, k, v, plan="chunk", **packed)], [torch.cat(exact, 2)], 3e-6)


def test_what_packed_sequences_have_not_each_is_refused():
    tensors, inputs = of("averaged")
    packed = {"cu_seqlens": torch.tensor([0, 17, 37])}
    sized = ac.Variant(score=lambda score, kv_len: score / kv_len, mask=ac.causal, normalizer="identity")
    with pytest.raises(UnsupportedError, match="reads the length of the sequence, and sequences are packed"):
        ac.compile(sized)(*tensors, **packed)
    gate = {"g": ac.Input("b", "h", "kv_idx", grad=True)}
    one_sided = ac.Variant(
        score=lambda score, b, h, kv_idx, g: score * ac.exp(ac.cumsum(g[b, h, kv_idx])),
        mask=ac.causal,
        normalizer="identity",
        inputs=gate,
    )
    with pytest.raises(UnsupportedError, match="sums along the tokens"):
        ac.compile(one_sided)(*tensors, g=torch.zeros(1, 2, 37), **packed)
    clock = {**RATE, "times": ac.Input("b", "kv_idx")}
    op = ac.compile(ac.Variant(score=timed, mask=ac.causal, normalizer="identity", inputs=clock))
    times = torch.rand(1, 37).cumsum(1)
    out = op(*tensors, rate=-inputs["rate"], times=times, **packed)  # no state comes in: the first step has no say
    late = ac.reference(op.graph, *(x[:, :, 17:] for x in tensors), rate=-inputs["rate"], times=times[:, 17:])
    torch.testing.assert_close(out[:, :, 17:].double(), late.double(), rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedError, match="reads what belongs to another token"):
        op(*tensors, rate=inputs["rate"], times=times, initial_state=torch.zeros(2, 2, 16, 16), **packed)
