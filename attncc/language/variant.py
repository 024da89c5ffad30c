"""What a user writes in Python: a Variant of four stages, each a plain function whose parameters are bound by name."""

from __future__ import annotations

import dis
import inspect
import linecache
import re
from collections.abc import Callable, Mapping
from typing import Any

from attncc.errors import AttnccError, Span, SpecError
from attncc.ir.graph import LOOP_DIMS, InputDecl, ScalarDecl, VariantGraph
from attncc.ir.symbols import INDICES
from attncc.language import normalizers
from attncc.language.combinators import Mask, ScoreMod, call_by_name
from attncc.language.stages import SEES, assemble

_RESERVED = {*INDICES, *(n for names in SEES.values() for n in names), "scale", "q", "k", "v", "outputs", "qk"}


class Input:
    """A tensor that a formula reads, declared with its index pattern.

    Input("h")                       one entry a query head
    Input("b", "kv_idx", dtype="int")  one integer a key of each sequence
    Input("h", "dist", grad=True)    a learned table: `dist` is a free dimension, of whatever size the tensor has

    Dimensions named b, h, h_kv, q_idx, kv_idx have the size of the call's (size 1 broadcasts); other names are free.
    `dtype` is "float" or "int"; `grad=True` asks for a gradient. `default(sizes)` makes the value when the caller gives
    none; `sizes` has the entries b, h, h_kv, q_idx, kv_idx.
    """

    def __init__(
        self,
        *pattern: str | tuple[str, ...],
        dtype: str = "float",
        grad: bool = False,
        default: Callable[[dict[str, int]], Any] | None = None,
    ):
        flat: list[str] = []
        for p in pattern:
            flat.extend(p if isinstance(p, tuple | list) else (p,))
        if not all(isinstance(p, str) and p.isidentifier() for p in flat):
            raise SpecError(
                f"Input{tuple(flat)}: a dimension is a name",
                remedy=f"use {', '.join(LOOP_DIMS)}, or a free name such as 'bucket'",
            )
        if dtype not in ("float", "int"):
            raise SpecError(f"Input(dtype={dtype!r}): dtype is 'float' or 'int'")
        if grad and dtype == "int":
            raise SpecError("an integer input has no gradient", remedy="drop grad=True, or make it a float")
        self.pattern, self.dtype, self.grad, self.default = tuple(flat), dtype, grad, default

    def declare(self, name: str) -> InputDecl:
        """The IR's declaration of this input under a name."""
        return InputDecl(name, self.pattern, self.dtype, self.grad, self.default)


class Scalar:
    """A number bound at call time, with a default; an int default makes it an integer."""

    def __init__(self, default: int | float):
        if isinstance(default, bool) or not isinstance(default, int | float):
            raise SpecError(f"Scalar({default!r}): the default is an int or a float")
        self.default = default

    def declare(self, name: str) -> ScalarDecl:
        """The IR's declaration of this scalar under a name."""
        return ScalarDecl(name, self.default)


class Variant:
    """An attention variant. Stages not given are plain attention's: score as it is, all pairs visible, softmax, sum of w * v.

    `score` and `mask` may be functions, or composed objects such as `ac.alibi() >> ac.softcap(30)`.
    Raises SpecError, with file, line and a caret, when a stage is wrong.
    """

    graph: VariantGraph

    def __init__(
        self,
        *,
        name: str = "variant",
        inputs: Mapping[str, Input | Scalar] | None = None,
        score: Callable[..., Any] | ScoreMod | None = None,
        mask: Callable[..., Any] | Mask | None = None,
        normalizer: Callable[..., Any] | str = normalizers.softmax,
        reduction: Callable[..., Any] = normalizers.weighted_sum,
        cites: str = "",
    ):
        decls, scalars = _declarations(inputs or {})
        if isinstance(normalizer, str):
            normalizer = named_normalizer(normalizer)
        pieces: dict[str, Any] = {
            "score": ScoreMod.of(score) if score is not None else ScoreMod(lambda e: e["score"]),
            "mask": Mask.of(mask) if mask is not None else Mask.of(True),
        }
        for piece in pieces.values():
            for key, decl in piece.inputs.items():
                decls.setdefault(key, decl)
            for key, scalar in piece.scalars.items():
                scalars.setdefault(key, scalar)
        stages: dict[str, tuple[Callable[[dict[str, Any]], Any], Span | None]] = {}
        functions = {"score": score, "mask": mask, "normalizer": normalizer, "reduction": reduction}
        for stage, function in functions.items():
            code = getattr(function, "__code__", None)
            if stage in pieces:
                run = pieces[stage].run
            else:
                run = _runner(function, stage)
            stages[stage] = (_located(run, stage), _return_span(code))
        self.name = name
        self.graph = assemble(name, decls, scalars, stages, cites)

    @classmethod
    def from_graph(cls, graph: VariantGraph) -> Variant:
        """A Variant around a graph that was made elsewhere, such as by the text form."""
        self = cls.__new__(cls)
        self.name, self.graph = graph.name, graph
        return self

    def __repr__(self) -> str:
        return f"<Variant {self.name} {self.graph.digest}>"


