"""A variant on all pairs at once, from what the passes derived, in float64."""

from __future__ import annotations

import functools
from typing import Any

import sympy
import torch
from torch import Tensor

import attncc as ac
from attncc.ir.graph import VariantGraph
from attncc.ir.levels import Level, level
from attncc.ir.symbols import UNKNOWN, H
from attncc.passes.reverse import first_at, ties
from attncc.passes.running import without_running_sums
from attncc.passes.similarity import similarity
from attncc.passes.stream import Implicit, Online
from attncc.runtime.evaluate import evaluate
from attncc.runtime.samples import Sample


def unit_length(score, row):
    p = ac.exp(score - row.max(score))
    return p / ac.sqrt(row.sum(p * p))


def squares(score, row):
    p = (score / row.max(ac.abs(score))) ** 2
    return p / row.sum(p)


def doubled(score, row):
    p = ac.exp(2 * score - 2 * row.max(score))
    return p / row.sum(p)


def beside_a_sink(score, row, h, sink):
    m = ac.maximum(row.max(score), sink[h] + 1)
    p = ac.exp(score - m)
    return p / (row.sum(p) + ac.exp(sink[h] - m))


def gated(score, row, b, kv_idx, gate):
    p = ac.exp(score - row.max(score)) * gate[b, kv_idx] ** 2
    return p / row.sum(p)


def two_sums(score, row):
    p = ac.exp(score - row.max(score))
    return p / (row.sum(p) + ac.sqrt(row.sum(p * p)))


def softplus_mean(score, row):
    return ac.softplus(score) / row.sum(ac.softplus(score))


def below_the_largest(score, row):
    return ac.relu(score - row.max(score) + 1)


def over_the_largest(score, row):
    return ac.exp(score - row.max(score))


def above_the_mean(score, row):
    return ac.relu(score - row.mean(score))


def standardized(score, row):
    mean = row.mean(score)
    z = (score - mean) / ac.sqrt(row.mean((score - mean) ** 2) + 1e-3)
    p = ac.exp(z - row.max(z))
    return p / row.sum(p)


def from_least_to_largest(score, row):
    low, high = row.min(score), row.max(score)
    x = (score - low) / (high - low + 0.1)
    return x / (row.sum(x) + 1)


def kept_probabilities(score, row):
    p = ac.softmax(score, row)
    kept = ac.where(p > 0.1, p, 0)
    return kept / (row.sum(kept) + 0.1)


def two_roots(score, row):
    top = row.max(score)
    t = row.root(lambda t: row.sum(ac.relu(score - t)) - 1, top - 1, top)
    u = row.root(lambda u: row.sum(ac.sigmoid(score - t - u)) - 0.5, -20, 20)
    return ac.sigmoid(score - t - u)


def weighed_root(score, row, h, b, kv_idx, tau, gate):
    z = tau[h] * score
    top = row.max(z)
    g = gate[b, kv_idx] ** 2 + 0.1
    t = row.root(lambda t: row.sum(g * ac.relu(z - t) ** 2) - tau[h] ** 2, top - 5 - 5 * tau[h] ** 2, top)
    return g * ac.relu(z - t) ** 2


def held_back(score, row):
    p = score**3
    return p / ac.maximum(ac.detach(ac.abs(row.sum(p))), 1)


def half_held_back(score, row):
    p = ac.exp(score - ac.detach(row.max(score)))
    return p / (row.sum(p) + 1)


def held_sink(score, row, h, sink):
    p = ac.exp(score - row.max(score))
    return p / (row.sum(p) + ac.detach(row.sum(p)) * ac.exp(sink[h]))


def not_less_than_one(score, row):
    p = score**3
    return p / ac.maximum(ac.abs(row.sum(p)), 1)


