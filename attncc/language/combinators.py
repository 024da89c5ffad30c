"""Masks and score modifiers as objects that compose: `causal & window(64) | prefix(n)`, `alibi() >> softcap(30)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from attncc.ir.graph import InputDecl, ScalarDecl
from attncc.language.places import use_span
from attncc.language.values import fail, lift

Environment = Mapping[str, Any]


def call_by_name(function: Callable[..., Any], env: Environment, stage: str) -> Any:
    """Call `function` with the entries of `env` that its parameters name; another parameter needs a default."""
    from attncc.language.stages import unknown_name

    arguments = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            fail(f"the {stage} function takes *{name}; its parameters are bound by name", "name what it uses")
        if name in env:
            arguments[name] = env[name]
        elif parameter.default is parameter.empty:
            raise unknown_name(name, stage, env).at(use_span(function, name))
    return function(**arguments)


def _refuse_maker(x: Any, made: str) -> None:
    """Raise SpecError where x makes a piece when it is called: `ac.sliding_window` in place of
    `ac.sliding_window(64)`."""
    if inspect.isfunction(x) and x.__annotations__.get("return") in ("Mask", "ScoreMod"):
        parameters = inspect.signature(x).parameters.values()
        given = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
        fail(f"ac.{x.__name__} makes {made} when it is called", f"call it: ac.{x.__name__}({', '.join(given)})")


#: what a text as a stage of a Variant lacks
_TEXT = "write a function: lambda {}; as text a formula is part of a TOML file, see ac.loads_toml"
#: what an array as a mask lacks
_DENSE = (
    "a mask is a formula; a dense one is an input m, ac.Input('q_idx', 'kv_idx', dtype='int'), and the mask "
    "lambda q_idx, kv_idx, m: m[q_idx, kv_idx] != 0"
)


class Piece:
    """A stage function plus the inputs and scalars that it brings along."""

    stage = ""
    _joined = ""

    def __init__(
        self,
        run: Callable[[Environment], Any],
        inputs: Mapping[str, InputDecl] | None = None,
        scalars: Mapping[str, ScalarDecl] | None = None,
        label: str = "",
    ):
        self.run = run
        self.inputs = dict(inputs or {})
        self.scalars = dict(scalars or {})
        self.label = label

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.label}>"

    def __bool__(self) -> bool:
        # `causal and prefix(4)` would be prefix(4) alone, and `not causal` would be False
        fail(
            f"a {self.stage} has no truth value: `and`, `or`, `not` and `if` do not join it with another", self._joined
        )

    def _merge(self, other: Piece) -> tuple[dict[str, InputDecl], dict[str, ScalarDecl]]:
        for name in self.inputs.keys() & other.inputs.keys():
            if self.inputs[name] != other.inputs[name]:
                fail(f"both sides declare the input '{name}', with different patterns", "rename one of them")
        for name in self.scalars.keys() & other.scalars.keys():
            if self.scalars[name] != other.scalars[name]:
                fail(f"both sides declare the scalar '{name}', with different defaults", "rename one of them")
        return {**self.inputs, **other.inputs}, {**self.scalars, **other.scalars}


class Mask(Piece):
    """A boolean over (query, key): `&`, `|`, `~` compose. A plain function of the stage's names may stand beside it."""

    stage = "mask"
    _joined = "write & for and, | for or, ~ for not: ac.causal & ac.sliding_window(64)"

    @classmethod
    def of(cls, x: Any) -> Mask:
        """A Mask from a Mask, a boolean, or a function whose parameters are names that the mask stage sees."""
        if isinstance(x, Mask):
            return x
        if isinstance(x, bool):
            return cls(lambda env: lift(x), label=str(x))
        _refuse_maker(x, "a mask")
        if callable(x):
            return cls(lambda env: call_by_name(x, env, "mask"), label=getattr(x, "__name__", "mask"))
        remedy = "a mask is a function of indices, or composed of ac.causal and its like"
        if isinstance(x, str):
            remedy = _TEXT.format("q_idx, kv_idx: kv_idx <= q_idx")
        elif hasattr(x, "shape"):
            remedy = _DENSE
        fail(f"{type(x).__name__} is no mask", remedy)

    def __and__(self, other: Any) -> Mask:
        right = Mask.of(other)
        return Mask(lambda e: lift(self.run(e)) & right.run(e), *self._merge(right), f"({self.label} & {right.label})")

    def __or__(self, other: Any) -> Mask:
        right = Mask.of(other)
        return Mask(lambda e: lift(self.run(e)) | right.run(e), *self._merge(right), f"({self.label} | {right.label})")

    def __rand__(self, other: Any) -> Mask:
        return Mask.of(other) & self

    def __ror__(self, other: Any) -> Mask:
        return Mask.of(other) | self

    def __invert__(self) -> Mask:
        return Mask(lambda e: ~lift(self.run(e)), self.inputs, self.scalars, f"~{self.label}")


class MaskFamily(Mask):
    """A mask that is usable as it is, and callable for its options: `causal`, `causal(align="start")`."""

    def __init__(self, build: Callable[..., Mask]):
        default = build()
        super().__init__(default.run, default.inputs, default.scalars, default.label)
        self._build = build
        self.__doc__ = build.__doc__

    def __call__(self, **options: Any) -> Mask:
        return self._build(**options)


class ScoreMod(Piece):
    """A function of the score: `a >> b` applies a, then b."""

    stage = "score"
    _joined = "write >> for one after the other: ac.alibi() >> ac.softcap(30.0)"

    @classmethod
    def of(cls, x: Any) -> ScoreMod:
        """A ScoreMod from a ScoreMod or a function whose parameters are names that the score stage sees."""
        if isinstance(x, ScoreMod):
            return x
        _refuse_maker(x, "a score modifier")
        if callable(x) and not isinstance(x, Mask):
            return cls(lambda env: call_by_name(x, env, "score"), label=getattr(x, "__name__", "score"))
        remedy = "it is a function of score, or made by ac.softcap and its like"
        fail(f"{type(x).__name__} is no score modifier", _TEXT.format("score: ...") if isinstance(x, str) else remedy)

    def __rshift__(self, other: Any) -> ScoreMod:
        right = ScoreMod.of(other)
        return ScoreMod(
            lambda e: right.run({**e, "score": lift(self.run(e))}),
            *self._merge(right),
            f"{self.label} >> {right.label}",
        )

    def __rrshift__(self, other: Any) -> ScoreMod:
        return ScoreMod.of(other) >> self