def named_normalizer(name: str) -> Callable[..., Any]:
    """A shipped normalizer by name."""
    if name not in normalizers.TABLE:
        raise SpecError(
            f"no normalizer is called '{name}'", stage="normalizer", remedy=f"shipped: {', '.join(normalizers.TABLE)}"
        )
    return normalizers.TABLE[name]


def _declarations(
    inputs: Mapping[str, Input | Scalar],
) -> tuple[dict[str, InputDecl], dict[str, ScalarDecl]]:
    decls: dict[str, InputDecl] = {}
    scalars: dict[str, ScalarDecl] = {}
    for name, declared in inputs.items():
        check_name(name)
        if isinstance(declared, Scalar):
            scalars[name] = declared.declare(name)
        elif isinstance(declared, Input):
            decls[name] = declared.declare(name)
        else:
            raise SpecError(
                f"inputs['{name}'] is {type(declared).__name__}", remedy="declare ac.Input(...) or ac.Scalar(...)"
            )
    return decls, scalars


def check_name(name: str) -> None:
    """Raise SpecError unless `name` can name an input."""
    from attncc.language.functions import TABLE

    if name in _RESERVED or name in TABLE:
        raise SpecError(f"the input name '{name}' already means something else", remedy="rename the input")
    if not name.isidentifier() or re.fullmatch(r"row_(max|sum)_\d+|raw_score|out|mask|lse", name):
        raise SpecError(f"'{name}' cannot name an input", remedy="use an identifier that no stage defines")


def _runner(function: Callable[..., Any], stage: str) -> Callable[[dict[str, Any]], Any]:
    if not callable(function):
        raise SpecError(f"the {stage} is {type(function).__name__}, not a function", stage=stage)
    return lambda env: call_by_name(function, env, stage)


def _located(run: Callable[[dict[str, Any]], Any], stage: str) -> Callable[[dict[str, Any]], Any]:
    """Run a stage's function; an error gets the place in the user's source where it happened."""

    def located(env: dict[str, Any]) -> Any:
        try:
            return run(env)
        except AttnccError as error:
            if isinstance(error, SpecError):
                raise error.at(_traceback_span(error), stage) from None
            raise
        except Exception as error:  # a user's function may raise anything; the finding is where and why
            raise SpecError(
                f"the {stage} function raised {type(error).__name__}: {error}",
                stage=stage,
                span=_traceback_span(error),
            ) from error

    return located


def _traceback_span(error: BaseException) -> Span | None:
    """The innermost place of the traceback that lies outside this package: the user's own expression."""
    found = None
    tb = error.__traceback__
    while tb is not None:
        if not tb.tb_frame.f_globals.get("__name__", "").startswith(("attncc.", "sympy.")):
            found = tb
        tb = tb.tb_next
    if found is None:
        return None
    code = found.tb_frame.f_code
    positions = list(code.co_positions())[found.tb_lasti // 2]
    return _span(code.co_filename, positions)


def _return_span(code: Any) -> Span | None:
    """Where a function's result is: the expression whose value its last instruction returns."""
    if code is None:
        return None
    last = [i for i in dis.get_instructions(code) if i.opname not in ("RETURN_VALUE", "RETURN_CONST", "CACHE")]
    position = last[-1].positions if last else None
    if position is None:
        return None
    return _span(code.co_filename, (position.lineno, position.end_lineno, position.col_offset, position.end_col_offset))


def _span(filename: str, positions: tuple[int | None, int | None, int | None, int | None]) -> Span | None:
    line, end_line, col, end_col = positions
    if line is None or col is None or end_col is None:
        return None
    text = linecache.getline(filename, line).rstrip("\n")
    return Span(filename, line, col, end_col if end_line == line else len(text), text)


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names a stage function uses."""
    return tuple(inspect.signature(function).parameters)
