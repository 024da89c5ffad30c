"""How many (query, key) pairs a mask shows, in closed form: the work that a TFLOP/s figure counts.

Queries are the last `m` of `n` positions (bottom-right alignment), as everywhere in attncc.
Counts are for one (batch, head).
"""

from __future__ import annotations

from collections.abc import Sequence


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
