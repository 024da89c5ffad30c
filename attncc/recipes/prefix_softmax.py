"""Softmax over the tokens so far, of scores that the key makes alone: a scan of (maximum, sum, weighted values).

No pair of tokens has a score of its own, so no attention kernel is in it: PyTorch, in log2(N) steps over the sequence.

Sources: Attention as an RNN, arXiv:2405.13956; RWKV, arXiv:2305.13048.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: (.., 1, C), (.., 1, C), (.., 1, Dv): the largest exponent, the sum of weights and of weighted values over exp of it
State = tuple[Tensor, Tensor, Tensor]


def prefix_softmax(
    s: Tensor, v: Tensor, decay: Tensor | None = None, initial_state: State | None = None
) -> tuple[Tensor, State]:
    """out (.., N, Dv) = sum_j<=t exp(s_j + (t - j) decay) v_j over the sum of the weights, and the state behind it.

    s (.., N, C) with C = 1 or Dv, v (.., N, Dv); decay (C) is the log of what a token leaves of those before it. As
    Aaren, s = (learned query . k) / sqrt(D) with C = 1. Memory O(N log N) where gradients are wanted.
    """
    top, total, weighed = _sums(s, v, decay, initial_state)
    state = top[..., -1:, :], total[..., -1:, :], weighed[..., -1:, :]
    return weighed / total, state


def rwkv4(k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial_state: State | None = None) -> tuple[Tensor, State]:
    """RWKV-4's wkv, (B, N, C), and the state behind it: every channel on its own, w (C) the log of its decay, below 0.

    A token reads what lies before it without that decay's own step, and itself with the bonus u (C); the gate
    sigmoid(r) is the block's. k, v (B, N, C).
    """
    top, total, weighed = _sums(k, v, w, initial_state)
    state = top[..., -1:, :], total[..., -1:, :], weighed[..., -1:, :]
    if initial_state is None:
        none = torch.zeros_like(total[..., :1, :])
        initial_state = torch.full_like(none, -torch.inf), none, none
    past = [torch.cat([a, b[..., :-1, :]], -2) for a, b in zip(initial_state, (top, total, weighed), strict=True)]
    _, total, weighed = _joined((past[0], past[1], past[2]), (k.float() + u, torch.ones_like(total), v.float()))
    return (weighed / total).to(v.dtype), state


def _sums(s: Tensor, v: Tensor, decay: Tensor | None, initial: State | None) -> State:
    """What every prefix adds up to, by doubling: element t covers 1, 2, 4, .. tokens up to t."""
    found: State = s.float(), torch.ones_like(s, dtype=torch.float32), v.float()
    length = s.shape[-2]
    rate = s.new_zeros((), dtype=torch.float32) if decay is None else decay.float()
    span = 1
    while span < length:
        before = tuple(x[..., :-span, :] for x in found)
        shifted = before[0] + span * rate, before[1], before[2]
        late = _joined(shifted, (found[0][..., span:, :], found[1][..., span:, :], found[2][..., span:, :]))
        found = tuple(torch.cat([x[..., :span, :], y], -2) for x, y in zip(found, late, strict=True))  # type: ignore[assignment]
        span *= 2
    if initial is None:
        return found
    age = torch.arange(1, length + 1, device=s.device, dtype=torch.float32)[:, None]
    return _joined((initial[0] + age * rate, initial[1], initial[2]), found)


def _joined(a: State, b: State) -> State:
    """Two sums as one, over the larger of their exponents."""
    top = torch.maximum(a[0], b[0]).detach()
    of_a, of_b = (a[0] - top).exp(), (b[0] - top).exp()
    return top, of_a * a[1] + of_b * b[1], of_a * a[2] + of_b * b[2]
