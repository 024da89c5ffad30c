"""The cases that FlexAttention can say too, with the same constants on both sides: the rows of the README's table."""

from __future__ import annotations

import torch

import attncc as ac
from attncc.language.mods import alibi_slopes
from bench import area
from bench.case import Case, FlexForm, Mod, Shape, Tensors

CAP = 30.0
WINDOW = 1024
DOCUMENT = 1024


def slopes(shape: Shape, device: str) -> Tensors:
    return {"slopes": torch.tensor(alibi_slopes(shape.h), device=device)}


def _documents(shape: Shape, device: str) -> Tensors:
    doc = torch.arange(shape.n, device=device, dtype=torch.int32) // DOCUMENT
    return {"doc": doc.expand(shape.b, shape.n).contiguous()}


def _causal_mask(shape: Shape, inputs: Tensors) -> Mod:
    offset = shape.n - shape.m
    return lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + offset


def _window_mask(shape: Shape, inputs: Tensors) -> Mod:
    return lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < WINDOW)


def _document_mask(shape: Shape, inputs: Tensors) -> Mod:
    doc = inputs["doc"][0]
    return lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (doc[q_idx] == doc[kv_idx])


def alibi_score(shape: Shape, inputs: Tensors) -> Mod:
    slopes = inputs["slopes"]
    return lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx)


def softcap_score(shape: Shape, inputs: Tensors) -> Mod:
    return lambda score, b, h, q_idx, kv_idx: CAP * torch.tanh(score / CAP)


def _document_area(m: int, n: int) -> int:
    whole, rest = divmod(n, DOCUMENT)
    return area.documents([DOCUMENT] * whole + [rest])


FULL = Case("full", ac.Variant(name="full"), area.full, flex=FlexForm(), sdpa={"is_causal": False})
CAUSAL = Case(
    "causal",
    ac.Variant(name="causal", mask=ac.causal),
    area.causal,
    flex=FlexForm(mask_mod=_causal_mask),
    sdpa={"is_causal": True},
)
ALIBI = Case(
    "alibi",
    ac.Variant(name="alibi", score=ac.alibi(), mask=ac.causal),
    area.causal,
    inputs=slopes,
    flex=FlexForm(alibi_score, _causal_mask),
    differentiable=("slopes",),
)
SOFTCAP = Case(
    "softcap",
    ac.Variant(name="softcap", score=ac.softcap(CAP), mask=ac.causal),
    area.causal,
    flex=FlexForm(softcap_score, _causal_mask),
)
WINDOW_1024 = Case(
    "window1024",
    ac.Variant(name="window1024", mask=ac.causal & ac.sliding_window(WINDOW)),
    lambda m, n: area.window(m, n, WINDOW),
    flex=FlexForm(mask_mod=_window_mask),
)
DOCUMENTS_1024 = Case(
    "documents1024",
    ac.Variant(name="documents1024", mask=ac.causal & ac.document()),
    _document_area,
    inputs=_documents,
    flex=FlexForm(mask_mod=_document_mask),
)
DENSE = (FULL, CAUSAL, ALIBI, SOFTCAP, WINDOW_1024, DOCUMENTS_1024)
