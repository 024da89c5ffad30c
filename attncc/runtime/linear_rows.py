"""The factors of tokens that a chunk plan reads besides q, k and v, computed in PyTorch: float32 per token and head.

Values of size (B, H, L) are computed here, and autograd passes their gradients to the inputs; values with a head
dimension are computed by the kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from attncc.ir.graph import LOOP_DIMS, VariantGraph
from attncc.ir.symbols import COMPONENT, K_VEC, KV_IDX, KV_LEN, Q_VEC
from attncc.ir.text import formula
from attncc.ir.vocabulary import Read, cumsum
from attncc.passes.linearize import TOTAL, Linear
from attncc.runtime.closures import Function, closure
from attncc.runtime.shapes import Bound

_AXES = {"b": 0, "h": 1, "h_kv": 1, "q_idx": 2, "kv_idx": 2, "place": 2, "d": 3}
#: where a token stands in its own sequence: kv_idx, but for an index into a tensor in which sequences are packed
_PLACE = sympy.Symbol("place", integer=True, nonnegative=True)
#: factors of queries; the others are of keys
_OF_QUERIES = ("row", "alpha", "gain")
#: those of the channels of a token's own product
_OF_CHANNELS = ("diagonal", "own_factor")


@dataclass(frozen=True)
class _View:
    """A read of every token and head at once, as the value of `symbol`: the input permuted, with sizes of 1 between.

    order: its dimensions as (B, H, L) has them, None where they are so; missing: whether it has none of each of these;
    by_kv_head: it has an entry a key head.
    """

    symbol: str
    input: str
    order: tuple[int, ...] | None
    missing: tuple[bool, ...]
    by_kv_head: bool


@dataclass(frozen=True)
class _Row:
    """One factor: a function of views, indices, lengths and (where an index is computed) whole inputs.

    side: q_idx or kv_idx, whose tokens it is of; by_channel: (B, H, L, D); given: it is one view as it stands.
    """

    name: str
    side: str
    by_channel: bool
    given: bool
    function: Function
    views: tuple[_View, ...]
    indices: tuple[str, ...]
    whole: tuple[str, ...]


class TokenRows:
    """The factors of one plan: made once, computed at each call."""

    def __init__(
        self,
        graph: VariantGraph,
        plan: Linear,
        exprs: Mapping[str, sympy.Expr | None] | None = None,
        short: bool = False,
    ):
        """`exprs`: the formulas, where they are not the plan's own. short: steps that are alike are one, (B, H, 1)."""
        exprs = row_exprs(plan) if exprs is None else exprs
        self._causal = plan.causal
        self._short = short and plan.alike
        self._patterns = {d.name: d.pattern for d in graph.inputs}
        self._exprs = {name: expr for name, expr in exprs.items() if expr is not None}
        self._rows = tuple(self._row(name, expr) for name, expr in self._exprs.items())
        self._constant = closure(plan.constant)
        self._scale, self._slope = closure(plan.scale), closure(sympy.diff(plan.scale, TOTAL) / plan.scale)
        #: the factors that there are, in the order in which they are handed on
        self.names = tuple(row.name for row in self._rows)

    def constant(self, bound: Bound) -> float:
        """The factor that is one number for the whole call."""
        return float(self._constant(numbers(bound)))

    def tokens(
        self,
        bound: Bound,
        device: torch.device,
        known: Mapping[str, Tensor] | None = None,
        places: Tensor | None = None,
    ) -> list[Tensor]:
        """The factors of a call in the order of `names`: (B, H, L) float32, contiguous, or (B, H, L, D) as given; steps
        that are alike (B, H, 1), where that is asked for, and factors of a token's own product, with sizes of 1 where
        they are the same.

        known: what else the formulas name, in the same shapes; places: where tokens of packed sequences stand, (L).
        """
        return [self._value(row, bound, device, known or {}, places) for row in self._rows]

    def beyond(self, with_state: bool, placed: bool) -> str | None:
        """What the factors read that a part of a sequence, or one of several that are packed, does not have, if
        anything. with_state: tokens came before the call; placed: it is known how many."""
        for name, expr in self._exprs.items():
            if KV_LEN in expr.free_symbols:
                return f"'{formula(expr)}' reads the length of the sequence"
            if expr.atoms(cumsum):
                return f"'{formula(expr)}' sums along the tokens"
            reads: dict[Any, Any] = {r: sympy.Dummy("read") for r in expr.atoms(Read)}
            others = [i for r in reads for i in r.index if KV_IDX in i.free_symbols and i != KV_IDX]
            # a step of the first token is of what comes in
            if others and (name != "step" or with_state):
                return f"'{formula(expr)}' reads what belongs to another token"
            if with_state and not placed and KV_IDX in expr.xreplace(reads).free_symbols:
                return f"'{formula(expr)}' is of the position of a token"
        return None

    def weight_and_slope(self, total: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor]:
        """The factor of the sum of weighted values, and the derivative of its logarithm by the row's total."""
        env = {TOTAL.name: total}
        weight: Tensor = self._scale(env)
        return weight if gain is None else weight * gain, self._slope(env)

    def _row(self, name: str, expr: Any) -> _Row:
        views: dict[Any, _View] = {}
        side = "q_idx" if name in _OF_QUERIES and not self._causal else "kv_idx"
        by_channel = bool({COMPONENT, Q_VEC, K_VEC} & expr.free_symbols)
        for i, read in enumerate(sorted(expr.atoms(Read), key=str)):
            view = self._view(f"read_{i}", read, side, 4 if by_channel else 3)
            if view is not None:
                views[read] = view
        expr = expr.xreplace({read: sympy.Symbol(view.symbol, real=True) for read, view in views.items()})
        if self._causal:
            reads: dict[Any, Any] = {read: sympy.Dummy("read") for read in expr.atoms(Read)}
            back = {dummy: read for read, dummy in reads.items()}
            expr = expr.xreplace(reads).xreplace({KV_IDX: _PLACE}).xreplace(back)
        used = {s.name for s in expr.free_symbols}
        indices, whole = tuple(sorted(used & set(_AXES))), tuple(sorted(used & set(self._patterns)))
        given = by_channel and expr.is_Symbol
        return _Row(name, side, by_channel, given, closure(expr), tuple(views.values()), indices, whole)

    def _view(self, symbol: str, read: Read, side: str, dims: int) -> _View | None:
        """None where an index is computed, or a dimension is none of a token's."""
        # where the mask is causal, queries and keys are the same tokens
        pattern = [side if d == "q_idx" and self._causal else d for d in self._patterns[read.input]]
        names = ["d" if i == COMPONENT else i.name if isinstance(i, sympy.Symbol) else "" for i in read.index]
        plain = names == pattern
        if not plain or not set(pattern) <= set(_AXES) or len({_AXES[d] for d in pattern}) < len(pattern):
            return None
        order = sorted(range(len(pattern)), key=lambda i: _AXES[pattern[i]])
        axes = {_AXES[d] for d in pattern}
        missing = tuple(axis not in axes for axis in range(dims))
        kept = None if order == sorted(order) else tuple(order)
        return _View(symbol, read.input, kept, missing, "h_kv" in pattern)

    def _value(
        self,
        row: _Row,
        bound: Bound,
        device: torch.device,
        known: Mapping[str, Tensor],
        places: Tensor | None,
    ) -> Tensor:
        sizes = bound.sizes
        length = 1 if self._short and row.name == "step" else sizes[row.side]
        shape: tuple[int, ...] = (sizes["b"], sizes["h"], length)
        shape = (*shape, sizes["d_qk"]) if row.by_channel else shape
        env: dict[str, Any] = {**numbers(bound), **known}
        for view in row.views:
            env[view.symbol] = _viewed(view, bound, row.by_channel)
        for name in row.whole:
            tensor = bound.tensors[name]
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            env[name] = tensor.expand([sizes[d] if d in LOOP_DIMS else -1 for d in self._patterns[name]])
        for name in row.indices:
            index = torch.arange(shape[_AXES[name]], device=device)
            index = places if name == "place" and places is not None else index
            index = index // (sizes["h"] // sizes["h_kv"]) if name == "h_kv" else index
            env[name] = index.reshape([-1 if axis == _AXES[name] else 1 for axis in range(len(shape))])
        value = row.function(env)
        if not isinstance(value, Tensor):
            return torch.full(shape, float(value), dtype=torch.float32, device=device)
        if row.name in _OF_CHANNELS or (self._short and row.name == "step"):
            value = value if row.given else value.float()
            return value if row.name == "step" or value.stride(3) == 1 else value.contiguous()
        value = value if tuple(value.shape) == shape else value.expand(shape)
        if row.given:  # as large as k: read where it lies
            return value if value.stride(-1) == 1 else value.contiguous()
        return value.float().contiguous()


