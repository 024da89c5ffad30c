"""Lizard: softmax over a window, with learned memory in its denominator, beside gated linear attention. Two kernels.

    out = linear + alpha * window
    linear_i = sum_j f(q_i).f(k_j) exp(G_i - G_j) v_j / sum_j f(q_i).f(k_j) exp(G_i - G_j)        f(x) = [s(xW), s(-xW)]
    window_i = sum_j exp(q_i.k_j / sqrt(D)) v_j / (sum_j exp(q_i.k_j / sqrt(D)) + sum_m exp(q_i.meta_m / sqrt(D)))

with s the softmax. Features, 2 f of them a token, and the memory's logits are made in PyTorch.

Source: Lizard, arXiv:2507.09025.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import attncc as ac
from attncc.errors import InputError
from attncc.recipes.packed import Packed
from attncc.runtime.compile import compile as compile_variant
from attncc.runtime.linear import LinearOp
from attncc.runtime.op import AttentionOp

#: the linear part's state, float32 (B, H, 2 f, Dv + 1), and k and v of the tokens that the window still sees
State = tuple[Tensor, Tensor, Tensor]


def lizard(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    maps: Tensor,
    alpha: Tensor,
    meta: Tensor,
    window: int = 128,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, State]:
    """out (B, H, N, Dv), or (out, state); all of it receives gradients.

    q (B, H, N, D), k, v with as many heads or fewer; g (B, H or 1, N), the log of what a token leaves of the state;
    maps W (H, D, f); alpha () or (H, 1, 1); meta (H, D, m); window: the keys that a query sees, itself among them.
    cu_seqlens: packed sequences in a batch of 1, which begin without a state, for their windows differ in length.
    """
    packed = None if cu_seqlens is None else Packed(cu_seqlens, q.shape[0], q.shape[2])
    if packed is not None and (initial_state is not None or output_final_state):
        raise InputError("packed sequences have no state here", remedy="call each on its own")
    group = q.shape[1] // k.shape[1]
    key, value = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    state = None if initial_state is None else initial_state[0]
    found = _gated()(
        *(_features(q, maps), _features(key, maps), value),
        g=g,
        scale=1.0,
        initial_state=state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )
    linear: Tensor = found[0] if output_final_state else found
    if initial_state is not None:
        k, v = torch.cat([initial_state[1], k], 2), torch.cat([initial_state[2], v], 2)
    logits = torch.einsum("bhnd,hdm->bhnm", q.float(), meta.float()) * q.shape[-1] ** -0.5
    own: dict[str, Any] = {} if packed is None else {"doc": packed.number[None].int()}
    near = _window(packed is not None)(q, k, v, memory=logits.logsumexp(-1), window=window, **own)
    out = (linear + alpha * near).to(q.dtype)
    seen = max(k.shape[2] - (window - 1), 0)
    return (out, (found[1], k[:, :, seen:], v[:, :, seen:])) if output_final_state else out


def _features(x: Tensor, maps: Tensor) -> Tensor:
    y = torch.einsum("bhnd,hdf->bhnf", x.float(), maps.float())
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).to(x.dtype)


@functools.cache
def _gated() -> LinearOp:
    def over_sum(score, row):
        return score / ac.maximum(row.sum(score), 1e-6)

    variant = ac.Variant(name="lizard_linear", score=ac.gate("g"), mask=ac.causal, normalizer=over_sum)
    op = compile_variant(variant)
    assert isinstance(op, LinearOp)
    return op


@functools.cache
def _window(packed: bool) -> AttentionOp:
    def with_memory(score, row, b, h, q_idx, memory):
        top = ac.maximum(row.max(score), memory[b, h, q_idx])
        p = ac.exp(score - top)
        return p / (row.sum(p) + ac.exp(memory[b, h, q_idx] - top))

    seen = ac.causal & ac.sliding_window("window")
    variant = ac.Variant(
        name=f"lizard_window{'_packed' * packed}",
        mask=seen & ac.document("doc") if packed else seen,
        normalizer=with_memory,
        inputs={"memory": ac.Input("b", "h", "q_idx", grad=True)},
    )
    return AttentionOp(variant.graph)
