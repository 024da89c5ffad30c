"""The names that each stage may use, and the assembly of traced stages into the IR graph; for Python and the text
form."""

from __future__ import annotations

import difflib
import keyword
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import sympy

from attncc.errors import Span, SpecError, UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc
from attncc.ir.graph import InputDecl, ScalarDecl, Stage, VariantGraph, tagged
from attncc.ir.outputs import Output
from attncc.ir.similarity import is_vector, separate
from attncc.ir.text import formula, ordered_text
from attncc.ir.verify import verify
from attncc.language import functions
from attncc.language.additive import cancelled
from attncc.language.outputs import build_output
from attncc.language.reduction import by_branch, canonical
from attncc.language.values import InputTensor, Value, Weights, boolean, fail, no_reduction, number

_PAIR = ("b", "h", "h_kv", "q_idx", "kv_idx", "q_len", "kv_len", "num_heads")
#: names that each stage sees besides the inputs and scalars of the variant
SEES: dict[str, tuple[str, ...]] = {
    "similarity": ("q_vec", "k_vec", "scale", *_PAIR),
    "score": ("score", *_PAIR),
    "mask": _PAIR,
    "normalizer": ("score", *_PAIR, "row", "col"),
    "reduction": ("weight", "v_vec", *_PAIR, "row"),
    "output": ("weight", "score", *_PAIR, "row", "col", "offset", "block", "pair"),
}
#: and what the two functions of a recurrence see: the state before a token, and behind it
SEES_STATE: dict[str, tuple[str, ...]] = {
    "state": ("state", "k_vec", "v_vec", "b", "h", "h_kv", "kv_idx", "kv_len", "num_heads"),
    "out": ("q_vec", "state", "scale", "b", "h", "h_kv", "kv_idx", "kv_len", "num_heads"),
}
#: what the combination of a hybrid sees besides the output rows of its parts
SEES_PARTS: dict[str, tuple[str, ...]] = {"combine": ("b", "h", "h_kv", "q_idx", "num_heads")}
#: the branch that a stage is evaluated for, an integer: seen by each but the reduction, where a variant has several
BRANCH = "branch"
_STAGE_NAME = (
    rf"{sym.ROW_NAME}|{sym.COL_NAME}|(in_)?col_lse_\d+|dead_rows|(q_term|k_term|dot|band|pair)_\d+|raw_score|out|mask|lse|acc"
    r"|delta|dlse"
)
#: names that a user's input or scalar cannot have
_RESERVED = {
    *sym.INDICES,
    *(n for names in SEES.values() for n in names),
    "q",
    "k",
    "v",
    "outputs",
    "qk",
    "d_idx",
    BRANCH,
}


#: the reductions of a normalizer
ROW = ("max", "min", "sum", "mean", "count", "root")
COL = ("max", "min", "sum", "mean", "count")


