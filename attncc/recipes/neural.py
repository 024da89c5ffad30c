"""Neural attention: a network of two layers scores each pair of a query and a key. One kernel.

    score_ij = sum_u w3_u relu(w2_u . relu(q_i + k_j) + b2_u)

The first layer is a sum of a part of the query and a part of the key, which are made before: q = W_q s + b1, k = W_k t.
Each unit of the second layer is a sum over those of the first, and its map a tile of registers, so that they should be
few: the published ones have head dimensions of 2 or 4 here, and one or two units. Other networks: recipes.pairwise.

Source: Neural Attention, arXiv:2502.17206.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

import attncc as ac
from attncc.runtime.op import AttentionOp


def neural(q: Tensor, k: Tensor, v: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, *, causal: bool = False) -> Tensor:
    """(B, H, M, Dv). q (B, H, M, D), k (B, Hkv, N, D) with a component for each unit of the first layer; w2 (units, D),
    b2 and w3 (units,) of the second."""
    out: Tensor = _op(w2.shape[0], causal)(q, k, v, w2=w2, b2=b2, w3=w3)
    return out


@functools.cache
def _op(units: int, causal: bool) -> AttentionOp:
    def score(q_vec: Any, k_vec: Any, w2: Any, b2: Any, w3: Any) -> Any:
        hidden = ac.relu(q_vec + k_vec)
        return sum(w3[u] * ac.relu(ac.sum_d(w2[u] * hidden) + b2[u]) for u in range(units))

    unit = ac.Input("unit", grad=True)
    variant = ac.Variant(
        name="neural",
        similarity=score,
        inputs={"w2": ac.Input("unit", "d", grad=True), "b2": unit, "w3": unit},
        mask=ac.causal if causal else None,
    )
    return AttentionOp(variant.graph)