def row_exprs(plan: Linear) -> dict[str, sympy.Expr | None]:
    """Each factor's formula, None where it is 1 or is not there."""
    alpha, beta = plan.bias or (None, None)
    factor, weight = plan.product or (None, None)
    return {
        "row": None if plan.row == 1 else plan.row,
        "col": None if plan.col == 1 else plan.col,
        "alpha": alpha,
        "beta": beta,
        "gain": None if plan.gain == 1 else plan.gain,
        "step": plan.step,
        "diagonal": None if plan.diagonal in (None, 1) else plan.diagonal,
        "own_factor": None if factor == 1 else factor,
        "own_weight": None if weight == 1 else weight,
    }


def numbers(bound: Bound) -> dict[str, Any]:
    """The values that are numbers of the whole call, by their names in a formula."""
    sizes = bound.sizes
    return {
        "scale": bound.scale,
        "q_len": sizes["q_idx"],
        "kv_len": sizes["kv_idx"],
        "num_heads": sizes["h"],
        **bound.scalars,
    }


def _viewed(view: _View, bound: Bound, by_channel: bool) -> Tensor:
    """(B | 1, H | 1, L | 1), and D | 1 where channels have their own."""
    tensor = bound.tensors[view.input]
    tensor = tensor if view.order is None else tensor.permute(view.order)
    tensor = tensor.float() if tensor.is_floating_point() and not by_channel else tensor
    if any(view.missing):  # in one step: a replay repeats each
        own = iter(tensor.shape)
        tensor = tensor.view([1 if missing else next(own) for missing in view.missing])
    if view.by_kv_head and tensor.shape[1] > 1:
        return tensor.repeat_interleave(bound.sizes["h"] // bound.sizes["h_kv"], 1)
    return tensor
