"""The shipped masks. Each is a boolean over (q_idx, kv_idx); they compose with `&`, `|`, `~`."""

from __future__ import annotations

import operator
from typing import Any

from attncc.ir.graph import InputDecl, ScalarDecl
from attncc.language.combinators import Mask, MaskFamily
from attncc.language.values import Value, fail


def _position(env: Any) -> Any:
    """The absolute position of the query row: the last row is the last key's (bottom-right alignment)."""
    return env["q_idx"] + (env["kv_len"] - env["q_len"])


def _causal(align: str = "end") -> Mask:
    """Keys up to the query's own position.

    `align="end"` (the default) puts the last query at the last key, so that one spec is right in prefill and in decode;
    `align="start"` puts query 0 at key 0, as PyTorch's `is_causal` does. With equal lengths both agree.
    """
    if align == "end":
        return Mask(lambda e: e["kv_idx"] <= _position(e), label="causal")
    if align == "start":
        return Mask(lambda e: e["kv_idx"] <= e["q_idx"], label="causal(align='start')")
    fail(f"causal(align={align!r}): align is 'end' or 'start'")


causal = MaskFamily(_causal)
full = Mask.of(True)


def _count(what: str, number: Any, least: int = 1, remedy: str | None = None) -> Any:
    """The argument of a mask that counts tokens, checked. SpecError: it is not an integer, or below `least`."""
    if isinstance(number, str | Value):
        return number  # a scalar, whose value a call has
    try:
        found = operator.index(number)
    except TypeError:
        fail(f"{what} is {number!r}: it counts tokens", "give an integer, or the name of a scalar")
    if found < least:
        fail(f"{what} is {found}: it is {least} or more", remedy)
    return found


def sliding_window(size: int | str) -> Mask:
    """Keys less than `size` behind the query, the query's own key counted: `q - k < size` (Mistral, gpt-oss, Gemma).

    `size` is a number, or the name of a scalar bound at call time. It does not look ahead of itself: combine it with
    `causal`. For flash-attn's distances see `window`.
    """
    size = _count("the size of a sliding_window", size, remedy="a window of 1 shows the query's own key")
    return Mask(
        lambda e: _position(e) - e["kv_idx"] < _named(e, size), scalars=_scalars(size), label=f"sliding_window({size})"
    )


def window(left: int | str, right: int | str = 0) -> Mask:
    """Keys at most `left` behind and `right` ahead of the query, inclusive: flash-attn's `window_size=(left, right)`.

    Each is a number, or the name of a scalar. `window(left=W)` shows W + 1 keys, where `causal & sliding_window(W)`
    shows W.
    """
    unlimited = "flash-attn's -1, no limit, is a mask without that side: ac.causal for (-1, 0)"
    left = _count("the left of a window", left, 0, unlimited)
    right = _count("the right of a window", right, 0, unlimited)
    return Mask(
        lambda e: (_position(e) - e["kv_idx"] <= _named(e, left)) & (e["kv_idx"] - _position(e) <= _named(e, right)),
        scalars={**_scalars(left), **_scalars(right, 0)},
        label=f"window({left}, {right})",
    )


def _named(env: Any, number: int | str) -> Any:
    return env[number] if isinstance(number, str) else number


def _scalars(number: int | str, default: int = 1024) -> dict[str, ScalarDecl]:
    return {number: ScalarDecl(number, default)} if isinstance(number, str) else {}


def prefix(length: int | str = "prefix") -> Mask:
    """The first `length` keys: a number, or the name of an integer input with one length a sequence, `[b]`."""
    if isinstance(length, str):
        decl = InputDecl(length, ("b",), "int")
        return Mask(lambda e: e["kv_idx"] < e[length][e["b"]], {length: decl}, label=f"prefix({length})")
    tokens = _count("the length of a prefix", length, 0)
    return Mask(lambda e: e["kv_idx"] < tokens, label=f"prefix({tokens})")


def document(doc: str = "doc") -> Mask:
    """Only keys of the query's own document. `doc` names an integer input `[b, kv_idx]`: the document of each token."""
    decl = InputDecl(doc, ("b", "kv_idx"), "int")
    return Mask(lambda e: e[doc][e["b"], _position(e)] == e[doc][e["b"], e["kv_idx"]], {doc: decl}, label="document")


def padding(lengths: str = "lengths") -> Mask:
    """The first `lengths[b]` keys of each sequence; the rest is padding."""
    return prefix(lengths)


def dilated(step: int) -> Mask:
    """Every `step`-th key, counted back from the query."""
    step = _count("the step of dilated", step)
    return Mask(lambda e: (_position(e) - e["kv_idx"]) % step == 0, label=f"dilated({step})")


def block_diagonal(size: int) -> Mask:
    """Only keys of the query's own block of `size` positions."""
    size = _count("the size of block_diagonal", size)
    return Mask(lambda e: _position(e) // size == e["kv_idx"] // size, label=f"block_diagonal({size})")


#: by the name they have in the text form
TABLE: dict[str, Any] = {
    "causal": causal,
    "full": full,
    "sliding_window": sliding_window,
    "window": window,
    "prefix": prefix,
    "document": document,
    "padding": padding,
    "dilated": dilated,
    "block_diagonal": block_diagonal,
}
