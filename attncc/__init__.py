"""attncc: a compiler for attention kernels. Write the formula; forward, backward and merge are derived from it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attncc.collector import held
from attncc.errors import AttnccError, InputError, ScheduleError, SpecError, UnsupportedError
from attncc.language import outputs
from attncc.language.functions import absolute as abs
from attncc.language.functions import (
    bit_and,
    bit_or,
    bit_xor,
    cos,
    cumsum,
    detach,
    dot,
    erf,
    exp,
    exp2,
    floor,
    gelu,
    log,
    log2,
    maximum,
    minimum,
    norm,
    relu,
    sigmoid,
    sign,
    silu,
    sin,
    softplus,
    sqrt,
    sum_d,
    tanh,
    to_float,
    to_int,
    where,
)
from attncc.language.hybrid import Hybrid
from attncc.language.masks import (
    block_diagonal,
    causal,
    dilated,
    document,
    full,
    padding,
    prefix,
    sliding_window,
    window,
)
from attncc.language.mods import alibi, alibi_slopes, bias, decay, gate, softcap
from attncc.language.normalizers import by_sum, cog, entmax15, identity, softmax, softmax1, sparsemax, taylor
from attncc.language.recurrence import recurrence
from attncc.language.textform import load_toml, loads_toml
from attncc.language.variant import Input, Scalar, Variant

if TYPE_CHECKING:
    from attncc import recipes, variants
    from attncc.language.flex.front import from_flex
    from attncc.runtime.compile import compile
    from attncc.runtime.hybrid import HybridOp
    from attncc.runtime.linear import LinearOp
    from attncc.runtime.op import AttentionOp
    from attncc.runtime.recurrence import RecurrenceOp
    from attncc.runtime.reference import reference
    from attncc.schedule.problem import KernelSchedule, Schedule

#: public names whose modules import torch: loaded when first used, since reading a spec needs none of it
_LAZY = {
    "AttentionOp": ("attncc.runtime.op", "AttentionOp"),
    "HybridOp": ("attncc.runtime.hybrid", "HybridOp"),
    "LinearOp": ("attncc.runtime.linear", "LinearOp"),
    "compile": ("attncc.runtime.compile", "compile"),
    "KernelSchedule": ("attncc.schedule.problem", "KernelSchedule"),
    "Schedule": ("attncc.schedule.problem", "Schedule"),
    "from_flex": ("attncc.language.flex.front", "from_flex"),
    "RecurrenceOp": ("attncc.runtime.recurrence", "RecurrenceOp"),
    "reference": ("attncc.runtime.reference", "reference"),
    "recipes": ("attncc.recipes", None),
    "variants": ("attncc.variants", None),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        from attncc.language.functions import instead

        remedy = None if name.startswith("_") else instead(name, __all__)
        raise AttributeError(f"module 'attncc' has no attribute '{name}'{f': {remedy}' if remedy else ''}")
    module, attribute = _LAZY[name]
    with held():
        loaded = importlib.import_module(module)
    globals()[name] = loaded if attribute is None else getattr(loaded, attribute)
    return globals()[name]


__all__ = [
    "AttentionOp",
    "AttnccError",
    "Hybrid",
    "HybridOp",
    "Input",
    "InputError",
    "KernelSchedule",
    "LinearOp",
    "RecurrenceOp",
    "Scalar",
    "Schedule",
    "ScheduleError",
    "SpecError",
    "UnsupportedError",
    "Variant",
    "abs",
    "alibi",
    "alibi_slopes",
    "bias",
    "bit_and",
    "bit_or",
    "bit_xor",
    "block_diagonal",
    "by_sum",
    "causal",
    "cog",
    "compile",
    "cos",
    "cumsum",
    "decay",
    "detach",
    "dilated",
    "document",
    "dot",
    "entmax15",
    "erf",
    "exp",
    "exp2",
    "floor",
    "from_flex",
    "full",
    "gate",
    "gelu",
    "identity",
    "load_toml",
    "loads_toml",
    "log",
    "log2",
    "maximum",
    "minimum",
    "norm",
    "outputs",
    "padding",
    "prefix",
    "recipes",
    "recurrence",
    "reference",
    "relu",
    "sigmoid",
    "sign",
    "silu",
    "sin",
    "sliding_window",
    "softcap",
    "softmax",
    "softmax1",
    "softplus",
    "sparsemax",
    "sqrt",
    "sum_d",
    "tanh",
    "taylor",
    "to_float",
    "to_int",
    "variants",
    "where",
    "window",
]
