"""The normalizers that ship, written the way papers write them. Nothing in the compiler knows their names."""

from __future__ import annotations

from typing import Any

from attncc.language import functions as fn


def softmax(score: Any, row: Any) -> Any:
    """exp(s) / sum exp(s)."""
    p = fn.exp(score - row.max(score))
    return p / row.sum(p)


def softmax1(score: Any, row: Any) -> Any:
    """exp(s) / (1 + sum exp(s)): a row may attend to nothing."""
    m = fn.maximum(row.max(score), 0.0)
    p = fn.exp(score - m)
    return p / (row.sum(p) + fn.exp(-m))


def sigmoid(score: Any, kv_len: Any) -> Any:
    """sigmoid(s - log n), no denominator (arXiv:2409.04431)."""
    return fn.sigmoid(score - fn.log(kv_len))


def relu(score: Any, kv_len: Any) -> Any:
    """max(s, 0) / n (arXiv:2309.08586)."""
    return fn.relu(score) / kv_len


def relu2(score: Any, kv_len: Any) -> Any:
    """max(s, 0)^2 / n."""
    return fn.relu(score) ** 2 / kv_len


def taylor(score: Any, row: Any) -> Any:
    """The second-order Taylor polynomial of exp, over its sum: always positive."""
    p = 1 + score + score**2 / 2
    return p / row.sum(p)


def cog(score: Any, row: Any) -> Any:
    """sign(s) exp|s| / sum exp|s|: weights may be negative (arXiv:2411.07176)."""
    e = fn.exp(fn.absolute(score) - row.max(fn.absolute(score)))
    return fn.sign(score) * e / row.sum(e)


#: by the name they have in the text form
TABLE: dict[str, Any] = {
    "softmax": softmax,
    "softmax1": softmax1,
    "sigmoid": sigmoid,
    "relu": relu,
    "relu2": relu2,
    "taylor": taylor,
    "cog": cog,
}


def weighted_sum(weight: Any, v_vec: Any, row: Any) -> Any:
    """The default reduction."""
    return row.sum(weight * v_vec)
