"""Masks as transformers describes them, read into patterns: the formulas that a model's attention layers need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

import torch
from transformers import masking_utils

import attncc as ac
from attncc.errors import UnsupportedError


@dataclass(frozen=True)
class Pattern:
    """Which formula a call needs. Equal patterns share one compiled op."""

    causal: bool = False
    #: keys less than this far behind the query, its own key counted; causal only
    window: int | None = None
    #: keys at most this far from the query, on either side
    reach: int | None = None
    #: keys before `starts[b]` are padding
    left_padding: bool = False
    #: keys from `stops[b]` on are padding
    right_padding: bool = False
    #: only keys of the query's own sequence, `documents[b, kv_idx]`
    packed: bool = False
    softcap: float | None = None
    bias: bool = False
    sink: bool = False

    def variant(self) -> ac.Variant:
        """The formula."""
        inputs: dict[str, ac.Input] = {}
        mask: Any = ac.causal if self.causal else ac.full
        if self.window is not None:
            mask = mask & ac.sliding_window(self.window)
        if self.reach is not None:
            mask = mask & ac.window(self.reach, self.reach)
        if self.right_padding:
            mask = mask & ac.padding("stops")
        if self.left_padding:
            inputs["starts"] = ac.Input("b", dtype="int")
            mask = mask & (lambda b, kv_idx, starts: kv_idx >= starts[b])
        if self.packed:
            mask = mask & ac.document("documents")
        modifiers = [ac.softcap(self.softcap)] if self.softcap is not None else []
        modifiers += [ac.bias("position_bias")] if self.bias else []
        score = None
        for modifier in modifiers:
            score = modifier if score is None else score >> modifier
        if self.sink:
            inputs["sink"] = ac.Input("h", grad=True)
        named = [f"{f.name}={value}" for f in fields(self) if (value := getattr(self, f.name)) not in (False, None)]
        return ac.Variant(
            name=f"transformers({', '.join(named)})",
            inputs=inputs,
            score=score,
            mask=mask,
            normalizer=_softmax_with_sink if self.sink else "softmax",
        )


def _softmax_with_sink(score: Any, row: Any, h: Any, sink: Any) -> Any:
    """Softmax over the keys and one more logit a head, which has no value (gpt-oss)."""
    m = ac.maximum(row.max(score), sink[h])
    p = ac.exp(score - m)
    return p / (row.sum(p) + ac.exp(sink[h] - m))


@dataclass(frozen=True)
class AttentionMask:
    """What `attention_mask` is inside a model that runs on attncc: a pattern and the integers that it reads.

    starts, stops: int32 (B,), the visible keys of each sequence are starts[b] <= kv_idx < stops[b];
    documents: int32 (B, N), the sequence that each key belongs to. None where the pattern does not read them.
    """

    pattern: Pattern
    starts: torch.Tensor | None = None
    stops: torch.Tensor | None = None
    documents: torch.Tensor | None = None

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The inputs of the op, on the device of a layer."""
        named = {"starts": self.starts, "stops": self.stops, "documents": self.documents}
        return {name: tensor.to(device) for name, tensor in named.items() if tensor is not None}

    def contiguous(self) -> NoReturn:
        """What is asked of a mask that is made ahead of the model's call, as for a static cache alone."""
        raise UnsupportedError("the cache is a static one", remedy=_DYNAMIC)


