"""Match a call's tensors with the variant's declarations: sizes, dtypes, devices. On the path of every call, so it is
cheap.

    q (B, Hq, M, Dqk)   k (B, Hkv, N, Dqk)   v (B, Hkv, N, Dv)      Hq a multiple of Hkv, one dtype, one device

v may have a multiple of k's heads: the weights of each head then apply to as many heads of v, which are heads of the
output. With several branches, q holds them side by side along its last dimension, and so does k, or they share it.

B, M and N may be 0: without queries there is nothing to compute, and without keys every row is fully masked.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attncc.errors import InputError
from attncc.ir.graph import LOOP_DIMS, InputDecl, ScalarDecl, VariantGraph
from attncc.runtime.refusals import (
    cast_to,
    dimensions,
    dtype_name,
    fail_device,
    fail_dimensions,
    fail_dtype,
    fail_scale,
    fail_sizes,
    fail_strides,
    fail_unknown,
    fail_vector,
    kind_of,
    pattern_of,
    required_inputs,
    wanted_of,
)

#: what the kernels compute in; the reference also takes float64
KERNEL_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
REFERENCE_DTYPES = KERNEL_DTYPES | {torch.float64}
#: what a call may ask for, besides the variant's auxiliary outputs
OUTPUTS = ("out", "lse")
_INT_DTYPES = frozenset({torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64})


@dataclass(frozen=True)
class Bound:
    """What a checked call binds the names of a variant to.

    `sizes` has the loop sizes b, h, h_kv, q_idx, kv_idx and the head dims d_qk, d_v, as q and v have them; d_k is that
    of k, where branches of q share it, and h_v counts the heads of v, where they are more than those of k. `tensors`
    holds every declared input as it was passed (a loop dimension of size 1 is not expanded), or its default; `scalars`
    every scalar.
    """

    sizes: dict[str, int]
    scale: float
    tensors: dict[str, Tensor]
    scalars: dict[str, int | float]

    def among(self, tensors: Mapping[str, Tensor]) -> Bound:
        """The same call on other tensors of the same kind, where `tensors` has them."""
        if not self.tensors:
            return self
        own = {name: tensors.get(name, x) for name, x in self.tensors.items()}
        return Bound(self.sizes, self.scale, own, self.scalars)


def bind(
    graph: VariantGraph,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    inputs: Mapping[str, Any],
    dtypes: Collection[torch.dtype] = KERNEL_DTYPES,
) -> Bound:
    """Check a call and bind its names. `scale=None` is 1/sqrt(Dqk), of the Dqk of one branch.

    Raises InputError, naming what to change.
    """
    try:
        batch, heads, q_len, d_qk = q.shape
        k_batch, kv_heads, kv_len, k_dim = k.shape
        v_batch, v_heads, v_len, d_v = v.shape
        dtype, device = q.dtype, q.device
    except (AttributeError, ValueError):
        fail_dimensions(q=q, k=k, v=v)
    if (
        k_batch != batch
        or v_batch != batch
        or v_len != kv_len
        or (k_dim != d_qk and (graph.branches == 1 or k_dim * graph.branches != d_qk))
        or d_qk % graph.branches
        or kv_heads < 1
        or heads < 1
        or heads % kv_heads
        or v_heads < 1
        or v_heads % kv_heads
        or d_qk < 1
        or d_v < 1
    ):
        fail_sizes(q, k, v, graph.branches)
    if k.dtype != dtype or v.dtype != dtype or dtype not in dtypes:
        fail_dtype(q, k, v, dtypes)
    if k.device != device or v.device != device:
        fail_device(device, {"k": k, "v": v})
    if (q.stride(3) != 1 and d_qk > 1) or (k.stride(3) != 1 and d_qk > 1) or (v.stride(3) != 1 and d_v > 1):
        fail_strides(q=q, k=k, v=v)
    if scale is None:
        scale = (d_qk // graph.branches) ** -0.5
    elif not graph.has_scale:
        fail_scale(graph)
    else:
        scale = _scale(scale)
    sizes = {
        "b": batch,
        "h": heads,
        "h_kv": kv_heads,
        "q_idx": q_len,
        "kv_idx": kv_len,
        "d_qk": d_qk,
        "d_v": d_v,
    }
    if k_dim != d_qk:
        sizes["d_k"] = k_dim
    if v_heads != kv_heads:
        sizes["h_v"] = v_heads
    if not inputs and not graph.inputs and not graph.scalars:
        return Bound(sizes, scale, {}, {})
    return Bound(sizes, scale, *_bind_inputs(graph, inputs, sizes, device, dtypes))


def check_dimensions(q: Tensor, k: Tensor, v: Tensor) -> None:
    """InputError unless q, k, v have 4 dimensions: the first check of `bind`, for callers that look at sizes before
    it."""
    if not all(isinstance(x, Tensor) and x.dim() == 4 for x in (q, k, v)):
        fail_dimensions(q=q, k=k, v=v)


def value_of(graph: VariantGraph, k: Tensor, v: Tensor | None) -> Tensor:
    """v as a call means it: a view of k where it is k's first elements. InputError for a v missing or too many."""
    if graph.value is None:
        if v is None:
            raise InputError(f"'{graph.name}' needs v", remedy="pass q, k, v")
        return v
    if v is not None:
        raise InputError(f"the values of '{graph.name}' are k[..., :{graph.value}]", remedy="pass q and k alone")
    if k.dim() != 4 or k.shape[3] < graph.value:
        shape = f"(batch, key/value heads, keys, head dim >= {graph.value})"
        raise InputError(f"k has shape {tuple(k.shape)}, expected {shape}", remedy=f"v is k[..., :{graph.value}]")
    return k[..., : graph.value]


