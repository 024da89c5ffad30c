"""`ac.from_flex`: read a user's unmodified score_mod and mask_mod as a variant."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.nn.attention.flex_attention import BlockMask

from attncc.errors import AttnccError, Span, SpecError
from attncc.ir import symbols as sym
from attncc.ir.text import formula
from attncc.language import normalizers
from attncc.language.combinators import call_by_name
from attncc.language.flex.blocks import with_table
from attncc.language.flex.captures import TRACE
from attncc.language.flex.cells import Cell, cell, truth
from attncc.language.flex.symbolic import Symbolic, cells_of
from attncc.language.flex.tracer import Tracer, arguments
from attncc.language.places import return_span, traceback_span
from attncc.language.stages import assemble
from attncc.language.values import Value, fail, number
from attncc.language.variant import Variant, named_normalizer

Mod = Callable[..., Any]


def from_flex(
    score_mod: Mod | None = None,
    mask_mod: Mod | BlockMask | None = None,
    *,
    name: str | None = None,
    normalizer: Callable[..., Any] | str = normalizers.softmax,
    cites: str = "",
) -> Variant:
    """FlexAttention's `score_mod(score, b, h, q_idx, kv_idx)` and `mask_mod(b, h, q_idx, kv_idx)` as a variant.

    The functions are called once, on tensors that stand for their arguments. They may use PyTorch's element-wise
    functions, comparisons and casts, captured tensors indexed by anything that they compute, and a score of -inf where
    a pair is hidden. A captured tensor becomes an input that is bound to it: the op needs no further argument, the
    gradient reaches the tensor if it requires one, and another tensor may be passed under the input's name.
    `mask_mod` may be a BlockMask: its mask_mod, and its table of blocks where that hides or shows more.

    As in FlexAttention q_idx and kv_idx count from the first row and key, so that `q_idx >= kv_idx` is causal aligned
    to the start; a row that sees no key gives 0. Raises SpecError, with the line, for what the language cannot take: an
    operation in place, a branch in Python on an index or a score, random numbers, a function outside the vocabulary.
    """
    tracer = Tracer()
    score, visible = Cell(Value(sym.RAW_SCORE)), Cell(Value(sympy.true))
    if score_mod is not None:
        score = _run(tracer, score_mod, "score_mod")
    if isinstance(mask_mod, BlockMask):
        visible = with_table(mask_mod, _run(tracer, mask_mod.mask_mod, "mask_mod"), tracer.captures)
        mask_mod = mask_mod.mask_mod
    elif mask_mod is not None:
        visible = _run(tracer, mask_mod, "mask_mod")
    # the negation moved inwards, so that tiles are told apart by each comparison
    shown = Value(sympy.And(visible.value.expr, sympy.to_nnf(sympy.Not(score.hidden), simplify=False)))
    if isinstance(normalizer, str):
        normalizer = named_normalizer(normalizer)
    evaluate: dict[str, tuple[Callable[[dict[str, Any]], Any], Span | None]] = {
        "score": (lambda env: score.value, _place(score_mod)),
        "mask": (lambda env: shown, _place(mask_mod) or _place(score_mod)),
        "normalizer": (lambda env: call_by_name(normalizer, env, "normalizer"), return_span(normalizer)),
        "reduction": (lambda env: call_by_name(normalizers.weighted_sum, env, "reduction"), None),
    }
    used = {s.name for e in (score.value.expr, shown.expr) for s in e.free_symbols}
    called = name or "_".join(_called(f) for f in (score_mod, mask_mod) if f is not None) or "flex"
    return Variant.from_graph(assemble(called, tracer.captures.declarations(used), {}, evaluate, cites))


def _run(tracer: Tracer, mod: Any, kind: str) -> Cell:
    """The result of a user's function; an error gets the place in the user's source where it happened."""
    try:
        result = trace_function(tracer, mod, kind)
        return _score(result) if kind == "score_mod" else _mask(result)
    except AttnccError as error:
        if isinstance(error, SpecError):
            raise error.at(traceback_span(error), kind).at(_place(mod)) from None
        raise
    except Exception as error:  # a user's function may raise anything; the finding is where and why
        raise SpecError(
            f"the function raised {type(error).__name__}: {error}", stage=kind, span=traceback_span(error)
        ) from error


def trace_function(tracer: Tracer, mod: Any, kind: str) -> Any:
    """Call a user's function on symbolic arguments."""
    if not callable(mod):
        fail(f"the {kind} is {type(mod).__name__}, not a function", f"pass {kind}=f with f({', '.join(_TAKES[kind])})")
    other = "mask_mod" if kind == "score_mod" else "score_mod"
    if not _takes(mod, kind) and _takes(mod, other):
        fail(
            f"the {kind} does not take the {len(_TAKES[kind])} arguments of one", f"as a {other} it would do: {other}=f"
        )
    given = arguments(kind == "score_mod")
    with tracer:
        result = mod(*given)
        if isinstance(result, torch.Tensor) and not isinstance(result, Symbolic):
            result = tracer.lifted(result)
    return result


assert trace_function.__name__ == TRACE

_TAKES = {
    "score_mod": ("score", "b", "h", "q_idx", "kv_idx"),
    "mask_mod": ("b", "h", "q_idx", "kv_idx"),
}


def _takes(mod: Callable[..., Any], kind: str) -> bool:
    """Whether the function can be called as one of this kind, judging by its signature."""
    try:
        inspect.signature(mod).bind(*_TAKES[kind])
    except TypeError:
        return False
    except ValueError:
        return True  # it does not say
    return True


def _score(result: Any) -> Cell:
    """The result of a score_mod, checked: one number per pair."""
    score = _one(result)
    if score.value.type == "bool":
        fail("the result is a boolean", "return the score: torch.where(visible, score, -float('inf'))")
    number(score.value)
    if score.hidden is not sympy.false and sym.RAW_SCORE in score.hidden.free_symbols:
        fail(
            f"a pair is hidden by its own score, where {formula(score.hidden).replace('raw_score', 'score')}",
            "hide pairs by index or captured tensors; a threshold on scores belongs in a normalizer",
        )
    return score


def _mask(result: Any) -> Cell:
    """The result of a mask_mod, checked: one boolean per pair."""
    visible = _one(result)
    if visible.value.type != "bool":
        fail(
            f"the result is a number, not a boolean: '{formula(visible.value.expr)}'",
            "return a comparison, or x != 0",
        )
    return Cell(truth(visible))


def _one(result: Any) -> Cell:
    if isinstance(result, bool | int | float):
        return cell(result)
    if not isinstance(result, Symbolic):
        fail(f"the result is {type(result).__name__}, not a tensor", "does it return what it computes?")
    if result.dim():
        fail(f"the result is a tensor of shape {tuple(result.shape)}, not one element a pair")
    found: Any = cells_of(result)[()]
    return cell(found)


def _place(mod: Any) -> Span | None:
    """Where a function's result is; that of a callable object is where its own function's is."""
    if mod is None or hasattr(mod, "__code__"):
        return return_span(mod)
    inner = getattr(mod, "func", None) or getattr(mod, "forward", None) or type(mod).__dict__.get("__call__")
    return return_span(getattr(inner, "__func__", inner))


def _called(mod: Any) -> str:
    name = getattr(mod, "__name__", None) or getattr(getattr(mod, "func", None), "__name__", type(mod).__name__)
    return str(name).strip("<>")
