"""Titans' memory, where it is a matrix: learned at test time by gradient descent with momentum and forgetting.

    M_t = (1 - alpha_t) M_(t-1) + S_t        S_t = eta_t S_(t-1) - theta_t grad |k_t M - v_t|^2        out_t = q_t M_t

Within a chunk the gradient is taken at the memory that the chunk began with, as the authors do: then the chunk is
a few matmuls. A memory that is a deeper network needs a gradient of each token through it: no kernel of attncc's.
With chunk = 1 the recurrence is exact; with alpha = eta = 0 it is the delta rule with beta = 2 theta.

Source: Titans, arXiv:2501.00663.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: M and S, (B, H, D, Dv) each
State = tuple[Tensor, Tensor]


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    chunk: int = 64,
    initial_state: State | None = None,
) -> tuple[Tensor, State]:
    """out (B, H, N, Dv) in v's dtype, and the state behind it, in float32. q, k (B, H, N, D); theta, eta, alpha
    (B, H, N) in (0, 1). PyTorch, chunk after chunk: O(N chunk) memory, and N / chunk steps one after the other."""
    if initial_state is None:
        memory = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], device=k.device)
        initial_state = memory, torch.zeros_like(memory)
    memory, momentum = initial_state
    parts = []
    cut = (x.float().split(chunk, 2) for x in (q, k, v, theta, eta, alpha))
    for query, key, value, rate, kept, lost in zip(*cut, strict=True):
        forgets, carries = _products(1 - lost), _products(kept)
        # what a token's momentum, and what its gradient, is of the memory at each later token
        of_momentum = forgets @ (carries[..., :1] * kept[..., :1, None])
        of_token = -(forgets @ carries) * rate.unsqueeze(-2)
        of_memory = forgets[..., :1] * (1 - lost[..., :1, None])
        surprise = 2 * (key @ memory - value)
        weights = (query @ key.mT) * of_token
        parts.append(of_memory * (query @ memory) + of_momentum * (query @ momentum) + weights @ surprise)
        last = -(carries[..., -1, :] * rate).unsqueeze(-1)
        memory, momentum = (
            of_memory[..., -1:, :] * memory
            + of_momentum[..., -1:, :] * momentum
            + (key * of_token[..., -1, :, None]).mT @ surprise,
            (carries[..., -1:, :1] * kept[..., :1, None]) * momentum + (key * last).mT @ surprise,
        )
    return torch.cat(parts, 2).to(v.dtype), (memory, momentum)


def _products(x: Tensor) -> Tensor:
    """(.., T, T): entry (t, j) is the product of x over j + 1 .. t, 0 above the diagonal. No division: x may be 0."""
    length = x.shape[-1]
    behind = torch.ones(length, length, dtype=torch.bool, device=x.device).tril(-1)
    factors = torch.where(behind, x.unsqueeze(-1), 1.0)
    return factors.cumprod(-2).tril()
