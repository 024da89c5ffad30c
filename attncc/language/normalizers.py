"""The shipped normalizers, written as in the papers. The compiler has no special case for any of them."""

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


def identity(score: Any) -> Any:
    """The score as it is: no denominator, as retention and gated linear attention have it."""
    return score


def by_sum(score: Any, row: Any) -> Any:
    """s / sum s: linear attention's denominator. The scores must not add up to zero."""
    return score / row.sum(score)


def cog(score: Any, row: Any) -> Any:
    """sign(s) exp|s| / sum exp|s|: weights may be negative (arXiv:2411.07176)."""
    e = fn.exp(fn.absolute(score) - row.max(fn.absolute(score)))
    return fn.sign(score) * e / row.sum(e)


def sparsemax(score: Any, row: Any) -> Any:
    """max(s - tau, 0), with tau such that the row sums to 1 (arXiv:1602.02068)."""
    top = row.max(score)
    tau = row.root(lambda t: row.sum(fn.relu(score - t)) - 1, top - 1, top)
    return fn.relu(score - tau)


def entmax15(score: Any, row: Any) -> Any:
    """max(s / 2 - tau, 0)^2, with tau such that the row sums to 1 (arXiv:1905.05702)."""
    half = score / 2
    top = row.max(half)
    tau = row.root(lambda t: row.sum(fn.relu(half - t) ** 2) - 1, top - 1, top)
    return fn.relu(half - tau) ** 2


#: by the name they have in the text form
TABLE: dict[str, Any] = {
    "softmax": softmax,
    "softmax1": softmax1,
    "sigmoid": sigmoid,
    "relu": relu,
    "relu2": relu2,
    "taylor": taylor,
    "cog": cog,
    "sparsemax": sparsemax,
    "entmax15": entmax15,
    "identity": identity,
    "by_sum": by_sum,
}


def weighted_sum(weight: Any, v_vec: Any, row: Any) -> Any:
    """The default reduction."""
    return row.sum(weight * v_vec)
