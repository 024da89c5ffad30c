"""What several programs share: their ops, compiled once, and a loop over blocks of queries."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import attncc as ac
from attncc.runtime.compile import compile as compile_variant
from attncc.runtime.linear import LinearOp
from attncc.runtime.op import AttentionOp
from attncc.runtime.recompute import recomputed

_BIASED = ac.Variant(name="causal_bias", score=ac.bias("bias"), mask=ac.causal)


@functools.cache
def shipped(name: str) -> AttentionOp:
    """The op of a shipped variant."""
    return AttentionOp(ac.variants.get(name).graph)


@functools.cache
def linear(name: str) -> LinearOp:
    """The op of a shipped variant that has a form in linear time."""
    op = compile_variant(ac.variants.get(name))
    assert isinstance(op, LinearOp)
    return op


@functools.cache
def of_features(causal: bool, divided: bool) -> LinearOp:
    """scale * sum of (q_i . k_j) v_j where q and k are features already, over the sum of the weights if `divided`."""

    def over_sum(score, row):
        return score / (row.sum(score) + 1e-8)

    name = f"{'causal_' * causal}features{'_over_sum' * divided}"
    variant = ac.Variant(name=name, mask=ac.causal if causal else None, normalizer=over_sum if divided else ac.identity)
    op = compile_variant(variant)
    assert isinstance(op, LinearOp)
    return op


@functools.cache
def given_scores(causal: bool) -> AttentionOp:
    """Softmax of `scores` (B, H, M, N) and the sum of values; q and k give sizes alone."""
    variant = ac.Variant(
        name="given_scores",
        similarity=lambda b, h, q_idx, kv_idx, scores: scores[b, h, q_idx, kv_idx],
        inputs={"scores": ac.Input("b", "h", "q_idx", "kv_idx", grad=True)},
        mask=ac.causal if causal else None,
    )
    return AttentionOp(variant.graph)


@functools.cache
def causal_bias() -> AttentionOp:
    """Causal softmax attention with `bias` (B, H, M, N), of which dimensions may be 1."""
    return AttentionOp(_BIASED.graph)


def of_every_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values as many as query heads: those of a group are copies, for a call in which keys are the queries."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def by_queries(
    step: Callable[[int, int, int, Tensor], tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    block: int,
    carry: Tensor,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Run `step(start, stop, first, carry) -> (out, carry)` over blocks of queries: their outputs together, and the
    last carry.

    The last query stands at the last key, so that query `start` stands at key `first`; with `causal`, queries before
    the first key give 0 and are not asked for. A backward runs each step again instead of keeping what it made, so that
    what a step materializes is there once.
    """
    offset = k.shape[2] - q.shape[2]
    alive = max(-offset, 0) if causal else 0
    parts = []
    for start in range(alive, q.shape[2], block):
        stop = min(start + block, q.shape[2])
        out, carry = recomputed(step, start, stop, start + offset, carry)
        parts.append(out)
    if alive or not parts:
        like = parts[0] if parts else q[..., :0]
        parts.insert(0, like.new_zeros(*q.shape[:2], min(alive, q.shape[2]), like.shape[3]))
    return torch.cat(parts, 2), carry
