"""`Variant`, the Python form: five stages, each a plain function whose parameters are bound by name."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attncc.errors import AttnccError, Span, SpecError
from attncc.ir.graph import LOOP_DIMS, InputDecl, ScalarDecl, VariantGraph
from attncc.language import normalizers
from attncc.language.combinators import Mask, ScoreMod, call_by_name
from attncc.language.outputs import OutputSpec
from attncc.language.places import return_span, traceback_span
from attncc.language.recurrence import Recurrence, assemble_recurrence
from attncc.language.stages import add_outputs, assemble

#: each takes an accumulator of its own, and there are only so many registers
MAX_BRANCHES = 4
#: what a row may do that sees no key
DEAD_ROWS = ("zero", "open", "uniform")


class Input:
    """A tensor that a formula reads, declared with its index pattern.

    Input("h")                       one entry a query head
    Input("b", "kv_idx", dtype="int")  one integer a key of each sequence
    Input("h", "dist", grad=True)    a learned table: `dist` is a free dimension, of whatever size the tensor has

    Input("h", "d", grad=True)       a vector of each query head, as long as q_vec and k_vec: read as u[h]
    Input("d", grad=True)            one vector for all: read as u

    Dimensions named b, h, h_kv, q_idx, kv_idx have the size of the call's (size 1 broadcasts); other names are free.
    The similarity stage reads an input whose last dimension is named d as a vector, without that index.
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
        for dim in flat:
            _check_free(dim, flat)
        if dtype not in ("float", "int"):
            truth = "booleans are integers: dtype='int', and x[...] != 0 where a condition is wanted"
            remedy = truth if dtype in ("bool", bool) else None
            raise SpecError(f"Input(dtype={dtype!r}): dtype is 'float' or 'int'", remedy=remedy)
        if grad and dtype == "int":
            raise SpecError("an integer input has no gradient", remedy="drop grad=True, or make it a float")
        self.pattern, self.dtype, self.grad, self.default = tuple(flat), dtype, grad, default

    def __repr__(self) -> str:
        given = [*map(repr, self.pattern), *([] if self.dtype == "float" else [f"dtype={self.dtype!r}"])]
        given += ["grad=True"] * self.grad + [f"default={self.default!r}"] * (self.default is not None)
        return f"Input({', '.join(given)})"

    def declare(self, name: str) -> InputDecl:
        """The IR's declaration of this input under a name."""
        return InputDecl(name, self.pattern, self.dtype, self.grad, self.default)


#: names that people give the indices of the loop elsewhere
_ELSEWHERE = {
    **dict.fromkeys(("head", "heads", "num_heads"), "h"),
    **dict.fromkeys(("kv_head", "kv_heads", "num_kv_heads"), "h_kv"),
    **dict.fromkeys(("batch", "bs"), "b"),
    **dict.fromkeys(("q", "query", "queries", "q_len"), "q_idx"),
    **dict.fromkeys(("k", "kv", "key", "keys", "kv_len"), "kv_idx"),
}


def _check_free(dim: str, pattern: Sequence[str]) -> None:
    """Raise SpecError if the name of a free dimension, whose size no call checks, looks like a loop index."""
    near = [] if dim in LOOP_DIMS else difflib.get_close_matches(dim, ("q_idx", "kv_idx"), n=1, cutoff=0.8)
    meant = _ELSEWHERE.get(dim) or (near[0] if near else None)
    if meant is not None:
        raise SpecError(
            f"Input{tuple(pattern)}: '{dim}' would be a free dimension, whose size no call checks",
            remedy=f"write '{meant}' for that index of the loop, or give a free dimension another name",
        )


class Scalar:
    """A number bound at call time, with a default; an int default makes it an integer."""

    def __init__(self, default: int | float):
        if isinstance(default, bool) or not isinstance(default, int | float):
            raise SpecError(f"Scalar({default!r}): the default is an int or a float")
        if not math.isfinite(default):
            raise SpecError(f"Scalar({default!r}): the default is a finite number")
        self.default = default

    def __repr__(self) -> str:
        return f"Scalar({self.default!r})"

    def declare(self, name: str) -> ScalarDecl:
        """The IR's declaration of this scalar under a name."""
        return ScalarDecl(name, self.default)