class Row:
    """Reductions over the keys that one query sees. Equal reductions are computed once."""

    def __init__(self, stages: list[Stage]):
        self._stages = stages
        self._counts: Counter[str] = Counter()
        self._solving = False

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # Python asks for these, too
            raise AttributeError(name)
        fail(*no_reduction("row", name, ROW))

    def _reduce(self, op: str, x: Any) -> Value:
        expr = number(x)
        if expr.has(sym.V_VEC) and op != "sum":
            fail(f"row.{op}(v_vec): only row.sum reduces the value vectors", "write row.sum(weight * v_vec)")
        return self._add(op, expr)

    def _add(self, op: str, expr: Any) -> Value:
        for stage in self._stages:
            if stage.op == op and stage.expr == expr and not expr.has(sym.V_VEC):
                return Value(sym.row_symbol(*_split(stage.name)))
        symbol = sym.row_symbol(op, self._counts[op])
        self._counts[op] += 1
        self._stages.append(Stage(symbol.name, expr, op))
        return Value(symbol)

    def max(self, x: Any) -> Value:
        """The largest x over the visible keys."""
        return self._reduce("max", x)

    def min(self, x: Any) -> Value:
        """The smallest x over the visible keys."""
        return -self._reduce("max", -Value(number(x)))

    def sum(self, x: Any) -> Value:
        """The sum of x over the visible keys."""
        return self._reduce("sum", x)

    def root(self, f: Callable[[Value], Any], lo: Any, hi: Any) -> Value:
        """The t between lo and hi at which f(t) is 0.

        f is monotone in t, and row sums enter it with factors of the row: row.sum(relu(score - t)) - 1. Its gradient is
        that of the implicit function; lo and hi only say where to look.
        """
        before = list(self._stages)
        bounds = [number(lo), number(hi)]
        if self._solving or any(b.has(sym.UNKNOWN) for b in bounds):
            fail("a row.root cannot stand inside another", "solve for the inner one first, and use its value")
        self._solving = True
        try:
            residual = number(f(Value(sym.UNKNOWN)))
        finally:
            self._solving = False
        # sums that know t are part of the equation, all others are the row's
        inner = {}
        for stage in [s for s in self._stages if s not in before and s.expr.has(sym.UNKNOWN)]:
            self._stages.remove(stage)
            inner[sym.row_symbol(*_split(stage.name))] = stage
        return self._add("root", voc.Root(*_equation(residual, inner), *bounds))

    def count(self) -> Value:
        """How many keys are visible."""
        return self._reduce("sum", 1)

    def mean(self, x: Any) -> Value:
        """The mean of x over the visible keys."""
        return self.sum(x) / self.count()


class Column:
    """Reductions over the queries that see one key. Equal reductions are computed once."""

    def __init__(self, row: Row):
        self._row = row

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        fail(*no_reduction("col", name, COL))

    def _reduce(self, op: str, x: Any) -> Value:
        expr = number(x)
        if expr.has(sym.UNKNOWN) or any(sym.is_row_name(s.name) for s in expr.free_symbols):
            fail(
                f"col.{op} is over a value that knows its whole row",
                "normalize over one axis in this op, and hand the result's lse to a second op as an input",
            )
        return self._row._add(f"col_{op}", expr)

    def max(self, x: Any) -> Value:
        """The largest x over the queries that see the key."""
        return self._reduce("max", x)

    def min(self, x: Any) -> Value:
        """The smallest x over those queries."""
        return -self._reduce("max", -Value(number(x)))

    def sum(self, x: Any) -> Value:
        """The sum of x over those queries."""
        return self._reduce("sum", x)

    def count(self) -> Value:
        """How many queries see the key."""
        return self._reduce("sum", 1)

    def mean(self, x: Any) -> Value:
        """The mean of x over those queries."""
        return self.sum(x) / self.count()


def _equation(residual: sympy.Expr, inner: Mapping[sympy.Symbol, Stage]) -> tuple[sympy.Expr, sympy.Expr]:
    """A residual over sums that know the unknown, as (the term of one sum over the keys, what is added to it)."""
    rest = residual.xreplace(dict.fromkeys(inner, sympy.S.Zero))
    term = sympy.S.Zero
    for symbol, stage in inner.items():
        factor = residual.diff(symbol)
        if stage.op != "sum" or factor.free_symbols & set(inner):
            fail(
                "row.root takes row sums of what it solves for, each times a factor of the row",
                "write it as row.sum(...) - target",
            )
        term += factor * stage.expr
    if not inner or sympy.expand(residual - rest - sum(residual.diff(s) * s for s in inner)) != 0:
        fail("row.root needs a row.sum of what it solves for", "for example row.sum(relu(score - t)) - 1")
    return term, rest


def _split(name: str) -> tuple[str, int]:
    """`row_max_0` as ("max", 0), and `col_max_0` as ("col_max", 0)."""
    domain, op, index = name.split("_")
    return op if domain == "row" else f"{domain}_{op}", int(index)


