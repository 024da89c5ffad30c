"""Cut sequences into segments: what the kernels of a chunk plan must know about the lengths of a call."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attncc.errors import InputError
from attncc.runtime.refusals import kind_of


def check_lengths(cu_seqlens: Any) -> None:
    """InputError where these are not lengths summed up, whatever the shapes of a call. Their values are not read."""
    if not isinstance(cu_seqlens, Tensor):
        raise InputError(f"cu_seqlens is {kind_of(cu_seqlens)}, not a tensor", remedy="pass torch.tensor(cu_seqlens)")
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or cu_seqlens.numel() < 2:
        raise InputError("cu_seqlens is not a tensor of at least 2 integers", remedy="pass the sums of the lengths")


def sequence_lengths(cu_seqlens: Tensor, batch: int, length: int) -> list[int]:
    """Where each packed sequence begins, and the end. InputError where that is not so for tensors of this shape."""
    check_lengths(cu_seqlens)
    if batch != 1:
        raise InputError(f"packed sequences need a batch of 1, got {batch}", remedy="q, k, v are (1, H, total, D)")
    ends = [int(x) for x in cu_seqlens.tolist()]
    if ends[0] != 0 or ends[-1] != length or any(a > b for a, b in pairwise(ends)):
        raise InputError(f"cu_seqlens {ends} does not rise from 0 to the {length} tokens of q")
    return ends


def cut(q: Tensor, ends: list[int] | None, span: int) -> dict[str, Any]:
    """The tokens of q (B, H, N, D) in segments: packed sequences where `ends` says so, else B of one length."""
    return cut_evenly(q.shape[0], q.shape[2], span) if ends is None else cut_packed(ends, span, q.device)


def cut_sides(q: Tensor, k: Tensor, span: int) -> dict[str, Any]:
    """Queries and keys in segments each, where every query sees every key."""
    return {side: cut_evenly(x.shape[0], x.shape[2], span) for side, x in (("q", q), ("k", k))}


def cut_evenly(batch: int, length: int, span: int) -> dict[str, Any]:
    """Sequences of one length, in segments of `span` tokens."""
    per_sequence = max(1, -(-length // span))
    return {
        "span": span,
        "per_sequence": per_sequence,
        "count": batch * per_sequence,
        "sequences": batch,
        "segments": None,
        "firsts": None,
        "lengths": None,
    }


def places(cu_seqlens: Tensor, length: int) -> Tensor:
    """(length): where each token stands in its own sequence; nothing waits for the device."""
    tokens = torch.arange(length, device=cu_seqlens.device)
    starts = cu_seqlens.long()
    return tokens - starts[torch.searchsorted(starts, tokens, right=True) - 1]


def cut_packed(ends: list[int], span: int, device: torch.device) -> dict[str, Any]:
    """Packed sequences: a segment lies within one of them. Behind the last is one without tokens, for kernels that look
    ahead."""
    segments: list[int] = []
    firsts = [0]
    for lo, hi in pairwise(ends):
        for start in range(lo, hi, span):
            segments += (start, min(start + span, hi))
        firsts.append(len(segments) // 2)
    tables = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([*segments, 0, 0], firsts, ends)]
    return {
        "span": span,
        "per_sequence": 0,
        "count": len(segments) // 2,
        "sequences": len(ends) - 1,
        "segments": tables[0],
        "firsts": tables[1],
        "lengths": tables[2],
    }
