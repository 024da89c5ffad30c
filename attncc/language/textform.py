"""The text form: a variant as TOML. Data, never executed. An example:

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
"""

from __future__ import annotations

import ast
import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attncc.errors import Span, SpecError
from attncc.ir.graph import InputDecl, ScalarDecl
from attncc.language.combinators import Piece
from attncc.language.expression import PIECES, Source, parse, result_span, stage_function
from attncc.language.recurrence import assemble_recurrence
from attncc.language.stages import SEES, SEES_STATE, assemble, check_name
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


def load_toml(path: str | Path) -> Variant:
    """Read a variant from a TOML file. Raises SpecError, with file and line, if it is wrong."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except FileNotFoundError:
        raise SpecError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read {path}: {error}") from None
    return loads_toml(text, file=str(path))


def loads_toml(text: str, file: str = "<spec>") -> Variant:
    """Read a variant from TOML text."""
    lines = re.split("\r\n|\n", text)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        span = _syntax_span(str(error), lines, file)
        bare = span is not None and re.match(r"\s*[\w.]+\s*=\s*[A-Za-z(]", span.text)
        remedy = 'a formula is a string: score = "..."' if bare else None
        raise SpecError(f"not valid TOML: {error}", span=span, remedy=remedy) from None
    for key in data:
        if key not in _TOP:
            near = difflib.get_close_matches(key, _TOP, n=1)
            remedy = f"did you mean '{near[0]}'?" if near else f"the keys are: {', '.join(_TOP)}"
            raise SpecError(
                f"unknown {'table' if isinstance(data[key], dict) else 'key'} '{key}'",
                span=_key_span(lines, file, (), key) or _header_span(lines, file, key),
                remedy="move it under [stages]" if key in SEES else remedy,
            )
    if "recurrence" in data:
        return _recurrence(data, file, lines)
    stages = _table(data, "stages", file, lines)
    sources = {}
    for stage, value in stages.items():
        if stage not in SEES:
            near = difflib.get_close_matches(stage, SEES, n=1)
            raise SpecError(
                f"unknown stage '{stage}'",
                span=_key_span(lines, file, ("stages",), stage),
                remedy=f"did you mean '{near[0]}'?" if near else f"the stages are: {', '.join(SEES)}",
            )
        if not isinstance(value, str):
            raise SpecError(
                f"the stage must be a string, got {type(value).__name__}",
                stage=stage,
                span=_key_span(lines, file, ("stages",), stage),
            )
        sources[stage] = _value_source(lines, file, ("stages",), stage, value)
    branches, value, dead_rows = data.get("branches", 1), data.get("value"), data.get("dead_rows", "zero")
    with _placed(lines, file, (), "branches"):
        check_branches(branches, "reduction" in sources)
    with _placed(lines, file, (), "value"):
        length = None if value is None else value_of_key(value, branches)
    with _placed(lines, file, (), "dead_rows"):
        check_dead_rows(dead_rows, branches)
    auxiliary = {}
    for output, value in _table(data, "outputs", file, lines).items():
        if not isinstance(value, str):
            raise SpecError(
                f"the output '{output}' must be a string, got {type(value).__name__}",
                span=_key_span(lines, file, ("outputs",), output),
            )
        auxiliary[output] = _value_source(lines, file, ("outputs",), output, value)
    variant = from_sources(
        sources,
        outputs=auxiliary,
        name=_string(data, "name", Path(file).stem if file.endswith(".toml") else "variant", file, lines),
        cites=_string(data, "cites", "", file, lines),
        inputs=_inputs(_table(data, "inputs", file, lines), file, lines),
        scalars=_scalars(_table(data, "scalars", file, lines), file, lines),
        branches=branches,
    )
    return Variant.from_graph(variant.graph.changed(value=length, dead_rows=dead_rows))


def _recurrence(data: Mapping[str, Any], file: str, lines: list[str]) -> Variant:
    """A variant whose table [recurrence] has the text of `state`, and of `out` where it is not the plain one."""
    for key in ("stages", "branches", "value", "dead_rows", "outputs"):
        if key in data:
            with _placed(lines, file, (), key):
                check_alone([key])
    table = _table(data, "recurrence", file, lines)
    if "state" not in table:
        raise SpecError(
            "the recurrence has no state",
            span=_key_span(lines, file, (), "recurrence"),
            remedy='write state = "state + k_vec * v_vec"',
        )
    evaluate = {}
    for key, value in {"out": _DEFAULT_READ, **table}.items():
        span = _key_span(lines, file, ("recurrence",), key)
        if key not in SEES_STATE:
            raise SpecError(f"unknown key '{key}'", span=span, remedy=f"a recurrence has: {', '.join(SEES_STATE)}")
        if not isinstance(value, str):
            raise SpecError(f"it must be a string, got {type(value).__name__}", stage=key, span=span)
        given = key in table
        source = _value_source(lines, file, ("recurrence",), key, value) if given else Source(value, f"<default {key}>")
        evaluate[key] = (stage_function(source, key), source.whole())
    graph = assemble_recurrence(
        _string(data, "name", Path(file).stem if file.endswith(".toml") else "variant", file, lines),
        _inputs(_table(data, "inputs", file, lines), file, lines),
        _scalars(_table(data, "scalars", file, lines), file, lines),
        {key: evaluate[key] for key in SEES_STATE},
        _string(data, "cites", "", file, lines),
    )
    return Variant.from_graph(graph)


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


def _table(data: Mapping[str, Any], key: str, file: str, lines: list[str]) -> Mapping[str, Any]:
    value = data.get(key, {})
    if not isinstance(value, dict):
        raise SpecError(f"'{key}' must be a table", span=_key_span(lines, file, (), key), remedy=f"write [{key}]")
    return value


def _string(data: Mapping[str, Any], key: str, default: str, file: str, lines: list[str]) -> str:
    value = data.get(key, default)
    if not isinstance(value, str):
        raise SpecError(f"'{key}' must be a string, got {type(value).__name__}", span=_key_span(lines, file, (), key))
    return value


def _inputs(table: Mapping[str, Any], file: str, lines: list[str]) -> dict[str, InputDecl]:
    decls = {}
    for name, entry in table.items():
        with _placed(lines, file, ("inputs",), name):
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


def _scalars(table: Mapping[str, Any], file: str, lines: list[str]) -> dict[str, ScalarDecl]:
    numbers = {}
    for name, value in table.items():
        with _placed(lines, file, ("scalars",), name):
            check_name(name)
            numbers[name] = Scalar(value).declare(name)
    return numbers


def _syntax_span(message: str, lines: list[str], file: str) -> Span | None:
    """The place that TOML's parser names: a line and a column, or the end of the document."""
    found = re.search(r"line (\d+), column (\d+)", message)
    if found:
        line, col = int(found[1]), int(found[2]) - 1
    elif "end of document" in message:
        line = max((n for n, row in enumerate(lines, start=1) if row.strip()), default=1)
        col = len(lines[line - 1].rstrip())
    else:
        return None
    return Span(file, line, col, col + 1, lines[line - 1] if line <= len(lines) else "")