def check_name(name: str, kind: str = "input") -> None:
    """Raise SpecError unless `name` can name an input or a scalar, or what else `kind` is."""
    reason = cannot_name(name, kind)
    if reason is not None:
        raise reason


def cannot_name(name: str, kind: str = "input") -> SpecError | None:
    """Why `name` can name no input and no scalar, or None where it can."""
    if name in _RESERVED or name in functions.TABLE:
        what = f"the function {name}()" if name in functions.TABLE else "a word of the language"
        return SpecError(f"the {kind} name '{name}' already means something else: {what}", remedy=f"rename the {kind}")
    if not name.isidentifier() or keyword.iskeyword(name):
        article = "an" if kind[0] in "aeiou" else "a"
        return SpecError(
            f"'{name}' cannot name {article} {kind}", remedy="use an identifier: letters, digits and underscores"
        )
    if re.fullmatch(_STAGE_NAME, name):
        return SpecError(f"the {kind} name '{name}' is one that derived formulas use", remedy=f"rename the {kind}")
    return None


def _canonical(rows: list[Stage], weight: sympy.Expr) -> tuple[list[Stage], sympy.Expr]:
    """The reductions that the weight uses, numbered by what they are and not by when the formula mentioned them."""
    by_symbol = {sym.row_symbol(*_split(r.name)): r for r in rows}
    pending = {s for s in weight.free_symbols if s in by_symbol}
    for _ in rows:  # what they use in turn
        pending |= {s for p in pending for s in by_symbol[p].expr.free_symbols if s in by_symbol}
    renamed: dict[sympy.Symbol, sympy.Symbol] = {}
    ordered: list[Stage] = []
    while pending:
        ready = [
            (by_symbol[s].op or "", by_symbol[s].expr.xreplace(renamed), s)
            for s in pending
            if not by_symbol[s].expr.free_symbols & pending
        ]
        op, expr, symbol = min(ready, key=lambda r: (r[0], ordered_text(r[1])))
        renamed[symbol] = sym.row_symbol(op, sum(r.op == op for r in ordered))
        ordered.append(Stage(renamed[symbol].name, expr, op))
        pending.remove(symbol)
    return ordered, weight.xreplace(renamed)


def _auxiliary(name: str, function: Any, base: Mapping[str, Any], span: Span | None, branches: int) -> Output:
    if branches > 1:
        raise UnsupportedError(
            f"the variant has {branches} branches, and the output '{name}' does not say whose weight it means",
            span=span,
            remedy="compile a branch as a variant of its own, for its outputs",
        )
    if name in ("out", "lse") or not name.isidentifier() or keyword.iskeyword(name):
        taken = "is always there" if name in ("out", "lse") else "is no name"
        raise SpecError(f"'{name}' cannot name an output: it {taken}", span=span, remedy="use another identifier")
    return build_output(name, function, base, span)


def add_outputs(
    graph: VariantGraph,
    inputs: Mapping[str, InputDecl],
    scalars: Mapping[str, ScalarDecl],
    outputs: Mapping[str, tuple[Callable[[dict[str, Any]], Any], Span | None]],
) -> VariantGraph:
    """The graph with further auxiliary outputs, and the inputs and scalars that those bring along. Verified."""
    for name in sorted({o.name for o in graph.outputs} & set(outputs)):
        raise SpecError(f"the variant already has an output '{name}'", remedy="name it otherwise")
    decls = {**{d.name: d for d in graph.inputs}, **inputs}
    numbers = {**{s.name: s for s in graph.scalars}, **scalars}
    base = environment(decls, numbers)
    made = [_auxiliary(name, function, base, span, graph.branches) for name, (function, span) in outputs.items()]
    result = graph.changed(inputs=decls.values(), scalars=numbers.values(), outputs=(*graph.outputs, *made))
    verify(result)
    return result


