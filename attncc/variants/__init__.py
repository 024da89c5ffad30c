"""The variants that ship, one file each: formula, citation, defaults. A file is read when its variant is asked for."""

from __future__ import annotations

import difflib
import importlib

from attncc.errors import SpecError
from attncc.language.variant import Variant

_NAMES = (
    "full",
    "causal",
    "sliding_window",
    "flash_window",
    "prefix_lm",
    "document",
    "alibi",
    "softcap",
    "gemma2_global",
    "gemma2_local",
    "t5_bias",
    "dense_bias",
    "softmax1",
    "sink",
    "sigmoid",
    "relu",
    "relu2",
    "taylor",
    "cog",
    "entmax15",
    "sparsemax",
    "min_p",
    "top_theta",
    "qk_temperature",
    "cosine",
    "squared_distance",
    "trilinear",
    "location",
    "gaussian_position",
    "gmm",
    "afa",
    "head_gates",
    "differential",
    "mla",
)


def names() -> tuple[str, ...]:
    """The names of all shipped variants."""
    return _NAMES


def get(name: str) -> Variant:
    """A shipped variant by name. Raises SpecError, with the nearest name, if there is none."""
    if name not in _NAMES:
        near = difflib.get_close_matches(name, _NAMES, n=1)
        remedy = f"did you mean '{near[0]}'?" if near else f"shipped: {', '.join(_NAMES)}"
        raise SpecError(f"no shipped variant is called '{name}'", remedy=remedy)
    variant = getattr(importlib.import_module(f"attncc.variants.{name}"), name)
    assert isinstance(variant, Variant)
    return variant
