"""Factors of tokens, in PyTorch: what a chunk plan reads of a call besides q, k and v, one float32 a token and head.

All that is as small as (B, H, L) is computed here, and autograd takes its gradient on to the inputs; all that has a
head dimension is the kernels'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from attncc.ir.graph import LOOP_DIMS, VariantGraph
from attncc.ir.symbols import COMPONENT
from attncc.ir.vocabulary import Read
from attncc.passes.linearize import TOTAL, Linear
from attncc.runtime.closures import Function, closure
from attncc.runtime.shapes import Bound

_AXES = {"b": 0, "h": 1, "h_kv": 1, "kv_idx": 2, "d": 3}


@dataclass(frozen=True)
class _View:
    """A read of every token and head at once, as the value of `symbol`: the input permuted, with sizes of 1 between.

    order: its dimensions as (B, H, L) has them; axes: which of these they are; kv: the dimension of key heads, or None.
    """

    symbol: str
    input: str
    order: tuple[int, ...]
    axes: tuple[int, ...]
    kv: int | None


@dataclass(frozen=True)
class _Row:
    """One factor: a function of views, indices, lengths and (where an index is computed) whole inputs.

    dims: 3, or 4 where each channel has its own; given: it is one view as it stands.
    """

    name: str
    dims: int
    given: bool
    function: Function
    views: tuple[_View, ...]
    indices: tuple[str, ...]
    whole: tuple[str, ...]


class TokenRows:
    """The factors of one plan: made once, computed at each call."""

    def __init__(self, graph: VariantGraph, plan: Linear):
        self._patterns = {d.name: d.pattern for d in graph.inputs}
        self._rows = tuple(self._row(name, expr) for name, expr in row_exprs(plan).items() if expr is not None)
        self._constant = closure(plan.constant)
        self._scale, self._slope = closure(plan.scale), closure(sympy.diff(plan.scale, TOTAL) / plan.scale)
        #: the factors that there are, in the order in which they are handed on
        self.names = tuple(row.name for row in self._rows)

    def constant(self, bound: Bound) -> float:
        """The factor that is one number for the whole call."""
        return float(self._constant(_numbers(bound)))

    def tokens(self, bound: Bound, device: torch.device) -> list[Tensor]:
        """The factors of a call in the order of `names`: (B, H, L) float32, contiguous, or (B, H, L, D) as given."""
        return [self._value(row, bound, device) for row in self._rows]

    def weight_and_slope(self, total: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor]:
        """What a sum of weighted values is multiplied by, and the derivative of its logarithm by the row's total."""
        env = {TOTAL.name: total}
        weight: Tensor = self._scale(env)
        return weight if gain is None else weight * gain, self._slope(env)

    def _row(self, name: str, expr: Any) -> _Row:
        views: dict[Any, _View] = {}
        by_channel = COMPONENT in expr.free_symbols
        for i, read in enumerate(sorted(expr.atoms(Read), key=str)):
            view = self._view(f"read_{i}", read)
            if view is not None:
                views[read] = view
        expr = expr.xreplace({read: sympy.Symbol(view.symbol, real=True) for read, view in views.items()})
        used = {s.name for s in expr.free_symbols}
        indices, whole = tuple(sorted(used & set(_AXES))), tuple(sorted(used & set(self._patterns)))
        dims = 4 if by_channel else 3
        return _Row(name, dims, expr.is_Symbol and dims == 4, closure(expr), tuple(views.values()), indices, whole)

    def _view(self, symbol: str, read: Read) -> _View | None:
        """None where an index is computed, or a dimension is none of a token's."""
        # queries and keys are the same tokens
        pattern = ["kv_idx" if d == "q_idx" else d for d in self._patterns[read.input]]
        names = ["d" if i == COMPONENT else i.name if isinstance(i, sympy.Symbol) else "" for i in read.index]
        plain = names == pattern
        if not plain or not set(pattern) <= set(_AXES) or len({_AXES[d] for d in pattern}) < len(pattern):
            return None
        order = sorted(range(len(pattern)), key=lambda i: _AXES[pattern[i]])
        axes = tuple(_AXES[pattern[i]] for i in order)
        return _View(symbol, read.input, tuple(order), axes, 1 if "h_kv" in pattern else None)

    def _value(self, row: _Row, bound: Bound, device: torch.device) -> Tensor:
        sizes = bound.sizes
        shape = (sizes["b"], sizes["h"], sizes["kv_idx"], sizes["d_qk"])[: row.dims]
        env: dict[str, Any] = _numbers(bound)
        for view in row.views:
            env[view.symbol] = _viewed(view, bound, row.dims)
        for name in row.whole:
            tensor = bound.tensors[name]
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            env[name] = tensor.expand([sizes[d] if d in LOOP_DIMS else -1 for d in self._patterns[name]])
        for name in row.indices:
            index = torch.arange(shape[_AXES[name]], device=device)
            index = index // (sizes["h"] // sizes["h_kv"]) if name == "h_kv" else index
            env[name] = index.reshape([-1 if axis == _AXES[name] else 1 for axis in range(row.dims)])
        value = row.function(env)
        if not isinstance(value, Tensor):
            return torch.full(shape, float(value), dtype=torch.float32, device=device)
        if row.given:  # as large as k: read where it lies
            return value.expand(shape) if value.stride(-1) == 1 else value.expand(shape).contiguous()
        return value.float().expand(shape).contiguous()


def row_exprs(plan: Linear) -> dict[str, sympy.Expr | None]:
    """Each factor's formula, None where it is 1 or is not there."""
    alpha, beta = plan.bias or (None, None)
    return {
        "row": None if plan.row == 1 else plan.row,
        "col": None if plan.col == 1 else plan.col,
        "alpha": alpha,
        "beta": beta,
        "gain": None if plan.gain == 1 else plan.gain,
        "step": plan.step,
    }


def _numbers(bound: Bound) -> dict[str, Any]:
    sizes = bound.sizes
    return {
        "scale": bound.scale,
        "q_len": sizes["q_idx"],
        "kv_len": sizes["kv_idx"],
        "num_heads": sizes["h"],
        **bound.scalars,
    }


def _viewed(view: _View, bound: Bound, dims: int) -> Tensor:
    """(B | 1, H | 1, L | 1), and D | 1 where there are four dimensions."""
    tensor = bound.tensors[view.input].permute(view.order)
    tensor = tensor.float() if tensor.is_floating_point() and dims == 3 else tensor
    for axis in range(dims):
        tensor = tensor if axis in view.axes else tensor.unsqueeze(axis)
    if view.kv is not None and tensor.shape[1] > 1:
        return tensor.repeat_interleave(bound.sizes["h"] // bound.sizes["h_kv"], 1)
    return tensor
