"""Variants in linear time with tensors for them, and what their tests share."""

from __future__ import annotations

import torch

import attncc as ac


def polynomial(score, row):
    return (1 + score) / row.sum(1 + score)


def weighted(score, row, b, h, q_idx, kv_idx, beta, tau, kappa):
    p = score * beta[b, h, kv_idx] * tau[b, q_idx]
    return kappa[h] * p / ac.maximum(ac.abs(row.sum(p)), 0.5)


#: features on both sides, factors of tokens and heads, and a denominator
OF_FACTORS = {
    "normalizer": weighted,
    "similarity": lambda q_vec, k_vec: ac.dot(ac.softplus(q_vec), ac.sigmoid(k_vec)),
    "inputs": {
        "beta": ac.Input("b", "h", "kv_idx", grad=True),
        "tau": ac.Input("b", "q_idx", grad=True),
        "kappa": ac.Input("h", grad=True),
    },
}
SCANS = ("forward_kernel", "dq_kernel", "dk_kernel", "dv_kernel")
SHIPPED = ("linear_attention", "retention", "lightning", "simple_gla", "ssd", "gla")
VARIANTS = {
    **{name: ac.variants.get(name) for name in SHIPPED},
    "unit": ac.Variant(
        name="unit",
        mask=ac.causal,
        normalizer="identity",
        similarity=lambda q_vec, k_vec: ac.dot(q_vec, k_vec) / ac.norm(q_vec) / ac.norm(k_vec),
    ),
    "polynomial": ac.Variant(name="polynomial", mask=ac.causal, normalizer=polynomial),
    "weighted": ac.Variant(
        name="weighted",
        mask=ac.causal,
        **OF_FACTORS,
    ),
    "gated": ac.Variant(  # a decay beside features, factors of tokens and a denominator
        name="gated",
        mask=ac.causal,
        score=ac.gate("g"),
        **OF_FACTORS,
    ),
}


FULL = {
    "linear": ac.Variant(
        name="full_linear",
        similarity=lambda q_vec, k_vec: ac.dot(ac.relu(q_vec) + ac.sigmoid(q_vec), ac.softplus(k_vec)),
        normalizer="by_sum",
    ),
    "identity": ac.Variant(name="full_identity", normalizer="identity"),
    "polynomial": ac.Variant(name="full_polynomial", normalizer=polynomial),
    "weighted": ac.Variant(
        name="full_weighted",
        **OF_FACTORS,
    ),
}


def inputs_of(name, batch, heads, length, d_qk=16):
    generator = torch.Generator().manual_seed(3)
    positive = 0.5 + torch.rand(batch, heads, length, generator=generator)
    return {
        "simple_gla": {"g": -0.3 * positive},
        "ssd": {"dt": 0.3 * positive, "rate": torch.linspace(-1.5, -0.1, heads)},
        "gla": {"g": -0.5 * torch.rand(batch, heads, length, d_qk, generator=generator)},
        "retention": {"rates": torch.linspace(-0.3, -0.02, heads)},
        "lightning": {"rates": torch.linspace(-0.5, -0.01, heads)},
        "weighted": {"beta": positive, "tau": positive[:, 0].clone(), "kappa": positive[0, :, 0].clone()},
        "gated": {
            "g": -0.3 * positive,
            "beta": positive,
            "tau": positive[:, 0].clone(),
            "kappa": positive[0, :, 0].clone(),
        },
    }.get(name, {})


def drawn(name, batch=1, heads=2, kv_heads=1, length=37, d_qk=16, d_v=24, dtype=torch.float32, strided=False):
    generator = torch.Generator().manual_seed(1)

    def tensor(h, d):
        shape = (batch, length, h, d) if strided else (batch, h, length, d)
        x = torch.randn(shape, generator=generator).to(dtype)
        return x.transpose(1, 2) if strided else x

    q, k, v = tensor(heads, d_qk), tensor(kv_heads, d_qk), tensor(kv_heads, d_v)
    if name == "polynomial":  # its weights are 1 + score: kept above 0
        q = q * 0.2
    return [q, k, v], inputs_of(name, batch, heads, length)


def with_gradients(op, tensors, inputs, cotangent, **options):
    leaves = [x.detach().requires_grad_() for x in (*tensors, *inputs.values())]
    out = op(*leaves[:3], **dict(zip(inputs, leaves[3:], strict=True)), **options)
    return out, torch.autograd.grad(out, leaves, cotangent.to(out.dtype))


def agree(got, exact, tolerance):
    for ours, theirs in zip(got, exact, strict=True):
        assert (ours.double() - theirs).abs().max() <= tolerance * max(theirs.abs().max().item(), 1.0)
