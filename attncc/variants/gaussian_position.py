"""Positional attention with no dot product: each head looks at a Gaussian around a place relative to the query.

Inputs: center (H,), in keys after the query, and spread (H,), the standard deviation, a quarter of the keys if it is
not given; both receive gradients.
q and k are not read: q gives the number of queries and k that of the keys.
"""

from __future__ import annotations

import attncc as ac


def quarter(sizes: dict[str, int]) -> list[float]:
    """A wide Gaussian for each head."""
    return [max(sizes["kv_idx"], 1) / 4] * sizes["h"]


gaussian_position = ac.Variant(
    name="gaussian_position",
    similarity=lambda h, q_idx, kv_idx, q_len, kv_len, center, spread: (
        -((kv_idx - (q_idx + kv_len - q_len) - center[h]) ** 2) / (2 * spread[h] ** 2)
    ),
    inputs={"center": ac.Input("h", grad=True), "spread": ac.Input("h", grad=True, default=quarter)},
    cites="Hard-Coded Gaussian Attention, arXiv:2005.00742",
)
