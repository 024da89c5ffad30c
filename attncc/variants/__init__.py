"""The variants that ship, one file each: formula, citation, defaults. A file is read when its variant is asked for.

A new one is its file, its name in FAMILIES or RECURRENCES, and a row in attncc/catalogue; then
`python -m attncc.gallery`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect

from attncc.errors import SpecError
from attncc.language.variant import Variant

#: what a variant changes of plain attention -> the names
FAMILIES: dict[str, tuple[str, ...]] = {
    "plain": ("full", "causal"),
    "masks": (
        "sliding_window",
        "flash_window",
        "prefix_lm",
        "document",
        "meta_tokens",
        "parallel_context",
        "arrow",
        "isolation",
        "split_heads",
        "alignment",
        "object_queries",
    ),
    "scores": (
        "alibi",
        "faceformer",
        "kerple",
        "forgetting",
        "bam",
        "relative_bias",
        "t5_bias",
        "dense_bias",
        "bee_rag",
        "softcap",
        "gemma2_global",
        "gemma2_local",
        "qk_temperature",
        "ssmax",
        "image_gain",
        "key_gain",
    ),
    "normalizers": (
        "softmax1",
        "sink",
        "sigmoid",
        "unnormalized_sigmoid",
        "relu",
        "relu2",
        "rela",
        "elu1",
        "bounded_sum",
        "taylor",
        "taylor_causal",
        "cog",
        "softpick",
        "sdm",
        "entmax15",
        "sparsemax",
        "min_p",
        "top_theta",
        "slots",
        "shared_weights",
    ),
    "similarities": (
        "cosine",
        "taylorshift",
        "squared_distance",
        "l1_distance",
        "additive",
        "lln",
        "trilinear",
        "transformer_xl",
        "bico",
        "mega",
        "location",
        "pooling",
        "gaussian_position",
        "gmm",
        "afa",
    ),
    "linear": ("linear_attention", "retention", "lightning", "simple_gla", "ssd", "gla", "rwkv6"),
    "reductions": ("local_gaussian", "head_gates", "reversed", "differential", "mla"),
}
#: states from token to token, without pairs of query and key: `Variant(recurrence=...)`
RECURRENCES = ("delta_net", "gated_delta_net")
_REMEDY = "`attncc list` shows the {} that ship; a file is spec.toml, or spec.py:name on the command line"
_NAMES = tuple(name for members in FAMILIES.values() for name in members)


def names() -> tuple[str, ...]:
    """The names of all shipped variants whose weights are of pairs."""
    return _NAMES


def recurrences() -> tuple[str, ...]:
    """The names of the shipped recurrences."""
    return RECURRENCES


def family(name: str) -> str:
    """The part of plain attention that a shipped variant changes; "recurrences" for a recurrence."""
    return "recurrences" if name in RECURRENCES else next(key for key, members in FAMILIES.items() if name in members)


def about(name: str) -> tuple[str, str]:
    """A sentence about a shipped variant, and further details: the docstring of its file."""
    text = inspect.cleandoc(importlib.import_module(f"attncc.variants.{name}").__doc__ or "")
    title, _, details = text.partition("\n\n")
    return " ".join(title.split()), details


def get(name: str) -> Variant:
    """A shipped variant or recurrence by name. Raises SpecError, with the nearest name, if there is none."""
    known = (*_NAMES, *RECURRENCES)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean '{near[0]}'?" if near else _REMEDY.format(len(known))
        raise SpecError(f"no shipped variant is called '{name}'", remedy=remedy)
    variant = getattr(importlib.import_module(f"attncc.variants.{name}"), name)
    assert isinstance(variant, Variant)
    return variant