def environment(
    inputs: Mapping[str, InputDecl], scalars: Mapping[str, ScalarDecl], vectors: bool = False
) -> dict[str, Any]:
    """The names that every stage of this variant sees. `vectors`: of the stage that reads inputs as vectors."""
    for name in (*scalars, *inputs):
        check_name(name)
    for name in sorted(scalars.keys() & inputs.keys()):
        raise SpecError(f"'{name}' is declared as an input and as a scalar", remedy="rename one of them")
    env: dict[str, Any] = {name: Value(symbol) for name, symbol in sym.INDICES.items()}
    for name, scalar in scalars.items():
        env[name] = Value(sym.scalar_symbol(name, scalar.is_int))
    for name, decl in inputs.items():
        tensor = InputTensor(decl, vectors)
        indexed = decl.pattern[:-1] if vectors and decl.is_vector else decl.pattern
        env[name] = tensor if indexed else tensor[()]
    return env


#: what makes a name of one's own known to the stages
_DECLARE = "declare a tensor in inputs, a number in scalars"


def unknown_name(name: str, stage: str, env: Mapping[str, Any], callables: Iterable[str] = ()) -> SpecError:
    """The error for a name that this stage does not see. `callables` are functions that it could have meant."""
    special = {
        "q_vec": "only the similarity stage sees the query and key vectors",
        "k_vec": "only the similarity stage sees the query and key vectors",
        "v_vec": "only the reduction stage sees the value vectors",
        "weight": "only the reduction stage sees the weight, and outputs do",
        "row": "only the normalizer and the reduction see row reductions, and outputs do",
        "score": "the mask decides before any score is known; hide pairs by index or input, or let the normalizer "
        "give them weight 0: where(score > ..., p, 0)",
        BRANCH: "a variant with branches=2 or more has them; the reduction sees the weight of each, weight[0]",
    }
    if stage in SEES_STATE:
        special = {"q_idx": "a recurrence goes from token to token, and kv_idx counts them", "q_vec": "`out` reads it"}
    if stage in SEES_PARTS:
        special = {"kv_idx": "it combines output rows, and each is of one query: q_idx"}
    seen = SEES_STATE.get(stage) or SEES_PARTS.get(stage) or SEES[stage.split()[0]]
    visible = list(seen) + [n for n in env if n not in sym.INDICES]
    near = difflib.get_close_matches(name, [*visible, *callables], n=1, cutoff=0.6)
    if name in special:
        remedy = special[name]
    elif near:
        remedy = f"did you mean '{near[0]}'? Else {_DECLARE}"
    else:
        remedy = f"it sees: {', '.join(dict.fromkeys(visible))}; {_DECLARE}"
    subject = f"the {stage}" if stage.startswith("output") else f"the {stage} stage"
    return SpecError(f"{subject} does not see the name '{name}'", stage=stage, remedy=remedy)


def _similarity(x: Any) -> tuple[sympy.Expr, tuple[Stage, ...]]:
    """The similarity with its sums over the head dimension as stages."""
    expr = number(x)
    if is_vector(expr):
        fail(
            f"the similarity '{formula(expr)}' is a vector, with a component for each place of the head dimension",
            "write dot(q_vec, k_vec), or sum_d(...) of it",
        )
    return separate(expr)