_DYNAMIC = "use the default cache: cache_implementation='dynamic'"


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> AttentionMask:
    """transformers' mask interface: the mask that a model's layers will hand to `attention_forward`.

    `mask_function` is read, not called: it is taken apart into the parts that transformers composes masks from.
    `attention_mask` is the padding mask (B, at least kv_length), true for tokens. Raises UnsupportedError for a part
    that is not known here, for padding that is not around one run of tokens, and for a cache that holds unused keys.
    """
    if isinstance(q_offset, torch.Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise UnsupportedError(
            f"the cache holds {kv_length} keys for a query that ends at another position (a static cache)",
            remedy=_DYNAMIC,
        )
    pattern, documents = _read(mask_function)
    if documents is not None:
        documents = documents.to(torch.int32).expand(batch_size, -1)
    if pattern.causal and q_length == 1 and pattern.window is None:
        pattern = replace(pattern, causal=False)  # the last query sees every key: no mask to compute
    mask = AttentionMask(pattern, documents=documents)
    if attention_mask is None:
        return mask
    tokens = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    if tokens.shape[1] < kv_length:
        raise UnsupportedError(
            f"the padding mask covers {tokens.shape[1]} of {kv_length} keys", remedy="give one entry a key"
        )
    return _padded(mask, tokens)


def _padded(mask: AttentionMask, tokens: torch.Tensor) -> AttentionMask:
    """`mask` restricted to `tokens` (B, N) bool, which must be one run in each row (an empty one is allowed)."""
    n = tokens.shape[1]
    position = torch.arange(n, device=tokens.device)
    stops = torch.where(tokens, position + 1, 0).amax(1)
    starts = torch.where(tokens, position, n).amin(1).minimum(stops)
    # One transfer answers all three questions; the op is chosen by the answers, so they must be known here.
    gaps, left, right = torch.stack(
        [(stops - starts != tokens.sum(1)).any(), (starts > 0).any(), (stops < n).any()]
    ).tolist()
    if gaps:
        raise UnsupportedError(
            "a padding mask hides keys between visible ones of one sequence",
            remedy="pad on the left or on the right; a general mask is an ac.Variant of its own",
        )
    return replace(
        mask,
        pattern=replace(mask.pattern, left_padding=left, right_padding=right),
        starts=starts.to(torch.int32) if left else None,
        stops=stops.to(torch.int32) if right else None,
    )


def _read(mask_function: Callable[..., Any]) -> tuple[Pattern, torch.Tensor | None]:
    """The pattern that a mask function of transformers stands for, and the sequence ids (B, N) of packed sequences."""
    if mask_function is masking_utils.causal_mask_function:
        return Pattern(causal=True), None
    if mask_function is masking_utils.bidirectional_mask_function:
        return Pattern(), None
    maker = getattr(mask_function, "__qualname__", repr(mask_function)).partition(".<locals>")[0]
    held = dict(
        zip(
            getattr(getattr(mask_function, "__code__", None), "co_freevars", ()),
            (cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()),
            strict=True,
        )
    )
    match maker, held:
        case "sliding_window_overlay", {"sliding_window": int(window)}:
            return Pattern(window=window), None
        case "sliding_window_bidirectional_overlay", {"sliding_window": int(reach)}:
            return Pattern(reach=reach), None
        case "packed_sequence_mask_function", {"packed_sequence_mask": torch.Tensor() as documents}:
            return Pattern(packed=True), documents
        case "remap_positions_for_packed_sequence", {"mask_function": inner}:
            # Positions count up by one within a sequence, and every part known here depends on their differences alone.
            return _read(inner)
        case "and_masks", {"mask_functions": tuple(parts)}:
            return _both([_read(part) for part in parts])
    raise UnsupportedError(
        f"the model's mask has a part that is not known here: {getattr(mask_function, '__qualname__', mask_function)}",
        remedy="run this model with another attn_implementation, or write its mask as an ac.Variant",
    )


def _both(parts: list[tuple[Pattern, torch.Tensor | None]]) -> tuple[Pattern, torch.Tensor | None]:
    """The intersection of patterns that say different things."""
    merged: dict[str, Any] = {}
    documents = None
    for pattern, ids in parts:
        said = {f.name: getattr(pattern, f.name) for f in fields(pattern)}
        for name, value in said.items():
            if value in (False, None):
                continue
            if merged.setdefault(name, value) != value:
                raise UnsupportedError(f"the model's mask has two of {name}: {merged[name]} and {value}")
        if ids is not None and documents is not None:
            raise UnsupportedError("the model's mask has two sets of packed sequences")
        documents = ids if ids is not None else documents
    return Pattern(**merged), documents


def unmasked(m: int, n: int, is_causal: bool, window: int | None) -> AttentionMask:
    """The mask of a model that makes none."""
    if not is_causal or m == 1:
        if window is not None and n > window:
            raise UnsupportedError("a sliding window without a mask or causality: which keys does it show?")
        return AttentionMask(Pattern())
    if m != n:
        raise UnsupportedError(
            f"causal attention of {m} queries to {n} keys without a mask: are they aligned at the start or the end?"
        )
    return AttentionMask(Pattern(causal=True, window=window))


def from_tensor(tensor: torch.Tensor, m: int, n: int, is_causal: bool, window: int | None) -> AttentionMask:
    """The mask that a tensor (B, 1, M or 1, N) says: true, or 0 in an additive one, where a key is visible.

    It must be padding, alone or with causality (which `is_causal` allows) and the window: every entry is compared.
    """
    if tensor.dim() != 4 or tensor.shape[1] != 1 or tensor.shape[3] != n:
        raise UnsupportedError(
            f"a mask of shape {tuple(tensor.shape)} for {n} keys", remedy="pass a padding mask (B, N) or (B, 1, M, N)"
        )
    visible = tensor == 0 if tensor.is_floating_point() else tensor.to(torch.bool)
    if tensor.is_floating_point() and (tensor[~visible] > torch.finfo(tensor.dtype).min / 2).any():
        raise UnsupportedError(
            "an additive mask with values other than 0 and minus infinity",
            remedy="an additive bias is the position_bias argument, or an ac.Variant with ac.bias()",
        )
    visible = visible[:, 0].expand(-1, m, -1)
    tokens = visible.any(1)  # a key that some query sees is no padding
    behind = torch.arange(n - m, n, device=tensor.device)[:, None] - torch.arange(n, device=tensor.device)
    patterns = [Pattern()]
    if is_causal and m > 1:
        patterns += [Pattern(causal=True), *([Pattern(causal=True, window=window)] if window is not None else [])]
    for pattern in patterns:
        shape = behind >= 0 if pattern.causal else torch.ones_like(behind, dtype=torch.bool)
        if pattern.window is not None:
            shape = shape & (behind < pattern.window)
        if torch.equal(tokens[:, None, :] & shape, visible):
            return _padded(AttentionMask(pattern), tokens)
    raise UnsupportedError(
        "a 4-dimensional mask that is not padding, alone or with causality",
        remedy="pass the padding mask (B, N); a mask of its own is an ac.Variant",
    )
