"""Every case is checked before it is timed: the very call that will be timed, at full size, on fresh random data.

Heads are independent, so one (batch, key/value head) slice of the full-size result is held against the float64
reference of that slice alone, by the project's own two rules (attncc.runtime.verify): the output and the gradients of
q, k and v; those of the inputs at a shorter length, since no time is taken of them. Where FlexAttention says the same
thing, all heads are compared with it too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch

import attncc as ac
from attncc.ir import symbols as sym
from attncc.ir.vocabulary import Read
from attncc.runtime.verify import Kind, check, eager
from bench.case import Case, Shape, Tensors

#: RMS(error) / RMS(expected) against another 16-bit kernel, whose own error comes on top of ours
PEER_TOLERANCE = 1e-2
#: the gradients of q, k and v; a variant whose v is part of k has the first two
OPERANDS = ("dq", "dk", "dv")
#: where gradients of inputs are checked: the reference sums them over a list of all pairs, one after the other
SHORT = 1024


class CheckFailedError(Exception):
    """A result is wrong: no time may be reported for it."""


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS(actual - expected) / RMS(expected), in float64; NaN in either gives NaN. A zero `expected` asks for zeros."""
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    scale = expected.double().square().mean().sqrt()
    return float(difference / scale) if scale != 0 else float(difference)


def require(errors: dict[str, float], limit: float, against: str) -> None:
    """Raise CheckFailedError naming every entry over `limit`; NaN is over any limit."""
    wrong = {name: error for name, error in errors.items() if not error <= limit}
    if wrong:
        listed = ", ".join(f"{name} {error:.2e}" for name, error in wrong.items())
        raise CheckFailedError(f"against {against}, RMS(error) / RMS(expected) is over {limit:.0e}: {listed}")


def poison(*like: torch.Tensor) -> None:
    """Leave NaN in the memory that the next allocations of these sizes will get, so that an unwritten output shows."""
    held = [torch.full_like(t, float("nan")) for t in like]
    del held


def gradients(
    out: torch.Tensor, grad: torch.Tensor, wanted: dict[str, torch.Tensor], **options: Any
) -> dict[str, torch.Tensor]:
    """Gradients by name."""
    return dict(
        zip(
            wanted,
            torch.autograd.grad(out, list(wanted.values()), grad, **options, materialize_grads=True),
            strict=True,
        )
    )


def numbers_heads(variant: Any) -> bool:
    """Does a formula compute with the number of a head, and not only look something up by it?"""
    exprs = [s.expr for s in variant.graph.stages]
    bare = [e.xreplace({read: sympy.Dummy() for read in e.atoms(Read)}) for e in exprs]
    return any(e.free_symbols & {sym.H, sym.H_KV} for e in bare)


def slice_inputs(variant: Any, inputs: Tensors, b: int, heads: slice, kv_heads: slice) -> Tensors:
    """The inputs that a slice of one batch and some heads of a call reads, cut by the declared index patterns."""
    cuts = {"b": slice(b, b + 1), "h": heads, "h_kv": kv_heads}
    patterns = {decl.name: decl.pattern for decl in variant.graph.inputs}
    sliced = {}
    for name, tensor in inputs.items():
        index = tuple(
            cuts[dim] if dim in cuts and size > 1 else slice(None)
            for dim, size in zip(patterns[name], tensor.shape, strict=True)
        )
        sliced[name] = tensor[index]
    return sliced


def against_reference(op: Any, case: Case, shape: Shape, device: str = "cuda") -> dict[str, float]:
    """Hold a call at `shape` against the reference, and the gradients of inputs at a length of SHORT.

    Returns relative RMS errors by name, for the record; raises CheckFailedError.
    """
    if case.differentiable and shape.m <= SHORT and shape.n <= SHORT:
        return _slice_errors(op, case, shape, device, case.differentiable)
    errors = _slice_errors(op, case, shape, device, ())
    if case.differentiable:
        short = replace(shape, m=min(shape.m, SHORT), n=min(shape.n, SHORT))
        found = _slice_errors(op, case, short, device, case.differentiable)
        errors |= {name: error for name, error in found.items() if name not in errors}
    return errors


