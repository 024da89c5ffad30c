"""Evaluate a graph's mask and indices at small sizes, for checks that need an example of a hidden row or a bad read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import sympy

from attncc.ir import symbols as sym
from attncc.ir.graph import LOOP_DIMS, InputDecl, VariantGraph
from attncc.ir.vocabulary import Read
from attncc.passes.numeric import evaluate

_BATCH, _HEADS, _KV_HEADS = 2, 4, 2
_FREE = 32
#: all lengths up to this are tried, and lengths around the mask's constants
_SMALL = 6
_LARGE = 1 << 16
#: the most pairs of one trial; longer sequences use a sample of rows
_PAIRS = 1 << 21
#: the contents of inputs: ids along the sequence (for lengths, all keys), random values, zeros
_FILLS = ("typical", "random", "zero")


def hidden_row(graph: VariantGraph, more_queries: bool) -> str | None:
    """The smallest example of a query that sees no key, as text; None if none was found.

    A query that is hidden by a condition on itself, such as a closed gate, is meant to see none, and is no example."""
    terms = sympy.And.make_args(graph["mask"].expr)
    mask = sympy.And(*(t for t in terms if sym.KV_IDX in t.free_symbols))
    own = sympy.And(*(t for t in terms if sym.KV_IDX not in t.free_symbols))
    if mask is sympy.true:
        return None
    for q_len, kv_len in _lengths(graph, more_queries):
        for fill in _FILLS if mask.atoms(Read) else _FILLS[:1]:
            env = _environment(graph, q_len, kv_len, fill)
            rows = _rows(q_len, kv_len)
            shape = (_BATCH, _HEADS, len(rows), kv_len)
            at = {**env, "q_idx": rows[:, None]}
            shown = np.broadcast_to(evaluate(mask, at) | ~evaluate(own, at), shape).any(-1)
            if not shown.all():
                b, h, row = np.unravel_index(int(np.argmin(shown)), shown.shape)
                return f"{_words(graph, env, fill, int(b), int(h))}q_len={q_len}, kv_len={kv_len}, q_idx={rows[row]}"
    return None


def reads_outside(graph: VariantGraph) -> Iterator[tuple[Read, Literal["warning", "note"], str]]:
    """Reads outside of an input at visible pairs, and the sizes that free dimensions need: (read, level, text)."""
    for read in graph.reads:
        decl = graph.input(read.input)
        for number, (dim, index) in enumerate(zip(decl.pattern, read.index, strict=True)):
            if not index.free_symbols <= _known_symbols(graph):
                continue
            found = _loop_dim(graph, decl, number, index) if dim in LOOP_DIMS else _free_dim(graph, dim, index)
            if found is not None:
                yield read, *found
                break


def _loop_dim(
    graph: VariantGraph, decl: InputDecl, number: int, index: sympy.Expr
) -> tuple[Literal["warning", "note"], str] | None:
    dim = decl.pattern[number]
    if index == sym.INDICES[dim]:
        return None
    levels: tuple[tuple[tuple[int, int], Literal["warning", "note"]], ...] = (
        ((4, 4), "warning"),
        ((3, 6), "warning"),
        ((6, 3), "note"),
    )
    for (q_len, kv_len), level in levels:
        size = _sizes(q_len, kv_len)[dim]
        lo, hi = _range_on_visible(graph, index, q_len, kv_len)
        if lo < 0 or hi >= size:
            outside = lo if lo < 0 else hi
            return level, f"dimension '{dim}' of size {size} is read at {outside} (q_len={q_len}, kv_len={kv_len})"
    return None


def _free_dim(graph: VariantGraph, dim: str, index: sympy.Expr) -> tuple[Literal["warning", "note"], str] | None:
    (lo, hi), (_, longer) = (_range_on_visible(graph, index, n, n) for n in (256, 512))
    if hi < lo:
        return None  # no pair is visible
    if lo < 0:
        return "warning", f"dimension '{dim}' is read at negative indices (q_len=kv_len=256: from {lo})"
    if longer > hi:
        return "note", f"dimension '{dim}' is read at indices that grow with the sequence (256 tokens: up to {hi})"
    return "note", f"dimension '{dim}' is read at 0 to {longer}: give it {longer + 1} entries"


def _range_on_visible(graph: VariantGraph, index: sympy.Expr, q_len: int, kv_len: int) -> tuple[int, int]:
    """The least and the largest index over the visible pairs; (0, -1) if there are none."""
    env = {**_environment(graph, q_len, kv_len, "typical"), "q_idx": np.arange(q_len)[:, None]}
    shape = (_BATCH, _HEADS, q_len, kv_len)
    shown = np.broadcast_to(evaluate(graph["mask"].expr, env), shape)
    values = np.broadcast_to(evaluate(index, env), shape)[shown]
    return (int(values.min()), int(values.max())) if values.size else (0, -1)


def _known_symbols(graph: VariantGraph) -> set[Any]:
    inputs = {sym.input_symbol(d.name, d.dtype == "int") for d in graph.inputs}
    scalars = {sym.scalar_symbol(s.name, s.is_int) for s in graph.scalars}
    return {*sym.INDICES.values(), *inputs, *scalars}


def _lengths(graph: VariantGraph, more_queries: bool) -> list[tuple[int, int]]:
    """Pairs (q_len, kv_len) to try, the smallest first."""
    numbers = {abs(int(n)) for n in graph["mask"].expr.atoms(sympy.Integer)}
    names = {s.name for s in graph["mask"].expr.free_symbols}
    numbers |= {abs(int(s.default)) for s in graph.scalars if s.name in names}
    around = {m for n in numbers for m in (n - 1, n, n + 1, 2 * n + 3) if _SMALL < m <= _LARGE}
    lengths = sorted({*range(1, _SMALL + 1), *around})
    pairs = [(m, n) for m in lengths for n in lengths if (m > n) == more_queries]
    return sorted(pairs, key=lambda p: (max(p), min(p), p))


def _rows(q_len: int, kv_len: int) -> np.ndarray:
    """All rows, or a sample that holds the ends and the middle."""
    count = max(_PAIRS // (kv_len * _BATCH * _HEADS), 8)
    return np.unique(np.linspace(0, q_len - 1, min(q_len, count)).astype(np.int64))


def _sizes(q_len: int, kv_len: int) -> dict[str, int]:
    return {"b": _BATCH, "h": _HEADS, "h_kv": _KV_HEADS, "q_idx": q_len, "kv_idx": kv_len}


def _environment(graph: VariantGraph, q_len: int, kv_len: int, fill: str) -> dict[str, Any]:
    """Indices on four axes (b, h, q_idx, kv_idx), lengths, scalars at their defaults, and inputs."""
    sizes = _sizes(q_len, kv_len)
    heads = np.arange(_HEADS)[:, None, None]
    env: dict[str, Any] = {
        "b": np.arange(_BATCH)[:, None, None, None],
        "h": heads,
        "h_kv": heads // (_HEADS // _KV_HEADS),
        "kv_idx": np.arange(kv_len),
        "q_len": q_len,
        "kv_len": kv_len,
        "num_heads": _HEADS,
        **{s.name: s.default for s in graph.scalars},
    }
    generator = np.random.default_rng(0)
    for decl in graph.inputs:
        env[decl.name] = _filled(decl, sizes, fill, generator)
    return env


def _filled(decl: InputDecl, sizes: dict[str, int], fill: str, generator: np.random.Generator) -> np.ndarray:
    shape = [sizes.get(d, _FREE) for d in decl.pattern]
    if decl.default is not None:
        return np.asarray(decl.default(sizes))
    if fill == "zero":
        return np.zeros(shape, dtype=np.int64 if decl.dtype == "int" else np.float64)
    if decl.dtype != "int":
        return generator.standard_normal(shape)
    if fill == "random":
        return generator.integers(0, sizes["kv_idx"] + 1, shape)
    if decl.pattern and decl.pattern[-1] in ("q_idx", "kv_idx"):
        return np.broadcast_to(np.arange(shape[-1]) // 2, shape)
    return np.full(shape, sizes["kv_idx"])


def _words(graph: VariantGraph, env: dict[str, Any], fill: str, b: int, h: int) -> str:
    """The values besides the lengths that an example depends on."""
    mask = graph["mask"].expr
    names = {s.name for s in mask.free_symbols}
    parts = [f"{s.name}={s.default}" for s in graph.scalars if s.name in names]
    parts += [f"{d.name} all 0" if fill == "zero" else f"a {fill} {d.name}" for d in graph.inputs if d.name in names]
    parts += [f"h={h}"] if {"h", "h_kv"} & names else []
    parts += [f"b={b}"] if "b" in names and not mask.atoms(Read) else []
    return f"{', '.join(parts)}, " if parts else ""
