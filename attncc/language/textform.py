"""The text form: a variant as TOML, which is parsed and never executed. An example:

    name = "gemma2-local"
    [stages]
    score = "cap * tanh(score / cap) + slopes[h] * (kv_idx - q_idx)"
    mask  = "kv_idx <= q_idx and q_idx - kv_idx < 4096"
    [inputs]
    slopes = { index = ["h"], grad = true }
    [scalars]
    cap = 50.0
    [outputs]
    entropy = "entropy"
    recent = "row.sum(weight, q_idx - kv_idx < 64)"

A stage may span lines in a triple-quoted string: any number of lines `name = expression`, then the result.

A hybrid has the tables of a variant for each of its parts, or the path of the part's own file, and how they combine:

    combine = "far + alpha[h] * near"
    [parts.near.stages]
    mask = "causal and sliding_window(64)"
    [parts]
    far = "memory.toml"
    [inputs]
    alpha = { index = ["h"], grad = true }
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attncc.errors import SpecError
from attncc.ir.graph import InputDecl, ScalarDecl
from attncc.language.combinators import Piece
from attncc.language.document import Document
from attncc.language.expression import PIECES, Source, parse, result_span, stage_function
from attncc.language.hybrid import Hybrid, assemble_hybrid
from attncc.language.recurrence import assemble_recurrence
from attncc.language.stages import SEES, SEES_PARTS, SEES_STATE, assemble, check_name
from attncc.language.variant import (
    Input,
    Scalar,
    Variant,
    check_alone,
    check_branches,
    check_dead_rows,
    value_of_key,
)

_DEFAULTS = {"score": "score", "mask": "True", "normalizer": "softmax", "reduction": "row.sum(weight * v_vec)"}
_DEFAULT_READ = "scale * dot(q_vec, state)"
_TOP = (
    *("name", "cites", "description", "branches", "value", "dead_rows", "stages", "recurrence", "inputs", "scalars"),
    "outputs",
)
_TOP_HYBRID = ("name", "cites", "description", "parts", "combine", "inputs", "scalars")
#: keys of other tables
_ELSEWHERE = {**dict.fromkeys(SEES, "move it under [stages]"), "combine": "a hybrid has its variants under [parts]"}


def load_toml(path: str | Path) -> Variant | Hybrid:
    """Read a variant, or a hybrid, from a TOML file. Raises SpecError, with file and line, if it is wrong."""
    return _spec(_read(Path(path)))


def loads_toml(text: str, file: str = "<spec>") -> Variant | Hybrid:
    """Read a variant, or a hybrid, from TOML text; the paths of parts are relative to the folder of `file`."""
    return _spec(Document.parse(text, file))


def _read(path: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except FileNotFoundError:
        raise SpecError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read {path}: {error}") from None
    return Document.parse(text, str(path))


def _spec(document: Document) -> Variant | Hybrid:
    return _hybrid(document) if "parts" in document.data else _variant(document)


def _variant(document: Document) -> Variant:
    """The variant of a file, or of a part's table."""
    document.check_keys(_TOP, _ELSEWHERE)
    if "recurrence" in document.data:
        return _recurrence(document)
    table = document.table("stages")
    sources = {}
    for stage, value in table.data.items():
        if stage not in SEES:
            near = difflib.get_close_matches(stage, SEES, n=1)
            raise SpecError(
                f"unknown stage '{stage}'",
                span=table.key_span(stage),
                remedy=f"did you mean '{near[0]}'?" if near else f"the stages are: {', '.join(SEES)}",
            )
        if not isinstance(value, str):
            raise SpecError(
                f"the stage must be a string, got {type(value).__name__}", stage=stage, span=table.key_span(stage)
            )
        sources[stage] = table.source(stage, value)
    data = document.data
    branches, value, dead_rows = data.get("branches", 1), data.get("value"), data.get("dead_rows", "zero")
    with document.placed("branches"):
        check_branches(branches, "reduction" in sources)
    with document.placed("value"):
        length = None if value is None else value_of_key(value, branches)
    with document.placed("dead_rows"):
        check_dead_rows(dead_rows, branches)
    auxiliary = {}
    table = document.table("outputs")
    for output, value in table.data.items():
        if not isinstance(value, str):
            raise SpecError(
                f"the output '{output}' must be a string, got {type(value).__name__}", span=table.key_span(output)
            )
        auxiliary[output] = table.source(output, value)
    variant = from_sources(
        sources,
        outputs=auxiliary,
        name=document.string("name", document.name),
        cites=document.string("cites", ""),
        inputs=_inputs(document),
        scalars=_scalars(document),
        branches=branches,
    )
    return Variant.from_graph(variant.graph.changed(value=length, dead_rows=dead_rows))


def _recurrence(document: Document) -> Variant:
    """A variant whose table [recurrence] has the text of `state`, and of `out` where it is not the plain one."""
    for key in ("stages", "branches", "value", "dead_rows", "outputs"):
        if key in document.data:
            with document.placed(key):
                check_alone([key])
    table = document.table("recurrence")
    if "state" not in table.data:
        raise SpecError(
            "the recurrence has no state",
            span=document.key_span("recurrence"),
            remedy='write state = "state + k_vec * v_vec"',
        )
    evaluate = {}
    for key, value in {"out": _DEFAULT_READ, **table.data}.items():
        span = table.key_span(key)
        if key not in SEES_STATE:
            raise SpecError(f"unknown key '{key}'", span=span, remedy=f"a recurrence has: {', '.join(SEES_STATE)}")
        if not isinstance(value, str):
            raise SpecError(f"it must be a string, got {type(value).__name__}", stage=key, span=span)
        source = table.source(key, value) if key in table.data else Source(value, f"<default {key}>")
        evaluate[key] = (stage_function(source, key), source.whole())
    graph = assemble_recurrence(
        document.string("name", document.name),
        _inputs(document),
        _scalars(document),
        {key: evaluate[key] for key in SEES_STATE},
        document.string("cites", ""),
    )
    return Variant.from_graph(graph)