def _slice_errors(op: Any, case: Case, shape: Shape, device: str, differentiable: tuple[str, ...]) -> dict[str, float]:
    """Hold the last (batch, key/value head) slice of a call against the reference of that slice.

    Of a formula that tells heads apart by their number: the first two key/value heads, whose numbers are those there.

    The cotangent is zero outside the slice: an input that all heads or batches share gets its gradient from it alone.
    """
    b = shape.b - 1
    kv = slice(0, 2) if numbers_heads(case.variant) else slice(shape.hkv - 1, shape.hkv)
    heads = slice(kv.start * shape.group, kv.stop * shape.group)
    one = slice(b, b + 1)
    operands = shape.tensors(device, seed=1)
    names = OPERANDS[: len(operands)]
    inputs = case.inputs(shape, device)
    for name in differentiable:
        inputs[name].requires_grad_()
    grad = torch.zeros((shape.b, shape.h, shape.m, shape.dv), device=device, dtype=shape.dtype)
    grad[one, heads] = torch.randn_like(grad[one, heads])

    poison(grad, *(t.detach() for t in operands))
    out = op(*operands, **inputs)
    named = {f"d{name}": inputs[name] for name in differentiable}
    got = gradients(out, grad, {**dict(zip(names, operands, strict=True)), **named})
    shared = {name: got[f"d{name}"] for name in differentiable}
    parts = {
        "out": out.detach()[one, heads],
        **{name: got[name][one, heads if name == "dq" else kv] for name in names},
        **{f"d{n}": part for n, part in slice_inputs(case.variant, shared, b, heads, kv).items()},
    }

    own = slice_inputs(case.variant, inputs, b, heads, kv)

    def dense(attend: Callable[..., Any], wide: bool) -> Tensors:
        """The slice through a quadratic implementation, in float64 or in the dtypes of the call."""

        def cast(t: torch.Tensor) -> torch.Tensor:
            t = t.detach()
            return t.double() if wide and t.is_floating_point() else t

        ends = {
            name: cast(t[one, heads if name == "dq" else kv]).requires_grad_()
            for name, t in zip(names, operands, strict=True)
        }
        sequences = tuple(ends.values())
        read: dict[str, Any] = {name: cast(t).requires_grad_(name in differentiable) for name, t in own.items()}
        ends |= {f"d{name}": read[name] for name in differentiable}
        result = attend(case.variant, *sequences, **read)
        return {"out": result.detach(), **gradients(result, grad[one, heads].to(result), ends)}

    exact, plain = dense(ac.reference, wide=True), dense(eager, wide=False)
    errors = {}
    for name, part in parts.items():
        kind: Kind = "forward" if name == "out" else "gradient"
        found = check(name, part, exact[name], plain[name], kind, dtype=shape.dtype)
        if not found.ok:
            raise CheckFailedError(
                f"against the float64 reference, {name}: largest error {found.max_err:.2e} (at most "
                f"{found.max_allowed:.2e}), RMS {found.rms:.2e} (at most {found.rms_allowed:.2e})"
            )
        errors[name] = float(f"{relative_rms(part, exact[name]):.3g}")
    return errors


def against_peer(
    ours: torch.Tensor, theirs: torch.Tensor, operands: Sequence[torch.Tensor], grad: torch.Tensor, name: str
) -> dict[str, float]:
    """Errors of all heads against the output and gradients of the peer `name`; both graphs are kept."""
    leaves = dict(zip(OPERANDS, operands, strict=False))
    actual, expected = (gradients(out, grad, leaves, retain_graph=True) for out in (ours, theirs))
    errors = {"out": relative_rms(ours.detach(), theirs.detach())}
    errors |= {name: relative_rms(actual[name], expected[name]) for name in leaves}
    require(errors, PEER_TOLERANCE, name)
    return {name: float(f"{error:.3g}") for name, error in errors.items()}
