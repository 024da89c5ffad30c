"""Error messages for calls whose tensors do not match the variant. Never run by a call that succeeds."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from attncc.errors import InputError, UnsupportedError
from attncc.ir.graph import InputDecl, VariantGraph
from attncc.ir.hybrid import HybridGraph

#: what a call takes besides inputs, and what people look for there, though it belongs in a spec
_OPTIONS = ("scale", "outputs")
_OF_LINEAR = ("initial_state", "output_final_state", "chunk_size", "position", "plan")
_ELSEWHERE = {
    **{stage: f"it is a stage of the variant: ac.Variant({stage}=...)" for stage in ("score", "mask", "normalizer")},
    **dict.fromkeys(("score_mod", "mask_mod", "block_mask"), "ac.from_flex(score_mod, mask_mod) makes a variant of it"),
    "attn_mask": "a mask is a formula of the variant; a dense one is an input: ac.compile('dense_bias')",
    "key_padding_mask": "ac.padding() is a mask of the variant, and a call passes lengths=, one a sequence",
    "window_size": "ac.window(left, right) is a mask of the variant",
    **dict.fromkeys(("dropout_p", "dropout"), "no weights are dropped"),
    **dict.fromkeys(("softmax_scale", "sm_scale", "scaling"), "write scale=..."),
    **dict.fromkeys(("return_lse", "return_softmax_lse", "return_aux"), 'write outputs=("out", "lse")'),
    **dict.fromkeys(
        ("need_weights", "output_attentions", "return_attn_probs"),
        "what is read out of the weights is an output of the variant: ac.outputs.weights(), or less",
    ),
    "softcap": "it is a score of the variant: ac.softcap(cap)",
    "alibi_slopes": "ac.alibi() is a score of the variant, and a call passes slopes=",
    "deterministic": "ac.compile(..., deterministic=True) asks for it",
    "is_causal": "it is the mask of the variant: ac.Variant(mask=ac.causal)",
    "enable_gqa": "fewer heads of k and v than of q need no word",
    **dict.fromkeys(
        _OF_LINEAR,
        "what has a form in linear time takes it, and this was compiled to none: ac.compile(..., plan='chunk') gives "
        "it, or says which factor does not split",
    ),
    "cu_seqlens": "packed sequences are a mask, as in 'document'; what has a form in linear time, ac.compile(..., "
    "plan='chunk'), takes their sums of lengths",
}
_DIMENSIONS = {
    "q": "(batch, heads, queries, head dim)",
    "k": "(batch, key/value heads, keys, head dim)",
    "v": "(batch, key/value heads, keys, value dim)",
}


def fail_dimensions(**tensors: Any) -> NoReturn:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} is {kind_of(tensor)}, not a tensor")
        if tensor.dim() != 4:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, expected {dimensions(4)} {_DIMENSIONS[name]}")
    raise AssertionError("q, k and v have 4 dimensions each")


def fail_sizes(q: Tensor, k: Tensor, v: Tensor, branches: int) -> NoReturn:
    sizes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    for axis, what in ((0, "batch"), (2, "number of keys")):
        if k.shape[axis] != v.shape[axis]:
            raise InputError(f"k and v differ in their {what}: {k.shape[axis]} and {v.shape[axis]}", remedy=sizes)
    if k.shape[1] and (v.shape[1] < 1 or v.shape[1] % k.shape[1]):
        reason = f"k and v differ in their number of key/value heads: {k.shape[1]} and {v.shape[1]}"
        raise InputError(f"{reason}, which is no multiple", remedy=sizes)
    if q.shape[0] != k.shape[0]:
        raise InputError(f"q and k differ in their batch: {q.shape[0]} and {k.shape[0]}", remedy=sizes)
    if q.shape[3] % branches:
        raise InputError(f"the head dim of q, {q.shape[3]}, does not divide among {branches} branches", remedy=sizes)
    if branches > 1 and k.shape[3] not in (q.shape[3], q.shape[3] // branches):
        wanted = f"{q.shape[3]}, or {q.shape[3] // branches} for one that all {branches} branches share"
        raise InputError(f"the head dim of k is {k.shape[3]}, expected {wanted}", remedy=sizes)
    if branches == 1 and q.shape[3] != k.shape[3]:
        raise InputError(f"q and k differ in their head dim: {q.shape[3]} and {k.shape[3]}", remedy=sizes)
    if q.shape[3] < 1 or v.shape[3] < 1:
        raise InputError("a head dim is 0", remedy=sizes)
    if q.shape[1] < 1 or k.shape[1] < 1:
        raise InputError("there is no head", remedy=sizes)
    layout = f"dimension 1 counts heads: {sizes}; a tensor (batch, length, heads, dim) is passed as x.transpose(1, 2)"
    raise InputError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key/value heads", remedy=layout)


def fail_dtype(q: Tensor, k: Tensor, v: Tensor, dtypes: Collection[torch.dtype]) -> NoReturn:
    if not all(isinstance(t, Tensor) for t in (q, k, v)):
        fail_dimensions(q=q, k=k, v=v)
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(
            f"q, k and v differ in dtype: {dtype_name(q.dtype)}, {dtype_name(k.dtype)}, {dtype_name(v.dtype)}",
            remedy="cast them to one",
        )
    checks = "; ac.reference(variant, q, k, v) is in float64, as gradcheck is" if q.dtype == torch.float64 else ""
    raise InputError(f"q, k and v are {dtype_name(q.dtype)}", remedy=f"supported: {_names(dtypes)}{checks}")


def fail_device(device: torch.device, tensors: dict[str, Tensor]) -> NoReturn:
    name, tensor = next((n, t) for n, t in tensors.items() if t.device != device)
    raise InputError(f"{name} is on {tensor.device}, but q is on {device}", remedy=f"move it with .to('{device}')")


def fail_strides(**tensors: Tensor) -> NoReturn:
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            layout = str(tensor.layout).removeprefix("torch.")
            raise InputError(f"{name} is {layout}, not dense", remedy=f"pass {name}.to_dense()")
    name, tensor = next((n, t) for n, t in tensors.items() if t.stride(3) != 1 and t.shape[3] > 1)
    raise InputError(
        f"the last dimension of {name} is not contiguous: strides {tuple(tensor.stride())}",
        remedy=f"pass {name}.contiguous(), or permute so that the head dim stays last",
    )


def fail_scale(graph: VariantGraph | HybridGraph) -> NoReturn:
    raise InputError(f"the similarity of '{graph.name}' has no scale", remedy="leave scale out, or use it there")


def fail_vector(decl: InputDecl, value: Tensor, dim: int) -> NoReturn:
    raise InputError(
        f"the input '{decl.name}' {pattern_of(decl)} has shape {tuple(value.shape)}: its last dimension must be "
        f"{dim}, the head dimension of q and k"
    )


def fail_unknown(graph: VariantGraph | HybridGraph, inputs: Mapping[str, Any]) -> NoReturn:
    known = [d.name for d in graph.inputs] + [s.name for s in graph.scalars]
    name = next(n for n in inputs if n not in known)
    near = difflib.get_close_matches(name, [*known, *_OPTIONS, *_OF_LINEAR, "cu_seqlens"], n=1)
    takes = f"it takes {', '.join(known)}" if known else "it takes none"
    remedy = _ELSEWHERE.get(name) or (f"did you mean '{near[0]}'?" if near else takes)
    raise InputError(f"'{graph.name}' has no input '{name}'", remedy=remedy)


def no_statistic(graph: VariantGraph, name: str) -> UnsupportedError:
    """The error for lse of weights that have no denominator."""
    return UnsupportedError(
        f"the normalizer of '{graph.name}' has no row statistic, so there is no output '{name}'",
        stage="normalizer",
        remedy="ask for 'out' alone; the sum of a row's weights is ac.outputs.row_mass()",
    )


def required_inputs(graph: VariantGraph) -> list[str]:
    return [d.name for d in graph.inputs if d.default is None]


def pattern_of(decl: InputDecl) -> str:
    return f"[{', '.join(decl.pattern)}]"


def dimensions(count: int) -> str:
    return f"{count} dimension{'s' * (count != 1)}"


def kind_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"of type {type(value).__name__}"


def wanted_of(decl: InputDecl) -> str:
    return "integers (torch.int32)" if decl.dtype == "int" else "floats (torch.float32)"


def cast_to(decl: InputDecl, value: Tensor, dtypes: Collection[torch.dtype]) -> str:
    if decl.dtype == "int":
        if value.is_floating_point():
            return f"pass {decl.name}.to(torch.int32), or declare ac.Input(...) without dtype='int'"
        return f"pass {decl.name}.to(torch.int32)"
    if value.dtype == torch.float64:
        return f"pass {decl.name}.float(); supported: {_names(dtypes)}"
    if value.is_floating_point() or value.dtype == torch.bool or value.is_complex():
        return f"supported: {_names(dtypes)}"
    return f"pass {decl.name}.float(), or declare ac.Input(..., dtype='int')"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Collection[torch.dtype]) -> str:
    return ", ".join(sorted(dtype_name(d) for d in dtypes))
