"""The delta rule on a GPU: both gates and every chunk size against a loop in float64, gradients among them."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import attncc as ac

NAMES = ("delta_net", "gated_delta_net")


def drawn(name, length, dtype=torch.bfloat16, d_qk=64, d_v=64, alike=0.0, seed=0):
    """q, k, v, a state and the factors; `alike`: how much keys have in common."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=generator, device="cuda")

    common = alike * randn(1, 2, 1, d_qk)
    k = F.normalize(randn(1, 2, length, d_qk) + common, dim=-1)
    q, v = randn(1, 4, length, d_qk), randn(1, 2, length, d_v)
    inputs = {"beta": torch.sigmoid(randn(1, 4, length))}
    if name == "gated_delta_net":
        inputs["g"] = F.logsigmoid(randn(1, 4, length)) / 4
    return [x.to(dtype) for x in (q, k, v)], randn(4, 4, d_qk, d_v), inputs


def loop(name, q, k, v, initial, inputs, ends):
    """Token after token."""
    scale = q.shape[3] ** -0.5
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    outs, states = [], []
    for i, (lo, hi) in enumerate(pairwise(ends)):
        state = initial[i : i + 1]
        for t in range(lo, hi):
            key, beta = k[:, :, t, :, None], inputs["beta"][:, :, t, None, None]
            state = state * inputs["g"][:, :, t, None, None].exp() if "g" in inputs else state
            state = state + beta * key * (v[:, :, t, None] - (key * state).sum(-2, keepdim=True))
            outs.append(scale * (q[:, :, t, :, None] * state).sum(-2))
        states.append(state)
    return torch.stack(outs, 2), torch.cat(states)


def with_gradients(function, leaves, cotangents):
    leaves = [x.detach().requires_grad_() for x in leaves]
    results = function(*leaves)
    grads = torch.autograd.grad(results, leaves, [c.to(r.dtype) for c, r in zip(cotangents, results, strict=True)])
    return [*(r.detach() for r in results), *grads]


CASES = [
    *((name, torch.bfloat16, chunk, 128, 128, 0.0) for name in NAMES for chunk in (16, 32, 64)),
    ("gated_delta_net", torch.bfloat16, 64, 128, 128, 4.0),
    ("gated_delta_net", torch.float16, 64, 96, 80, 0.0),
    ("delta_net", torch.float16, 64, 256, 128, 1.0),
    ("gated_delta_net", torch.float32, None, 64, 64, 0.0),
    ("gated_delta_net", torch.bfloat16, None, 64, 64, 0.0),
]


@pytest.mark.parametrize(("name", "dtype", "chunk", "d_qk", "d_v", "alike"), CASES)
def test_chunks_are_the_recurrence(name, dtype, chunk, d_qk, d_v, alike):
    """Packed sequences, one of a single token, with a state in and out of each; each call twice."""
    ends = [0, 130, 131, 195, 300]
    tensors, initial, inputs = drawn(name, 300, dtype, d_qk, d_v, alike)
    op = ac.compile(name, plan="chunk")
    packed = {"cu_seqlens": torch.tensor(ends, device="cuda"), "output_final_state": True, "chunk_size": chunk}

    def ours(q, k, v, state, *rest):
        return op(q, k, v, initial_state=state, **dict(zip(inputs, rest, strict=True)), **packed)

    leaves = [*tensors, initial, *inputs.values()]
    cotangents = torch.randn(1, 4, 300, d_v, device="cuda").to(dtype), torch.randn_like(initial)
    got, again = (with_gradients(ours, leaves, cotangents) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    exact = with_gradients(
        lambda q, k, v, s, *rest: loop(name, q, k, v, s, dict(zip(inputs, rest, strict=True)), ends),
        [x.double() for x in leaves],
        cotangents,
    )
    names = ("out", "state", "dq", "dk", "dv", "dstate", *(f"d{n}" for n in inputs))
    for label, mine, theirs in zip(names, got, exact, strict=True):
        error = (mine.double() - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
        assert error <= (2e-5 if dtype == torch.float32 else 1e-2), (label, error)


@pytest.mark.parametrize("strided", [False, True])
def test_a_state_carries_a_sequence_on(strided):
    tensors, _, inputs = drawn("gated_delta_net", 200, torch.float32)
    if strided:
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    op = ac.compile("gated_delta_net")
    whole = op(*tensors, **inputs, plan="chunk")
    state, parts = None, []
    for lo, hi in ((0, 100), (100, 199), (199, 200)):
        own = {n: x[:, :, lo:hi] for n, x in inputs.items()}
        out, state = op(*(x[:, :, lo:hi] for x in tensors), **own, initial_state=state, output_final_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-3, atol=1e-3)


def test_a_long_sequence():
    """What is older than its last 300 tokens has decayed."""
    tensors, _, inputs = drawn("gated_delta_net", 60_000, d_qk=128, d_v=128)
    op = ac.compile("gated_delta_net", plan="chunk")
    out = op(*tensors, **inputs)
    assert out.isfinite().all()
    q, k, v, *rest = (x[:, :, -300:].double() for x in (*tensors, *inputs.values()))
    nothing = torch.zeros(1, 4, 128, 128, dtype=torch.float64, device="cuda")
    exact, _ = loop("gated_delta_net", q, k, v, nothing, dict(zip(inputs, rest, strict=True)), (0, 300))
    assert (out[:, :, -1].double() - exact[:, :, -1]).abs().max() <= 2e-2 * exact[:, :, -1].abs().max()