def with_captured(captured: Sequence[InputDecl], q: Tensor, k: Tensor, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's inputs with the tensors that the variant captured, where the call passes no other.

    They are arguments from here on, so that gradients flow to them and nothing keeps them. A number, which may stand on
    the CPU beside tensors on a GPU, is moved. Raises InputError where q and k have not the shapes of attention.
    """
    missing = [d for d in captured if inputs.get(d.name) is None]
    sizes = sizes_of(q, k)
    made = {}
    for decl in missing:
        tensor: Tensor = decl.default(sizes)  # type: ignore[misc]
        if tensor.dtype == torch.float64 != q.dtype:
            tensor = tensor.float()
        made[decl.name] = tensor.to(q.device) if tensor.dim() == 0 else tensor
    return {**inputs, **made}


def sizes_of(q: Tensor, k: Tensor) -> dict[str, int]:
    """The sizes of a call that its inputs share. InputError where q and k have not the shapes of attention."""
    if q.dim() != 4 or k.dim() != 4:
        fail_dimensions(q=q, k=k)
    return {"b": q.shape[0], "h": q.shape[1], "h_kv": k.shape[1], "q_idx": q.shape[2], "kv_idx": k.shape[2]}


def without_captured(graph: VariantGraph) -> VariantGraph:
    """A graph that holds on to no tensor of the user's: `with_captured` passes them."""
    if not any(d.captured for d in graph.inputs):
        return graph
    return graph.changed(inputs=[replace(d, default=None) if d.captured else d for d in graph.inputs])


def output_names(outputs: str | Sequence[str], graph: VariantGraph) -> tuple[str, ...]:
    """The names of the outputs that a call asks for. Raises InputError for one that does not exist."""
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    known = (*OUTPUTS, *(o.name for o in graph.outputs))
    wrong = [repr(n) for n in names if n not in known]
    if not names or wrong:
        reason = f"there is no output {', '.join(wrong)}" if wrong else "no output is asked for"
        raise InputError(reason, remedy=f"the outputs are: {', '.join(known)}")
    return names


def auxiliary_names(graph: VariantGraph, outputs: str | Sequence[str]) -> tuple[str, ...]:
    """The auxiliary outputs among those that a call asks for, each once, in alphabetical order."""
    return tuple(sorted(set(output_names(outputs, graph)) - set(OUTPUTS)))


def read_inputs(graph: VariantGraph, chosen: VariantGraph, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a call without those that only outputs read which it does not ask for."""
    declared, needed = ({d.name for d in g.inputs} | {s.name for s in g.scalars} for g in (graph, chosen))
    return {name: x for name, x in inputs.items() if name in needed or name not in declared}


def _bind_inputs(
    graph: VariantGraph,
    inputs: Mapping[str, Any],
    sizes: dict[str, int],
    device: torch.device,
    dtypes: Collection[torch.dtype],
) -> tuple[dict[str, Tensor], dict[str, int | float]]:
    """The variant's own inputs and scalars, each checked against its declaration."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, int | float] = {}
    used = 0
    for decl in graph.inputs:
        value = bound_input(graph, decl, inputs, sizes, device, dtypes)
        used += decl.name in inputs
        if decl.name in graph.vectors and value.shape[-1] != sizes["d_qk"] // graph.branches:
            fail_vector(decl, value, sizes["d_qk"] // graph.branches)
        tensors[decl.name] = value
    for scalar in graph.scalars:
        if scalar.name in inputs:
            used += 1
            scalars[scalar.name] = _scalar(scalar, inputs[scalar.name])
        else:
            scalars[scalar.name] = scalar.default
    if used != len(inputs):
        fail_unknown(graph, inputs)
    return tensors, scalars


def bound_input(
    graph: VariantGraph,
    decl: InputDecl,
    inputs: Mapping[str, Any],
    sizes: dict[str, int],
    device: torch.device,
    dtypes: Collection[torch.dtype] = KERNEL_DTYPES,
) -> Tensor:
    """One input of a call, or its default. InputError where it does not match its declaration."""
    value = inputs.get(decl.name)
    if value is None:
        value = _default(graph, decl, sizes, device)
    _check_input(decl, value, sizes, device, dtypes)
    found: Tensor = value
    return found


def _default(graph: VariantGraph, decl: InputDecl, sizes: dict[str, int], device: torch.device) -> Tensor:
    if decl.default is None:
        others = ", ".join(f"{name}=..." for name in required_inputs(graph))
        raise InputError(f"'{graph.name}' needs the input '{decl.name}' {pattern_of(decl)}", remedy=f"pass {others}")
    found = decl.default(sizes)
    if decl.captured and isinstance(found, Tensor):
        return found.to(device) if found.dim() == 0 else found
    dtype = torch.int32 if decl.dtype == "int" else torch.float32
    return torch.as_tensor(found, dtype=dtype, device=device)


def _check_input(
    decl: InputDecl, value: Any, sizes: dict[str, int], device: torch.device, dtypes: Collection[torch.dtype]
) -> None:
    if not isinstance(value, Tensor):
        raise InputError(
            f"the input '{decl.name}' {pattern_of(decl)} is {kind_of(value)}, not a tensor",
            remedy=f"pass torch.tensor(...) of {wanted_of(decl)} on {device}",
        )
    if value.dim() != len(decl.pattern):
        raise InputError(
            f"the input '{decl.name}' has shape {tuple(value.shape)}, "
            f"expected {dimensions(len(decl.pattern))}: {pattern_of(decl)}"
        )
    for axis, (dim, size) in enumerate(zip(decl.pattern, value.shape, strict=True)):
        if dim in LOOP_DIMS and size != sizes[dim] and size != 1:
            raise InputError(
                f"dimension {axis} of the input '{decl.name}' {pattern_of(decl)} has size {size}, "
                f"expected {sizes[dim]}, the size of {dim}, or 1"
            )
    if value.dtype not in (_INT_DTYPES if decl.dtype == "int" else dtypes):
        raise InputError(
            f"the input '{decl.name}' is {dtype_name(value.dtype)}, declared as {decl.dtype}",
            remedy=cast_to(decl, value, dtypes),
        )
    if value.device != device:
        fail_device(device, {f"the input '{decl.name}'": value})
    if not decl.grad and torch.is_grad_enabled():
        refuse_gradient(decl, value)


def refuse_gradient(decl: InputDecl, value: Any) -> None:
    """Raise InputError where a tensor wants a gradient that its declaration does not promise."""
    if isinstance(value, Tensor) and value.requires_grad:
        remedy = f"declare it with ac.Input(..., grad=True), or pass {decl.name}.detach()"
        if decl.captured:
            remedy = f"capture a tensor that requires a gradient, or pass {decl.name}.detach()"
        raise InputError(f"the input '{decl.name}' requires a gradient, but is declared without one", remedy=remedy)


def _scalar(decl: ScalarDecl, value: Any) -> int | float:
    """A Python number of the declared class."""
    wanted = "an int" if decl.is_int else "a number"
    if isinstance(value, bool) or not isinstance(value, int if decl.is_int else int | float):
        remedy = f"pass a Python number, e.g. {decl.name}={decl.default!r}"
        if isinstance(value, Tensor):
            remedy += "; for a value that lives in a tensor, declare ac.Input() instead of ac.Scalar(...)"
        raise InputError(f"the scalar '{decl.name}' is {kind_of(value)}, expected {wanted}", remedy=remedy)
    if not math.isfinite(value):
        raise InputError(f"the scalar '{decl.name}' is {value}, expected a finite number")
    return value if decl.is_int else float(value)


def _scale(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(
            f"scale is {kind_of(value)}, expected a number", remedy="a learned scale belongs in the score stage"
        )
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"scale is {value}, expected a positive, finite number")
    return float(value)
