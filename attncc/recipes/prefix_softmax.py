"""Softmax over the tokens so far, of scores that the key makes alone: a scan of (maximum, sum, weighted values).

No pair of tokens has a score of its own, so no attention kernel is in it: PyTorch, in log2(N) steps over the sequence.

Sources: Attention as an RNN, arXiv:2405.13956; RWKV, arXiv:2305.13048.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attncc.recipes.packed import Packed

#: (.., 1, C), (.., 1, C), (.., 1, Dv): the largest exponent, the sum of weights and of weighted values over exp of it
State = tuple[Tensor, Tensor, Tensor]


def prefix_softmax(
    s: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    initial_state: State | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """out (.., N, Dv) = sum_j<=t exp(s_j + (t - j) decay) v_j over the sum of the weights, and the state behind it.

    s (.., N, C) with C = 1 or Dv, v (.., N, Dv); decay (C) is the log of what a token leaves of those before it. As
    Aaren, s = (learned query . k) / sqrt(D) with C = 1. cu_seqlens: packed sequences in a batch of 1, whose states have
    a first dimension of sequences in its place. Memory O(N log N) where gradients are wanted.
    """
    packed = None if cu_seqlens is None else Packed(cu_seqlens, s.shape[0], s.shape[-2])
    found = _sums(s, v, decay, initial_state, packed)
    _, total, weighed = found
    return weighed / total, _last(found, initial_state, packed)


def rwkv4(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial_state: State | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, State]:
    """RWKV-4's wkv, (B, N, C), and the state behind it: every channel on its own, w (C) the log of its decay, below 0.

    A token reads what lies before it without that decay's own step, and itself with the bonus u (C); the gate
    sigmoid(r) is the block's. k, v (B, N, C); cu_seqlens as `prefix_softmax` has it.
    """
    packed = None if cu_seqlens is None else Packed(cu_seqlens, k.shape[0], k.shape[-2])
    found = _sums(k, v, w, initial_state, packed)
    first = _nothing(found, packed) if initial_state is None else initial_state
    past = [_before(a, b, packed) for a, b in zip(first, found, strict=True)]
    _, total, weighed = _joined((past[0], past[1], past[2]), (k.float() + u, torch.ones_like(found[1]), v.float()))
    return (weighed / total).to(v.dtype), _last(found, initial_state, packed)


def _nothing(found: State, packed: Packed | None) -> State:
    """The state before the first token of each sequence, shaped like those behind the tokens."""
    sequences = () if packed is None else (len(packed.ends),)
    shapes = [(*sequences, *x.shape[len(sequences) : -2], 1, x.shape[-1]) for x in found]
    return found[0].new_full(shapes[0], -torch.inf), found[1].new_zeros(shapes[1]), found[2].new_zeros(shapes[2])


def _before(initial: Tensor, found: Tensor, packed: Packed | None) -> Tensor:
    """The state that each token finds: the one after the previous token, or the initial one of its sequence."""
    if packed is None:
        return torch.cat([initial, found[..., :-1, :]], -2)
    begins = packed.begins == torch.arange(found.shape[-2], device=found.device)
    return torch.where(begins[:, None], packed.of_tokens(initial), found.roll(1, -2))


def _last(found: State, initial: State | None, packed: Packed | None) -> State:
    """The state behind the last token of each sequence."""
    first = _nothing(found, packed) if initial is None else initial
    if packed is None:
        return (
            first if found[0].shape[-2] == 0 else (found[0][..., -1:, :], found[1][..., -1:, :], found[2][..., -1:, :])
        )
    top, total, weighed = (packed.last(x, y) for x, y in zip(found, first, strict=True))
    return top, total, weighed


def _sums(s: Tensor, v: Tensor, decay: Tensor | None, initial: State | None, packed: Packed | None) -> State:
    """The sum over every prefix of a sequence, by doubling: element t covers 1, 2, 4, ... tokens up to t."""
    found: State = s.float(), torch.ones_like(s, dtype=torch.float32), v.float()
    length = s.shape[-2]
    tokens = torch.arange(length, device=s.device)
    rate = s.new_zeros((), dtype=torch.float32) if decay is None else decay.float()
    span = 1
    while span < length:
        before = tuple(x[..., :-span, :] for x in found)
        top = before[0] + span * rate
        if packed is not None:  # what another sequence's tokens add up to has no weight
            top = torch.where((tokens[:-span] < packed.begins[span:])[:, None], -torch.inf, top)
        late = _joined(
            (top, before[1], before[2]), (found[0][..., span:, :], found[1][..., span:, :], found[2][..., span:, :])
        )
        found = tuple(torch.cat([x[..., :span, :], y], -2) for x, y in zip(found, late, strict=True))  # type: ignore[assignment]
        span *= 2
    if initial is None:
        return found
    if packed is not None:
        initial = packed.of_tokens(initial[0]), packed.of_tokens(initial[1]), packed.of_tokens(initial[2])
    age = (tokens + 1 - (0 if packed is None else packed.begins)).float()[:, None]
    return _joined((initial[0] + age * rate, initial[1], initial[2]), found)


def _joined(a: State, b: State) -> State:
    """Two sums as one, over the larger of their exponents."""
    top = torch.maximum(a[0], b[0]).detach()
    of_a, of_b = (a[0] - top).exp(), (b[0] - top).exp()
    return top, of_a * a[1] + of_b * b[1], of_a * a[2] + of_b * b[2]