def _hybrid(document: Document) -> Hybrid:
    """A hybrid whose table [parts] has a variant's tables, or the path of a variant's file, under each name."""
    document.check_keys(_TOP_HYBRID, {"stages": "each part has its own: [parts.NAME.stages]"})
    table = document.table("parts")
    parts = {}
    for key, value in table.data.items():
        with table.placed(key):
            own = _read(Path(document.file).parent / value) if isinstance(value, str) else table.table(key)
            if "parts" in own.data:
                raise SpecError(f"the part '{key}' is a hybrid itself", remedy="give its parts here")
            parts[key] = _variant(own).graph
    (stage,) = SEES_PARTS
    if stage not in document.data:
        raise SpecError(
            f"nothing says how the parts combine: {', '.join(parts)}",
            span=table.key_span(next(iter(parts), "")),
            remedy=f'write {stage} = "{" + ".join(parts)}" above all tables',
        )
    source = document.source(stage, document.string(stage, ""))
    with document.placed("parts"):
        graph = assemble_hybrid(
            document.string("name", document.name),
            parts,
            _inputs(document),
            _scalars(document),
            (stage_function(source, stage), result_span(source, stage)),
            document.string("cites", ""),
        )
    return Hybrid.from_graph(graph)


def from_texts(name: str = "inline", **stages: str) -> Variant:
    """A variant from inline texts, one a stage, as the command line's --score, --mask and --normalizer give them."""
    return from_sources({s: Source(t, f"<{s}>") for s, t in stages.items()}, name=name)


def from_sources(
    sources: Mapping[str, Source],
    *,
    name: str,
    cites: str = "",
    inputs: Mapping[str, InputDecl] | None = None,
    scalars: Mapping[str, ScalarDecl] | None = None,
    branches: int = 1,
    outputs: Mapping[str, Source] | None = None,
) -> Variant:
    """A variant from the texts of its stages and of its auxiliary outputs."""
    decls, numbers = dict(inputs or {}), dict(scalars or {})
    evaluate: dict[str, Any] = {}
    if "similarity" in sources:
        source = sources["similarity"]
        evaluate["similarity"] = (stage_function(source, "similarity"), result_span(source, "similarity"))
    texts = {stage: sources.get(stage) or Source(default, f"<default {stage}>") for stage, default in _DEFAULTS.items()}
    texts |= {f"output '{name}'": source for name, source in (outputs or {}).items()}
    for stage, source in texts.items():
        for piece in _pieces(source, stage):
            for key, decl in piece.inputs.items():
                decls.setdefault(key, decl)
            for key, scalar in piece.scalars.items():
                numbers.setdefault(key, scalar)
        evaluate[stage] = (stage_function(source, stage), result_span(source, stage))
    auxiliary = {name: evaluate.pop(f"output '{name}'") for name in outputs or {}}
    graph = assemble(name, decls, numbers, evaluate, cites, branches, auxiliary)
    return Variant.from_graph(graph)


def _pieces(source: Source, stage: str) -> list[Piece]:
    """The shipped masks or modifiers that a text calls, for the inputs they bring along."""
    table = PIECES.get(stage.split()[0], {})
    found: list[Piece] = []
    for node in ast.walk(parse(source, stage)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in table:
            arguments = [_plain(a) for a in node.args]
            keywords = {k.arg: _plain(k.value) for k in node.keywords if k.arg}
            if _UNKNOWN not in arguments and _UNKNOWN not in keywords.values() and len(keywords) == len(node.keywords):
                try:
                    piece = table[node.func.id](*arguments, **keywords)
                    for name in (*piece.inputs, *piece.scalars):
                        check_name(name)
                except TypeError as error:
                    raise SpecError(str(error), stage=stage, span=source.node_span(node)) from None
                except SpecError as error:
                    raise error.at(source.node_span(node), stage) from None
                found.append(piece)
    return found


_UNKNOWN = object()


def _plain(node: ast.expr) -> Any:
    """A plain number or text, a negative number too; else _UNKNOWN."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _plain(node.operand)
        return -inner if isinstance(inner, int | float) else _UNKNOWN
    return node.value if isinstance(node, ast.Constant) else _UNKNOWN


def _inputs(document: Document) -> dict[str, InputDecl]:
    decls = {}
    table = document.table("inputs")
    for name, entry in table.data.items():
        with table.placed(name):
            check_name(name)
            written = f'write {name} = {{ index = ["h"], grad = true }}'
            if not isinstance(entry, dict):
                raise SpecError(f"the input '{name}' must be a table", remedy=written)
            unknown = sorted(set(entry) - {"index", "dtype", "grad"})
            if unknown:
                raise SpecError(f"the input '{name}' has no key '{unknown[0]}'", remedy="its keys: index, dtype, grad")
            if not isinstance(entry.get("index", []), list):
                raise SpecError(f"the index of '{name}' must be a list of dimensions", remedy=written)
            grad = entry.get("grad", False)
            if not isinstance(grad, bool):
                raise SpecError(f"the input '{name}': grad is true or false, got {grad!r}")
            decls[name] = Input(*entry.get("index", []), dtype=entry.get("dtype", "float"), grad=grad).declare(name)
    return decls


def _scalars(document: Document) -> dict[str, ScalarDecl]:
    numbers = {}
    table = document.table("scalars")
    for name, value in table.data.items():
        with table.placed(name):
            check_name(name)
            numbers[name] = Scalar(value).declare(name)
    return numbers
