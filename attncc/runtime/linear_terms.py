"""Sums over the head dimension that are factors of tokens in a chunk plan: O(N) values, computed in PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attncc.ir import symbols as sym
from attncc.ir.graph import VariantGraph
from attncc.passes.similarity import similarity
from attncc.runtime.closures import closure
from attncc.runtime.shapes import Bound


class TokenTerms:
    """The terms of one variant's similarity, such as |q|^2, each with a value for each token and head."""

    def __init__(self, graph: VariantGraph):
        found = similarity(graph)
        #: the variant that reads them as inputs
        self.core = found.core
        self._terms = [
            (term.name, closure(term.summand), of_query)
            for terms, of_query in ((found.q_terms, True), (found.k_terms, False))
            for term in terms
        ]

    @property
    def names(self) -> tuple[str, ...]:
        """The terms, as inputs of the core are named."""
        return tuple(name for name, _, _ in self._terms)

    @property
    def sources(self) -> dict[str, str]:
        """Of which vectors each term is: "q" or "k"."""
        return {name: "q" if of_query else "k" for name, _, of_query in self._terms}

    def join(self, bound: Bound, q: Tensor, k: Tensor) -> Bound:
        """The call with its terms among the inputs: float32 (B, H, M), and (B, H or Hkv, N)."""
        own: dict[str, Any] = {}
        for name, function, of_query in self._terms:
            x = q if of_query else k
            named = {(sym.Q_VEC if of_query else sym.K_VEC).name: x.float(), "scale": bound.scale, **bound.scalars}
            value = function(named)
            value = value if isinstance(value, Tensor) else torch.full_like(x, float(value), dtype=torch.float32)
            own[name] = value.sum(-1)
        return replace(bound, tensors={**bound.tensors, **own}) if own else bound
