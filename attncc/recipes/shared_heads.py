"""Pit One Against Many (MHE, arXiv:2310.07911): heads that share one projection, and differ by an embedding each."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from attncc import variants
from attncc.runtime.op import AttentionOp


@cache
def _causal() -> AttentionOp:
    return AttentionOp(variants.get("causal").graph)


def shared_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    of_q: Tensor,
    of_k: Tensor,
    of_v: Tensor,
    mode: Literal["add", "multiply"] = "add",
    op: AttentionOp | None = None,
) -> Tensor:
    """out (B, H, M, Dv) of q, k, v (B, 1, length, D) with embeddings of H heads, (H, D) each: x + e, or x * (1 + e).

    One head of keys and values is read by all: an embedding of k is the same for all keys of a row, where it cancels if
    added, and is the query's if multiplied; that of v joins the output row, but not of a row that sees no key, which is
    0. `op` is a softmax of any mask and score, so that weights sum to 1; plain causal attention by default.
    """
    op = _causal() if op is None else op
    of_q, of_k, of_v = (e.unsqueeze(1) for e in (of_q, of_k, of_v))
    if mode == "add":
        out, lse = op(q + of_q, k, v, outputs=("out", "lse"))
        return out + torch.where((lse > -torch.inf).unsqueeze(-1), of_v, 0.0).to(out.dtype)
    return op(q * (1 + of_q) * (1 + of_k), k, v) * (1 + of_v)