def assemble(
    name: str,
    inputs: Mapping[str, InputDecl],
    scalars: Mapping[str, ScalarDecl],
    evaluate: Mapping[str, tuple[Callable[[dict[str, Any]], Any], Span | None]],
    cites: str = "",
    branches: int = 1,
    outputs: Mapping[str, tuple[Callable[[dict[str, Any]], Any], Span | None]] | None = None,
) -> VariantGraph:
    """Run each stage's evaluator on its names and build the verified graph.

    `evaluate[stage]` is a function from the environment to the stage's result, with the place it came from, and
    `outputs[name]` the same for an auxiliary output. Without a similarity the raw score is scale * dot(q_vec, k_vec).
    """
    base = environment(inputs, scalars)

    def run(stage: str, extra: dict[str, Any], check: Callable[[Any], Any]) -> tuple[Any, Span | None]:
        function, span = evaluate[stage]
        try:
            return check(function({**base, **extra})), span
        except SpecError as error:
            if stage == "score":  # the user's name for what enters the stage
                reason = error.reason.replace("raw_score", "score")
                remedy = None if error.remedy is None else error.remedy.replace("raw_score", "score")
                error = SpecError(reason, stage=stage, span=error.span, remedy=remedy)
            raise error.at(span, stage) from None
        except UnsupportedError as error:
            raise error.at(span, stage) from None

    stages: list[Stage] = []
    if "similarity" in evaluate:
        seen = {"q_vec": Value(sym.Q_VEC), "k_vec": Value(sym.K_VEC), "scale": Value(sym.SCALE)}
        vectors = {**environment(inputs, scalars, vectors=True), **seen}
    else:
        vectors = None
    graded = {decl.name for decl in inputs.values() if decl.grad}
    if branches == 1:
        stages += _branch(run, vectors, {}, graded)
    else:
        for branch in range(branches):
            stages += tagged(_branch(run, vectors, {BRANCH: branch}, graded), branch)
    stages.append(_reduction(run, branches))
    auxiliary = [_auxiliary(key, function, base, span, branches) for key, (function, span) in (outputs or {}).items()]
    used: set[sympy.Symbol] = set().union(*(s.expr.free_symbols for s in stages))
    used |= {symbol for output in auxiliary for symbol in output.free_symbols}
    names = {u.name for u in used}
    for kind, decls in (("input", inputs), ("scalar", scalars)):
        for unused in sorted(set(decls) - names):
            raise SpecError(
                f"the {kind} '{unused}' is declared but no stage reads it",
                remedy=f"read it, or drop it from the {kind}s",
            )
    graph = VariantGraph(name, stages, inputs.values(), scalars.values(), cites, branches, auxiliary)
    verify(graph)
    return graph


Run = Callable[[str, dict[str, Any], Callable[[Any], Any]], tuple[Any, Span | None]]


def _branch(run: Run, vectors: dict[str, Any] | None, extra: dict[str, Any], graded: Collection[str]) -> list[Stage]:
    """The stages of one branch, from the similarity to the weight. `vectors`: what a similarity of the user's sees."""
    stages = [Stage("raw_score", sym.SCALE * sym.QK)]
    if vectors is not None:
        (raw, sums_d), span = run("similarity", {**vectors, **extra}, _similarity)
        stages = [*(replace(s, span=span) for s in sums_d), Stage("raw_score", raw, span=span)]
    score, span = run("score", {"score": Value(sym.RAW_SCORE), **extra}, number)
    stages.append(Stage("score", cancelled(score, graded), span=span))
    mask, span = run("mask", extra, boolean)
    stages.append(Stage("mask", voc.attached(mask), span=span))  # a boolean has no gradient to cut
    rows: list[Stage] = []
    row = Row(rows)
    seen = {"score": Value(sym.SCORE), "row": row, "col": Column(row)}
    weight, span = run("normalizer", {**seen, **extra}, number)
    rows, weight = _canonical(rows, weight)
    stages += [Stage(r.name, cancelled(r.expr, graded), r.op, span) for r in rows]
    stages.append(Stage("weight", cancelled(weight, graded), span=span))
    return stages


def _reduction(run: Run, branches: int) -> Stage:
    """The sum over the keys."""
    sums: list[Stage] = []
    weights = tuple(sym.of_branch(sym.WEIGHT, i) for i in range(branches)) if branches > 1 else (sym.WEIGHT,)
    extra = {
        "weight": Weights(weights) if branches > 1 else Value(sym.WEIGHT),
        "v_vec": Value(sym.V_VEC),
        "row": Row(sums),
    }
    result, span = run("reduction", extra, number)
    try:
        operand = canonical(result, sums, weights)
        operand = by_branch(operand, weights) if branches > 1 else operand
    except SpecError as error:
        raise error.at(span, "reduction") from None
    return Stage("out", operand, "sum", span)