#: what nobody ships
UNSHIPPED = {
    "unit_length": ac.Variant(normalizer=unit_length, mask=ac.causal),
    "squares": ac.Variant(normalizer=squares, mask=ac.causal),
    "doubled": ac.Variant(normalizer=doubled, mask=ac.window(3, 1)),
    "beside_a_sink": ac.Variant(
        normalizer=beside_a_sink, mask=ac.causal, inputs={"sink": ac.Input("h", grad=True)}, score=ac.softcap(3.0)
    ),
    "gated": ac.Variant(normalizer=gated, mask=ac.causal, inputs={"gate": ac.Input("b", "kv_idx", grad=True)}),
    "two_sums": ac.Variant(normalizer=two_sums, mask=ac.causal | ac.prefix(2)),
    "softplus_mean": ac.Variant(normalizer=softplus_mean, mask=ac.causal, score=ac.alibi()),
    "weighed_values": ac.Variant(
        reduction=lambda weight, v_vec, row, kv_idx: row.sum(weight / (1 + kv_idx) * v_vec), mask=ac.causal
    ),
    "by_head": ac.Variant(score=lambda score, h, kv_len: score * (1 + h) / kv_len, mask=ac.causal),
    "below_the_largest": ac.Variant(normalizer=below_the_largest, mask=ac.causal),
    "over_the_largest": ac.Variant(normalizer=over_the_largest, mask=ac.causal),
    "above_the_mean": ac.Variant(normalizer=above_the_mean, mask=ac.causal),
    "standardized": ac.Variant(normalizer=standardized, mask=ac.causal),
    "from_least_to_largest": ac.Variant(normalizer=from_least_to_largest, mask=ac.causal),
    "kept_probabilities": ac.Variant(normalizer=kept_probabilities, mask=ac.causal, score=ac.alibi()),
    "two_roots": ac.Variant(normalizer=two_roots, mask=ac.causal),
    "weighed_root": ac.Variant(
        normalizer=weighed_root,
        mask=ac.causal,
        inputs={"tau": ac.Input("h", grad=True), "gate": ac.Input("b", "kv_idx", grad=True)},
    ),
    "held_back": ac.Variant(normalizer=held_back, mask=ac.causal),
    "half_held_back": ac.Variant(normalizer=half_held_back, mask=ac.causal),
    "held_sink": ac.Variant(normalizer=held_sink, mask=ac.causal, inputs={"sink": ac.Input("h", grad=True)}),
    "not_less_than_one": ac.Variant(normalizer=not_less_than_one, mask=ac.causal),
    "learned_gain": ac.Variant(
        score=lambda score, h, gain: score * gain[h] + gain[h] ** 2, inputs={"gain": ac.Input("h", grad=True)}
    ),
}


#: what ships; of several branches, each is a variant here, what v is matters to no pass, and column sums are inputs
SHIPPED = {
    part.name: ac.Variant.from_graph(without_running_sums(part))
    for name in ac.variants.names()
    for part in ac.variants.get(name).graph.parts
    if part.value is None and not part.cols
}
NAMES = (*SHIPPED, *UNSHIPPED)


def variant(name: str | ac.Variant) -> ac.Variant:
    """Shipped or not, or as it is."""
    if isinstance(name, ac.Variant):
        return name
    return {**SHIPPED, **UNSHIPPED}[name]