class Variant:
    """An attention variant: five stages, each of which defaults to plain attention's.

    similarity: a function that returns the raw score; default scale * dot(q_vec, k_vec).
    score: a function, or a composed object such as `ac.alibi() >> ac.softcap(30)`; default the raw score.
    mask: a function that returns a boolean, or a composed mask; default every pair is visible.
    normalizer: a function that returns the weight of a pair, or the name of a shipped one; default softmax.
    reduction: a function that returns the output row; default row.sum(weight * v_vec).
    inputs: the tensors (`Input`) and numbers (`Scalar`) that the stages read, by name.
    branches: with 2 or more, a pair has weights `weight[0]`, `weight[1]`, ..., and `out` is a sum of them times v. q
        holds the branches side by side along its last dimension, and so does k unless they share it. Every stage but
        the reduction is evaluated for each `branch`, an integer that it may use.
    value: "k[:512]" makes v the first 512 elements of each key; a call then passes no v.
    dead_rows: what a fully masked row does. "zero": it gives 0; "open": it sees all keys; "uniform": it weighs all keys
        equally, like a large finite negative score in place of -inf.
    outputs: auxiliary outputs by name, each one of `ac.outputs` or a function as described there. A call computes those
        that it asks for.
    recurrence: an `ac.recurrence(...)`, in place of all stages.

    Raises SpecError, with file, line and a caret, if a stage is wrong.
    """

    graph: VariantGraph

    def __init__(
        self,
        *,
        name: str = "variant",
        inputs: Mapping[str, Input | Scalar] | None = None,
        similarity: Callable[..., Any] | None = None,
        score: Callable[..., Any] | ScoreMod | None = None,
        mask: Callable[..., Any] | Mask | None = None,
        normalizer: Callable[..., Any] | str = normalizers.softmax,
        reduction: Callable[..., Any] = normalizers.weighted_sum,
        branches: int = 1,
        value: str | None = None,
        dead_rows: str = "zero",
        cites: str = "",
        outputs: Mapping[str, Callable[..., Any] | OutputSpec] | None = None,
        recurrence: Recurrence | None = None,
    ):
        self.name = name
        if recurrence is not None:
            of_pairs = {
                "similarity": similarity is not None,
                "score": score is not None,
                "mask": mask is not None,
                "normalizer": normalizer is not normalizers.softmax,
                "reduction": reduction is not normalizers.weighted_sum,
                "branches": branches != 1,
                "value": value is not None,
                "dead_rows": dead_rows != "zero",
                "outputs": bool(outputs),
            }
            check_alone([key for key, given in of_pairs.items() if given])
            self.graph = _recurrent(name, inputs or {}, recurrence, cites)
            return
        check_branches(branches, reduced=reduction is not normalizers.weighted_sum)
        check_dead_rows(dead_rows, branches)
        decls, scalars = declarations(inputs or {})
        if isinstance(normalizer, str):
            normalizer = named_normalizer(normalizer)
        pieces: dict[str, Any] = {
            "score": ScoreMod.of(score) if score is not None else ScoreMod(lambda e: e["score"]),
            "mask": Mask.of(mask) if mask is not None else Mask.of(True),
        }
        specs = _specs(outputs or {})
        for piece in (*pieces.values(), *specs.values()):
            for key, decl in piece.inputs.items():
                decls.setdefault(key, decl)
            for key, scalar in piece.scalars.items():
                scalars.setdefault(key, scalar)
        stages: dict[str, tuple[Callable[[dict[str, Any]], Any], Span | None]] = {}
        functions = {"score": score, "mask": mask, "normalizer": normalizer, "reduction": reduction}
        if similarity is not None:
            functions["similarity"] = similarity
        for stage, function in functions.items():
            run = pieces[stage].run if stage in pieces else runner(function, stage)
            stages[stage] = (located(run, stage), return_span(function))
        auxiliary = _located_specs(specs, outputs or {})
        try:
            graph = assemble(name, decls, scalars, stages, cites, branches, auxiliary)
        except AttnccError as error:
            raise error.with_traceback(None) from None  # it says where in the user's formula; our frames say no more
        length = value_of_key(value, branches) if value is not None else None
        self.graph = graph.changed(value=length, dead_rows=dead_rows)

    @classmethod
    def from_graph(cls, graph: VariantGraph) -> Variant:
        """A Variant around an existing graph, such as one from the text form."""
        self = cls.__new__(cls)
        self.name, self.graph = graph.name, graph
        return self

    def with_outputs(self, **outputs: Callable[..., Any] | OutputSpec) -> Variant:
        """This variant with further auxiliary outputs: `variant.with_outputs(entropy=ac.outputs.entropy)`.

        A formula may read the variant's inputs, and those that a ready-made output brings along.
        """
        if self.graph.recurrent:
            check_alone(["outputs"])
        specs = _specs(outputs)
        decls: dict[str, InputDecl] = {}
        scalars: dict[str, ScalarDecl] = {}
        for spec in specs.values():
            decls |= spec.inputs
            scalars |= spec.scalars
        known: dict[str, InputDecl | ScalarDecl] = {d.name: d for d in self.graph.inputs}
        known |= {s.name: s for s in self.graph.scalars}
        for name, decl in {**decls, **scalars}.items():
            if name in known and known[name] != decl:
                raise SpecError(
                    f"the variant and an output declare '{name}' differently", remedy="name the output's own otherwise"
                )
        return Variant.from_graph(add_outputs(self.graph, decls, scalars, _located_specs(specs, outputs)))

    def __repr__(self) -> str:
        return f"<Variant {self.name} {self.graph.digest}>"


def check_alone(others: Sequence[str]) -> None:
    """Raise SpecError where a recurrence stands beside what is said of pairs."""
    if others:
        raise SpecError(
            f"a recurrence and '{others[0]}': a state goes from token to token, and has no pairs",
            remedy=f"drop '{others[0]}'; a recurrence says by itself what a token sees, and reads inputs",
        )


