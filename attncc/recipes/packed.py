"""Sequences one behind the other in a batch of 1: where each token's own begins, for scans that PyTorch makes."""

from __future__ import annotations

import torch
from torch import Tensor

from attncc.runtime.linear_cut import sequence_lengths


class Packed:
    """`number`, `begins` (N,): of each token, which sequence it is of and where that begins; `ends` (S,): behind each.

    Tensors have their tokens in the last dimension but one, and states a first dimension of sequences.
    """

    def __init__(self, cu_seqlens: Tensor, batch: int, length: int):
        ends = torch.tensor(sequence_lengths(cu_seqlens, batch, length), device=cu_seqlens.device)
        lengths = ends.diff()
        self.number = torch.repeat_interleave(torch.arange(len(lengths), device=ends.device), lengths)
        self.begins, self.ends, self.empty = ends[:-1][self.number], ends[1:], lengths == 0

    def of_tokens(self, states: Tensor) -> Tensor:
        """(S, .., 1, C) to (1, .., N, C): each token has that of its sequence."""
        return states[self.number].squeeze(-2).movedim(0, -2).unsqueeze(0)

    def last(self, x: Tensor, initial: Tensor) -> Tensor:
        """(1, .., N, C) to (S, .., 1, C): of each sequence its last token, `initial` where it has none."""
        if x.shape[-2] == 0:
            return initial
        found = x[0][..., (self.ends - 1).clamp_min(0), :].movedim(-2, 0).unsqueeze(-2)
        return torch.where(self.empty.view(-1, *[1] * (found.dim() - 1)), initial, found)
