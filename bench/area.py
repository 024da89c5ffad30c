"""How many (query, key) pairs a mask shows: the work that a TFLOP/s figure counts.

In closed form, or, where none is known, by looking at each.

Queries are the last `m` of `n` positions (bottom-right alignment), as everywhere in attncc.
Counts are for one (batch, head).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attncc.ir.graph import VariantGraph
from attncc.runtime.evaluate import evaluate

#: queries that `counted` looks at together
ROWS = 256
INDICES = ("b", "h", "h_kv", "q_idx", "kv_idx")


def below(m: int, n: int, offset: int) -> int:
    """Pairs with `key <= query + offset`, for `m` queries and `n` keys."""

    def rows_up_to(last: int) -> int:
        # Keys seen by the rows whose own count is 1, 2, ..., last, where a row never sees more than n.
        inside = min(max(last, 0), n)
        return inside * (inside + 1) // 2 + max(last - n, 0) * n

    return rows_up_to(m + offset) - rows_up_to(offset)


def full(m: int, n: int) -> int:
    """Every pair."""
    return m * n


def causal(m: int, n: int) -> int:
    """Keys up to the query's own position."""
    return below(m, n, n - m)


def window(m: int, n: int, size: int) -> int:
    """Causal, and less than `size` behind the query: its own key is counted."""
    return below(m, n, n - m) - below(m, n, n - m - size)


def prefix(m: int, n: int, length: int) -> int:
    """Causal, or among the first `length` keys."""
    length = min(length, n)
    return causal(m, n) + m * length - below(m, length, n - m)


def documents(lengths: Sequence[int]) -> int:
    """Causal within each document; queries and keys are the same positions."""
    return sum(length * (length + 1) // 2 for length in lengths)


def counted(graph: VariantGraph, tensors: Mapping[str, torch.Tensor], heads: int, m: int, n: int) -> int:
    """Pairs that the mask shows the average head of the first sequence, where its inputs are `tensors`.

    Heads are not grouped."""
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    sizes = {"b": 1, "h": heads, "h_kv": heads, "q_idx": m, "kv_idx": n}
    env: dict[str, Any] = {"q_len": m, "kv_len": n, "num_heads": heads, "b": torch.zeros(1, 1, 1, dtype=torch.int64)}
    env |= {scalar.name: scalar.default for scalar in graph.scalars}
    for decl in graph.inputs:
        shape = zip(decl.pattern, tensors[decl.name].shape, strict=True)
        env[decl.name] = tensors[decl.name].expand([max(sizes.get(dim, 1), size) for dim, size in shape])
    env["h"] = env["h_kv"] = torch.arange(heads).reshape(-1, 1, 1)
    env["kv_idx"] = torch.arange(n)
    total = 0
    for rows in torch.arange(m).split(ROWS):
        at = {name: value.to(device) for name, value in {**env, "q_idx": rows[:, None]}.items() if name in INDICES}
        seen = evaluate(graph["mask"].expr, {**env, **at}, torch.float32, device).expand(heads, len(rows), n).sum(-1)
        total += int((seen if graph.dead_rows == "zero" else torch.where(seen == 0, n, seen)).sum())
    return round(total / heads)