def _recurrent(name: str, inputs: Mapping[str, Input | Scalar], recurrence: Recurrence, cites: str) -> VariantGraph:
    decls, scalars = declarations(inputs)
    evaluate = {
        key: (located(runner(function, key), key), return_span(function))
        for key, function in recurrence.functions.items()
    }
    return assemble_recurrence(name, decls, scalars, evaluate, cites)


def check_branches(count: Any, reduced: bool) -> None:
    """Raise SpecError unless a variant can have so many branches, and the reduction, if it is given, tells how they
    add up."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_BRANCHES:
        raise SpecError(f"branches is {count!r}", remedy=f"a variant has 1 to {MAX_BRANCHES} branches")
    if count > 1 and not reduced:
        raise SpecError(
            f"there are {count} branches, and no reduction says how their weights add up",
            remedy="give one, such as row.sum((weight[0] - weight[1]) * v_vec)",
        )


def check_dead_rows(policy: Any, branches: int) -> None:
    """Raise SpecError unless it says what rows do that see no key."""
    if policy not in DEAD_ROWS:
        raise SpecError(f"dead_rows is {policy!r}", remedy=f"it is one of: {', '.join(DEAD_ROWS)}")
    if policy != "zero" and branches > 1:
        raise SpecError(
            f"dead_rows = '{policy}' with {branches} branches, whose masks may differ",
            remedy="let every row see a key: mask = (...) | (kv_idx == q_idx)",
        )


def value_of_key(text: Any, branches: int) -> int:
    """How many elements of a key are its value, from "k[:512]". Raises SpecError for anything else."""
    found = re.fullmatch(r"\s*k\s*\[\s*:\s*(\d+)\s*\]\s*", text) if isinstance(text, str) else None
    if found is None or int(found[1]) < 1:
        raise SpecError(f"the value is {text!r}", remedy='write value = "k[:512]" for the first 512 elements of k')
    if branches > 1:
        raise SpecError("v cannot be a part of k where k has several branches", remedy="pass v")
    return int(found[1])


def named_normalizer(name: str) -> Callable[..., Any]:
    """A shipped normalizer by name."""
    if name not in normalizers.TABLE:
        near = difflib.get_close_matches(name, normalizers.TABLE, n=1)
        remedy = f"did you mean '{near[0]}'?" if near else f"shipped: {', '.join(normalizers.TABLE)}"
        raise SpecError(f"no normalizer is called '{name}'", stage="normalizer", remedy=remedy)
    return normalizers.TABLE[name]


def declarations(
    inputs: Mapping[str, Input | Scalar],
) -> tuple[dict[str, InputDecl], dict[str, ScalarDecl]]:
    """The user's declarations in the IR: inputs and scalars. SpecError: any that is neither."""
    decls: dict[str, InputDecl] = {}
    scalars: dict[str, ScalarDecl] = {}
    for name, declared in inputs.items():
        if isinstance(declared, Scalar):
            scalars[name] = declared.declare(name)
        elif isinstance(declared, Input):
            decls[name] = declared.declare(name)
        else:
            raise SpecError(
                f"inputs['{name}'] is {type(declared).__name__}", remedy="declare ac.Input(...) or ac.Scalar(...)"
            )
    return decls, scalars


def _specs(outputs: Mapping[str, Any]) -> dict[str, OutputSpec]:
    specs = {}
    for name, given in outputs.items():
        try:
            specs[name] = OutputSpec.of(given)
        except SpecError as error:
            raise error.at(None, f"output '{name}'") from None
    return specs


def _located_specs(
    specs: Mapping[str, OutputSpec], outputs: Mapping[str, Any]
) -> dict[str, tuple[Callable[[dict[str, Any]], Any], Span | None]]:
    return {name: (located(spec.run, f"output '{name}'"), return_span(outputs[name])) for name, spec in specs.items()}


def runner(function: Any, stage: str) -> Callable[[dict[str, Any]], Any]:
    """A user's function as one of all names that its stage sees. SpecError for what is no function."""
    if not callable(function):
        raise SpecError(f"the {stage} is {type(function).__name__}, not a function", stage=stage)
    return lambda env: call_by_name(function, env, stage)


def located(run: Callable[[dict[str, Any]], Any], stage: str) -> Callable[[dict[str, Any]], Any]:
    """Run a stage's function; an error gets the place in the user's source where it happened."""

    def run_located(env: dict[str, Any]) -> Any:
        try:
            return run(env)
        except AttnccError as error:
            if isinstance(error, SpecError):
                raise error.at(traceback_span(error), stage) from None
            raise
        except Exception as error:  # a user's function may raise anything; the finding is where and why
            raise SpecError(
                f"the {stage} function raised {type(error).__name__}: {error}",
                stage=stage,
                span=traceback_span(error),
                remedy="a formula uses Python's operators and attncc's functions (ac.exp, ...); tensors are inputs",
            ) from error

    return run_located


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names a stage function uses."""
    return tuple(inspect.signature(function).parameters)