class Pairs:
    """The values of one call on all pairs (B, H, M, N); keys and values are repeated for the heads that share them."""

    def __init__(self, graph: VariantGraph, sample: Sample):
        q, k, v = sample.q, sample.k, sample.v
        batch, heads, q_len, d_qk = q.shape
        self.group, kv_len = heads // k.shape[1], k.shape[2]
        self.shape = (batch, heads, q_len, kv_len)
        self.q, self.k, self.v = q, k.repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1)
        axes = {name: self._axis(i) for i, name in enumerate(("b", "h", "q_idx", "kv_idx"))}
        self.env: dict[str, Any] = {
            **axes,
            "h_kv": axes["h"] // self.group,
            "q_len": q_len,
            "kv_len": kv_len,
            "num_heads": heads,
            "scale": d_qk**-0.5,
            "qk": q @ self.k.mT,
            **sample.inputs,
        }
        found = similarity(graph)
        #: sums over the head dimension by the names that kernels know them by
        self.sums: dict[str, Tensor] = {}
        for term in found.q_terms:
            self.sums[term.name] = self._sum_d(term.summand)[:, :, :, 0]
        for term in found.k_terms:
            self.sums[term.name] = self._sum_d(term.summand)[:, :: 1 if H in term.read.index else self.group, 0]
        for dot in found.dots:
            self.sums[dot.name] = self._sum_d(dot.left * dot.right)
        for loop in found.loops:
            self.sums[loop.name] = self._sum_d(loop.summand)
        self.env |= {name: x.detach() for name, x in self.sums.items()}
        graph = found.core
        for stage in ("raw_score", "score"):
            self.env[stage] = self(graph[stage].expr)
        self.visible = self(graph["mask"].expr)

    def _sum_d(self, summand: sympy.Expr) -> Tensor:
        """(B, H, M, N), of which a term has size 1 where it is the same"""
        vectors = (
            {"q_vec": self.q[..., d].unsqueeze(3), "k_vec": self.k[..., d].unsqueeze(2), "d_idx": d}
            for d in range(self.q.shape[3])
        )
        parts = [torch.atleast_1d(evaluate(summand, {**self.env, **v})) for v in vectors]
        own = level(summand)
        m, n = 1 if own == Level.COL else self.shape[2], 1 if own == Level.ROW else self.shape[3]
        return sum(p.expand(*self.shape[:2], m, n) for p in parts)

    def _axis(self, axis: int) -> Tensor:
        return torch.arange(self.shape[axis]).reshape([self.shape[axis] if a == axis else 1 for a in range(4)])

    def __call__(self, expr: Any, **more: Any) -> Tensor:
        """(B, H, M, N)"""
        return evaluate(expr, {**self.env, **more}).expand(self.shape)

    def rows(self, expr: Any, rows: dict[str, Tensor]) -> Tensor:
        """(B, H, M, 1), from row values alone"""
        return evaluate(expr, {**self.env, **rows}).expand(*self.shape[:3], 1)

    def accumulate(self, online: Online, among: Tensor | None = None) -> dict[str, Tensor]:
        """Maxima and accumulators (B, H, M, 1) over the visible keys `among`; that of the output is (B, H, M, Dv)."""
        known: dict[str, Tensor] = {}
        for sweep in online.before:  # these are of all keys, whatever part of them the last pass has
            known |= self._maxima(sweep.maxes, self.visible, known)
            for running in sweep.sums:
                known[running.symbol.name] = self._sum(running.term, self.visible, known)
            if sweep.root is not None:
                known[sweep.root.symbol.name] = self._root(sweep.root, known)
        seen = self.visible if among is None else self.visible & among
        found = self._maxima(online.maxes, seen, known)
        values = {**known, **found}
        for running in online.sums:
            found[running.symbol.name] = self._sum(running.term, seen, values)
        term = torch.where(seen, self(online.numerator.term, **values).double(), 0.0)
        return {**known, **found, online.numerator.symbol.name: term @ self.v}

    def _maxima(self, maxes: Any, seen: Tensor, known: dict[str, Tensor]) -> dict[str, Tensor]:
        return {m.name: torch.where(seen, self(g, **known), -torch.inf).amax(-1, keepdim=True) for m, g in maxes}

    def attained(self, online: Online, known: dict[str, Tensor]) -> dict[str, Tensor]:
        """Where each maximum is first, and how many keys attain it."""
        found = {}
        for m, g in [pair for step in (*online.before, online) for pair in step.maxes]:
            attains = (torch.where(self.visible, self(g, **known), -torch.inf) == known[m.name]).double()
            found[first_at(m).name] = attains.argmax(-1, keepdim=True).double()
            found[ties(m).name] = attains.sum(-1, keepdim=True)
        return found

    def _sum(self, term: Any, seen: Tensor, known: dict[str, Tensor]) -> Tensor:
        return torch.where(seen, self(term, **known).double(), 0.0).sum(-1, keepdim=True)

    def _root(self, root: Implicit, known: dict[str, Tensor]) -> Tensor:
        """By bisection of a falling sum."""
        low, high = self.rows(root.lo, known).double(), self.rows(root.hi, known).double()
        for _ in range(100):
            at = {**known, UNKNOWN.name: (low + high) / 2}
            above = self._sum(root.term, self.visible, at) + self.rows(root.rest, at) > 0
            low, high = torch.where(above, at[UNKNOWN.name], low), torch.where(above, high, at[UNKNOWN.name])
        return (low + high) / 2

    def merged(self, online: Online, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Partial results over different keys as one, by the derived factors."""
        before = {name: value for name, value in parts[0].items() if name not in online.merge()}
        maxima = {m.name: functools.reduce(torch.maximum, (p[m.name] for p in parts)) for m in online.max_symbols}
        moved = {f"{name}_new": value for name, value in maxima.items()}
        result = {**before, **maxima}
        for name, factor in online.merge().items():
            result[name] = sum(evaluate(factor, {**self.env, **part, **moved}) * part[name] for part in parts)
        return result


def gradient(pairs: Pairs, read: sympy.Basic, cotangent: Tensor, like: Tensor) -> Tensor:
    """The cotangents (B, H, M, N or 1) of an element read, added up where they belong in the input."""
    result = torch.zeros_like(like)
    index = [evaluate(i, pairs.env).expand(*pairs.shape[:3], cotangent.shape[-1]) for i in read.index]
    if not index:
        return cotangent.sum()
    inside = functools.reduce(
        torch.logical_and, ((i >= 0) & (i < size) for i, size in zip(index, like.shape, strict=True))
    )
    return result.index_put(tuple(i[inside] for i in index), cotangent[inside], accumulate=True)
