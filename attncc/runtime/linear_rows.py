"""Factors of tokens, in PyTorch: what a chunk plan reads of a call besides q, k and v, one float32 a token and head.

All that is as small as (B, H, L) is evaluated here, and autograd takes its gradient on to the inputs; all that has a
head dimension is the kernels'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor

from attncc.ir.graph import LOOP_DIMS, VariantGraph
from attncc.ir.vocabulary import Read
from attncc.passes.linearize import TOTAL, Linear
from attncc.runtime.evaluate import evaluate
from attncc.runtime.shapes import Bound

_AXES = {"b": 0, "h": 1, "h_kv": 1, "kv_idx": 2}


def row_names(plan: Linear) -> tuple[str, ...]:
    """The factors that a plan has, in the order in which they are handed on."""
    return tuple(name for name, expr in row_exprs(plan).items() if expr is not None)


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


def token_rows(graph: VariantGraph, plan: Linear, bound: Bound, device: torch.device) -> list[Tensor]:
    """The factors of a call, each (B, H, L) and contiguous, in the order of `row_names`."""
    exprs = row_exprs(plan)
    return [_row(graph, exprs[name], bound, device) for name in row_names(plan)]


def constant_of(plan: Linear, bound: Bound) -> float:
    """The factor that is one number for the whole call."""
    return float(evaluate(plan.constant, {**_numbers(bound)}, torch.float64))


def weight_and_slope(plan: Linear, total: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a sum of weighted values is multiplied by, and the derivative of its logarithm by the row's total."""
    env = {TOTAL.name: total}
    weight = evaluate(plan.scale, env, torch.float32, total.device)
    slope = evaluate(sympy.diff(plan.scale, TOTAL) / plan.scale, env, torch.float32, total.device)
    return weight if gain is None else weight * gain, slope


def _numbers(bound: Bound) -> dict[str, Any]:
    sizes = bound.sizes
    return {
        "scale": bound.scale,
        "q_len": sizes["q_idx"],
        "kv_len": sizes["kv_idx"],
        "num_heads": sizes["h"],
        **bound.scalars,
    }


def _row(graph: VariantGraph, expr: Any, bound: Bound, device: torch.device) -> Tensor:
    sizes = bound.sizes
    shape = (sizes["b"], sizes["h"], sizes["kv_idx"])
    env: dict[str, Any] = _numbers(bound)
    used = {s.name for s in expr.free_symbols}
    plain: dict[Any, Any] = {}
    for i, read in enumerate(sorted(expr.atoms(Read), key=str)):
        value = _whole(graph, read, bound)
        if value is not None:
            symbol = sympy.Symbol(f"read_{i}", real=True)
            plain[read], env[symbol.name] = symbol, value
    expr = expr.xreplace(plain)
    for decl in graph.inputs:
        if decl.name in used:
            tensor = bound.tensors[decl.name]
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            env[decl.name] = tensor.expand([sizes[d] if d in LOOP_DIMS else -1 for d in decl.pattern])
    for name in used & set(_AXES):
        index = torch.arange(shape[_AXES[name]], device=device)
        index = index // (sizes["h"] // sizes["h_kv"]) if name == "h_kv" else index
        env[name] = index.reshape([-1 if axis == _AXES[name] else 1 for axis in range(3)])
    return evaluate(expr, env, torch.float32, device).float().expand(shape).contiguous()


def _whole(graph: VariantGraph, read: Read, bound: Bound) -> Tensor | None:
    """A read of every token and head at once, as a view (B | 1, H | 1, L | 1); None where an index is computed."""
    if not all(isinstance(i, sympy.Symbol) and i.name in _AXES for i in read.index):
        return None
    pattern = graph.input(read.input).pattern
    axes = [_AXES[i.name] for i in read.index]
    if len(set(axes)) < len(axes) or any(i.name != d for i, d in zip(read.index, pattern, strict=True)):
        return None
    tensor = bound.tensors[read.input]
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    if "h_kv" in pattern and tensor.shape[pattern.index("h_kv")] > 1:
        group = bound.sizes["h"] // bound.sizes["h_kv"]
        tensor = tensor.repeat_interleave(group, pattern.index("h_kv")) if group > 1 else tensor
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    tensor = tensor.permute(order)
    sizes: Mapping[int, int] = {axes[i]: n for i, n in zip(order, tensor.shape, strict=True)}
    return tensor.reshape([sizes.get(axis, 1) for axis in range(3)])
