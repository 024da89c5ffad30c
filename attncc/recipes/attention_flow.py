"""Bidirectional attention flow: a context asks a question's tokens, and the other way round. Nothing of M x N is kept.

    s_ij = w_q . q_i + w_k . k_j + w_qk . (q_i * k_j) = (w_qk * q_i + w_k) . k_j + w_q . q_i

q is the context's and k the question's. What belongs to a row alone, w_q . q_i, changes no weight of that row: the
kernel multiplies w_qk * q_i + w_k with k_j, and its rows' maxima get the rest afterwards. The variant `trilinear` is
the same weights with no such output.

Source: Bidirectional Attention Flow, arXiv:1611.01603.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor

import attncc as ac
from attncc.runtime.op import AttentionOp


@cache
def _op() -> AttentionOp:
    return AttentionOp(ac.variants.get("full").with_outputs(top=ac.outputs.row_max).graph)


def attention_flow(q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, w_qk: Tensor) -> tuple[Tensor, Tensor]:
    """(out, top): out (B, H, M, Dv) is what each token of the context takes from the question; top (B, H, M), float32,
    its largest score. By these the other direction is a mean of the context: (top.softmax(-1)[..., None] * q).sum(-2).

    q (B, H, M, D); k (B, Hkv, N, D) and v; w_q, w_k, w_qk (H, D), the three parts of w. All have gradients.
    """
    across = (w_qk[:, None] * q + w_k[:, None]).to(q.dtype)
    out, top = _op()(across, k, v, scale=1.0, outputs=("out", "top"))
    return out, top + (q.float() * w_q[:, None].float()).sum(-1)
