"""Enhanced interactive attention: every query head meets every key head; two small networks make H maps of the H * H.

    inner: for each query head, h1 units over its H maps;  cross: h2 units over the H results;  softmax

A tile of all maps is H * H times a tile of scores, which no kernel holds: the maps of a block of queries are
materialized, (B, H, H, block, N) floats, and the softmax and the sum of values are a generated kernel. That is wise for
the short sequences of the paper (a hundred tokens of translation); for long ones nothing makes this mechanism cheap.

Source: EIT: Enhanced Interactive Transformer, arXiv:2212.10197.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attncc.recipes.ops import by_queries, given_scores


def interactive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inner_in: Tensor,
    inner_out: Tensor,
    cross_in: Tensor,
    cross_out: Tensor,
    *,
    block: int = 64,
) -> Tensor:
    """(B, H, M, Dv). inner_in (H, h1, H), inner_out (H, h1), cross_in (h2, H), cross_out (H, h2)."""

    def step(start: int, stop: int, first: int, carry: Tensor) -> tuple[Tensor, Tensor]:
        rows = q[:, :, start:stop]
        maps = torch.einsum("bhmd,bgnd->bhgmn", rows.float(), k.float()) * q.shape[-1] ** -0.5
        inner = torch.einsum("hcg,bhgmn->bhcmn", inner_in.float(), maps).relu()
        heads = torch.einsum("hc,bhcmn->bhmn", inner_out.float(), inner)
        cross = torch.einsum("ch,bhmn->bcmn", cross_in.float(), heads).relu()
        scores = torch.einsum("hc,bcmn->bhmn", cross_out.float(), cross)
        return given_scores(causal=False)(rows, k, v, scores=scores), carry

    out, _ = by_queries(step, q, k, block, q.new_empty(0), causal=False)
    return out
