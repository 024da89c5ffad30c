"""Infini-attention: causal softmax within segments, and a memory of all segments before, mixed by a gate of each head.

    memory_s = sum over the segments before s of f(K)' V        norm_s = the same of f(K)        f(x) = elu(x) + 1
    out = sigmoid(beta) * f(q) memory_s / (f(q) norm_s) + (1 - sigmoid(beta)) * local

Each segment reads the memory before it writes. With `delta` it writes V less what its keys find there. One kernel for
all segments' local part; the memory is a few matmuls of PyTorch for each segment, one after the other, and gradients
go through them all.

Where there is no memory yet the local part stands alone, without its gate: the formula read literally would scale it.

Source: Leave No Context Behind, arXiv:2404.07143; the gate's direction is the paper's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

import attncc as ac
from attncc.runtime.linear_cut import sequence_lengths
from attncc.runtime.op import AttentionOp

#: float32: the memory (B, H, D, Dv) and its norm (B, H, D, 1), H the heads of k; B: sequences, where they are packed
State = tuple[Tensor, Tensor]


def infini(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    segment: int = 2048,
    rotate: Callable[[Tensor], Tensor] | None = None,
    delta: bool = False,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, State]:
    """out (B, H, N, Dv), or (out, state). q (B, H, N, D), k, v with as many heads or fewer, beta (H,).

    The memory's q and k are as given; `rotate` turns those of the local part. A call begins a segment: with a state,
    prompts are cut at multiples of `segment`. cu_seqlens: packed sequences in a batch of 1, each computed by itself.
    """
    if cu_seqlens is not None:
        ends = sequence_lengths(cu_seqlens, q.shape[0], q.shape[2])
        found = []
        for i, (lo, hi) in enumerate(pairwise(ends)):
            query, key, value = (x[:, :, lo:hi] for x in (q, k, v))
            state = None if initial_state is None else (initial_state[0][i : i + 1], initial_state[1][i : i + 1])
            found.append(_sequence(query, key, value, beta, segment, rotate, delta, state))
        out = torch.cat([out for out, _ in found], 2)
        last = torch.cat([state[0] for _, state in found]), torch.cat([state[1] for _, state in found])
    else:
        out, last = _sequence(q, k, v, beta, segment, rotate, delta, initial_state)
    return (out, last) if output_final_state else out


def _sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    segment: int,
    rotate: Callable[[Tensor], Tensor] | None,
    delta: bool,
    initial_state: State | None,
) -> tuple[Tensor, State]:
    """`infini` of sequences of one length, with the state behind them."""
    turned = (q, k) if rotate is None else (rotate(q), rotate(k))
    local: Tensor = _segments()(*turned, v, width=segment)
    group = q.shape[1] // k.shape[1]
    gate = torch.sigmoid(beta.float())[:, None, None]
    if initial_state is None:
        shape = (*k.shape[:2], k.shape[3])
        empty = torch.zeros(*shape, v.shape[3], device=k.device), torch.zeros(*shape, 1, device=k.device)
        memory, norm = empty
    else:
        memory, norm = initial_state
    parts = []
    cut = (x.split(segment, 2) for x in (q, k, v, local))
    for number, (query, key, value, near) in enumerate(zip(*cut, strict=True)):
        if number == 0 and initial_state is None:
            parts.append(near)
        else:
            asked = (F.elu(query.float()) + 1).unflatten(1, (-1, group)).flatten(2, 3)
            found = _read(asked, memory, norm).unflatten(2, (group, -1)).flatten(1, 2)
            parts.append((gate * found + (1 - gate) * near.float()).to(near.dtype))
        written, value = F.elu(key.float()) + 1, value.float()
        if delta:
            value = value - _read(written, memory, norm)
        memory, norm = memory + written.mT @ value, norm + written.sum(2).unsqueeze(-1)
    return torch.cat(parts, 2), (memory, norm)


def _read(features: Tensor, memory: Tensor, norm: Tensor) -> Tensor:
    return (features @ memory) / (features @ norm).clamp_min(1e-10)


@functools.cache
def _segments() -> AttentionOp:
    """Causal softmax within segments of `width` tokens."""
    variant = ac.Variant(
        name="segments",
        mask=ac.causal & (lambda q_idx, kv_idx, width: q_idx // width == kv_idx // width),
        inputs={"width": ac.Scalar(2048)},
    )
    return AttentionOp(variant.graph)