def _find_key(lines: list[str], table: tuple[str, ...], key: str) -> tuple[int, int] | None:
    """Line (0-based) and column of a key: in its table's section, or dotted at the top (`stages.score = ...`)."""
    dotted = r"\s*\.\s*".join(map(re.escape, (*table, key)))
    section: tuple[str, ...] = ()
    for number, line in enumerate(lines):
        header = re.match(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(#.*)?$", line)
        if header:
            section = tuple(p.strip().strip("\"'") for p in header[1].split("."))
            continue
        names = {table: rf"(['\"]?){re.escape(key)}\1", (): rf"()({dotted})"}.get(section)
        if names and re.match(rf"\s*{names}\s*=", line):
            return number, len(line) - len(line.lstrip())
    return None


def _header_span(lines: list[str], file: str, table: str) -> Span | None:
    """The place of `[table]`."""
    for number, line in enumerate(lines, start=1):
        found = re.match(rf"\s*\[\s*({re.escape(table)})\s*[\].]", line)
        if found:
            return Span(file, number, found.start(1), found.end(1), line)
    return None


@contextmanager
def _placed(lines: list[str], file: str, table: tuple[str, ...], key: str) -> Iterator[None]:
    """An error in here gets the place of this key, where it has none."""
    try:
        yield
    except SpecError as error:
        raise error.at(_key_span(lines, file, table, key)) from None


def _key_span(lines: list[str], file: str, table: tuple[str, ...], key: str) -> Span | None:
    found = _find_key(lines, table, key)
    if found is None:
        return None
    line, col = found
    end = len(lines[line].split("=", 1)[0].rstrip())
    return Span(file, line + 1, col, end, lines[line])


def _value_source(lines: list[str], file: str, table: tuple[str, ...], stage: str, value: str) -> Source:
    """The text of a stage or output with its place in the file, so that carets stand under the user's characters."""
    found = _find_key(lines, table, stage)
    opening = re.search(r"=\s*(\"\"\"|'''|\"|')", lines[found[0]]) if found else None
    if found is None or opening is None:
        return Source(value, f"{file}: {stage}")  # an inline table: positions count within the text itself
    line, col = found[0] + 1, opening.end()
    if len(opening[1]) == 3 and lines[line - 1][col:].strip() == "":
        line, col = line + 1, 0  # TOML drops a newline right after the opening quotes
    own = value.split("\n")
    there = [lines[line - 1][col:], *lines[line : line + len(own) - 1]] if line <= len(lines) else []
    if not all(row.startswith(text) for row, text in zip(there, own, strict=False)):
        return Source(value, f"{file}:{line}: {stage}")  # escapes: the file's characters are not the text's
    return Source(value, file, line, col, lines)
