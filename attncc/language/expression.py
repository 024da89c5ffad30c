"""The text form's expressions: parsed by Python's own grammar, then read node by node against a whitelist. Never executed."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

from attncc.errors import AttnccError, Span, SpecError
from attncc.language import functions, masks, mods, normalizers
from attncc.language.combinators import Mask, ScoreMod, call_by_name
from attncc.language.stages import unknown_name
from attncc.language.values import Value, lift

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: lambda a, b: a**b,
    ast.BitAnd: lambda a, b: a & b,
    ast.BitOr: lambda a, b: a | b,
    ast.RShift: lambda a, b: a >> b,
}
_COMPARE: dict[type, Callable[[Value, Any], Value]] = {
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
}
_ROW = ("max", "min", "sum", "mean", "count")
#: shipped pieces that a stage of the text form may name
_PIECES: dict[str, Mapping[str, Any]] = {"mask": masks.TABLE, "score": mods.TABLE}


class Source:
    """A text with its place: errors point into the file it came from."""

    def __init__(self, text: str, file: str, line: int = 1, col: int = 0, lines: list[str] | None = None):
        self.text, self.file, self.line, self.col = text, file, line, col
        self._lines = lines if lines is not None else text.splitlines() or [""]

    def span(self, line: int, col: int, end_col: int) -> Span:
        """The place of a node, `line` counted from 1 within the text."""
        row = self.line + line - 1
        shift = self.col if line == 1 else 0
        text = self._lines[row - 1] if row <= len(self._lines) else ""
        return Span(self.file, row, col + shift, end_col + shift, text)

    def node_span(self, node: ast.AST) -> Span:
        """The place of a syntax node."""
        line, end = node.lineno, node.end_col_offset  # type: ignore[attr-defined]
        if node.end_lineno != line:  # type: ignore[attr-defined]
            end = len(self.text.splitlines()[line - 1])
        return self.span(line, node.col_offset, end)  # type: ignore[attr-defined]


def parse(source: Source, stage: str) -> ast.Module:
    """The syntax tree of a stage, or SpecError at the fault."""
    text = source.text
    stripped = text.lstrip()
    try:
        # leading blanks of a multi-line string would be an indentation error; blank lines keep the line numbers right
        return ast.parse("\n" * (text.count("\n", 0, len(text) - len(stripped))) + stripped)
    except SyntaxError as error:
        line, col = error.lineno or 1, max((error.offset or 1) - 1, 0)
        end = max((error.end_offset or 0) - 1, col + 1)
        remedy = "a stage is one expression, after any number of lines 'name = expression'"
        raise SpecError(error.msg, stage=stage, span=source.span(line, col, end), remedy=remedy) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise SpecError(f"the text cannot be parsed: {error}", stage=stage, span=source.span(1, 0, 1)) from None


def stage_function(source: Source, stage: str) -> Callable[[dict[str, Any]], Any]:
    """A stage's text as a function from the names it sees to its value."""
    tree = parse(source, stage)
    if not tree.body:
        raise SpecError("the stage is empty", stage=stage, span=source.span(1, 0, 1))

    def run(env: dict[str, Any]) -> Any:
        return _Reader(source, stage, env).module(tree)

    return run


class _Reader:
    """Evaluates whitelisted syntax to Values. What is not listed is refused, by name and place."""

    def __init__(self, source: Source, stage: str, env: dict[str, Any]):
        self.source, self.stage, self.env = source, stage, dict(env)

    def module(self, tree: ast.Module) -> Any:
        *lets, last = tree.body
        for statement in lets:
            if not (
                isinstance(statement, ast.Assign)
                and len(statement.targets) == 1
                and isinstance(statement.targets[0], ast.Name)
            ):
                self.refuse(statement, "only lines 'name = expression' may come before the result")
            name = statement.targets[0].id
            if name in self.env:
                self.refuse(statement.targets[0], f"'{name}' already has a meaning here", "choose another name")
            self.env[name] = self.eval(statement.value)
        if not isinstance(last, ast.Expr):
            self.refuse(last, "the stage must end with an expression, its result")
        return self._finish(self.eval(last.value), last)

    def _finish(self, value: Any, node: ast.AST) -> Any:
        if self.stage == "normalizer" and isinstance(value, _Named):
            return call_by_name(normalizers.TABLE[value.name], self.env, self.stage)
        if isinstance(value, Mask | ScoreMod):
            return value.run(self.env)
        return value

    def eval(self, node: ast.AST) -> Any:
        method = getattr(self, f"_{type(node).__name__}", None)
        if method is None:
            self.refuse(node, f"{_describe(node)} is not part of the language")
        try:
            return method(node)
        except SpecError as error:
            raise error.at(self.source.node_span(node), self.stage) from None
        except AttnccError:
            raise
        except (TypeError, OverflowError, ZeroDivisionError) as error:
            raise SpecError(str(error), stage=self.stage, span=self.source.node_span(node)) from None

    def refuse(self, node: ast.AST, reason: str, remedy: str | None = None) -> Any:
        raise SpecError(reason, stage=self.stage, span=self.source.node_span(node), remedy=remedy)

    def value(self, node: ast.AST) -> Value:
        result = self.eval(node)
        if isinstance(result, Mask | ScoreMod):
            result = result.run(self.env)
        return lift(result)

    def _Constant(self, node: ast.Constant) -> Any:
        if isinstance(node.value, bool | int | float):
            return node.value
        return self.refuse(node, f"{type(node.value).__name__} is not part of the language", "numbers and names are")

    def _Name(self, node: ast.Name) -> Any:
        if node.id in self.env:
            if node.id == "row":
                self.refuse(node, "'row' must be followed by a reduction", f"one of: row.{', row.'.join(_ROW)}")
            return self.env[node.id]
        pieces = _PIECES.get(self.stage, {})
        if node.id in pieces:
            piece = pieces[node.id]
            return piece if isinstance(piece, Mask) else self.refuse(node, f"'{node.id}' needs arguments: {node.id}(...)")
        if self.stage == "normalizer" and node.id in normalizers.TABLE:
            return _Named(node.id)
        if node.id in functions.TABLE:
            self.refuse(node, f"'{node.id}' is a function", f"write {node.id}(...)")
        raise unknown_name(node.id, self.stage, self.env, {**functions.TABLE, **pieces})

    def _BinOp(self, node: ast.BinOp) -> Any:
        operator = _BINARY.get(type(node.op))
        if operator is None:
            self.refuse(node, f"the operator {type(node.op).__name__} is not part of the language")
        left, right = self.eval(node.left), self.eval(node.right)
        pieces = isinstance(left, Mask | ScoreMod) + isinstance(right, Mask | ScoreMod)
        if pieces == 1 or (not pieces and not isinstance(left, int | float)):
            left, right = self.value(node.left), self.value(node.right)
        return operator(left, right)

    def _UnaryOp(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, ast.Not | ast.Invert):
            return ~self.value(node.operand)
        operand = self.eval(node.operand)
        return -operand if isinstance(node.op, ast.USub) else operand

    def _BoolOp(self, node: ast.BoolOp) -> Value:
        result = self.value(node.values[0])
        for other in node.values[1:]:
            result = result & self.value(other) if isinstance(node.op, ast.And) else result | self.value(other)
        return result

    def _Compare(self, node: ast.Compare) -> Value:
        result: Value | None = None
        left = self.value(node.left)
        for op, comparator in zip(node.ops, node.comparators, strict=True):
            compare = _COMPARE.get(type(op))
            if compare is None:
                self.refuse(node, f"the comparison {type(op).__name__} is not part of the language")
            right = self.value(comparator)
            term = compare(left, right)
            result, left = term if result is None else result & term, right
        assert result is not None
        return result

    def _IfExp(self, node: ast.IfExp) -> Value:
        return functions.where(self.value(node.test), self.value(node.body), self.value(node.orelse))

    def _Subscript(self, node: ast.Subscript) -> Any:
        if not isinstance(node.value, ast.Name):
            self.refuse(node, "only inputs are indexed", "write name[i, j]")
        indices = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if any(isinstance(i, ast.Slice) for i in indices):
            self.refuse(node, "slices are not part of the language", "a formula reads one element: name[i, j]")
        target = self.eval(node.value)
        if isinstance(target, Value | int | float):
            self.refuse(node, f"'{node.value.id}' is not a tensor", "only inputs are indexed")
        return target[tuple(self.value(i) for i in indices)]

    def _Call(self, node: ast.Call) -> Any:
        if isinstance(node.func, ast.Attribute):
            return self._row(node)
        if not isinstance(node.func, ast.Name):
            self.refuse(node, "only functions of the vocabulary can be called")
        name = node.func.id
        pieces = _PIECES.get(self.stage, {})
        if name in pieces:
            return self._piece(node, pieces[name])
        if name not in functions.TABLE:
            known = ", ".join([*functions.TABLE, *pieces])
            self.refuse(node.func, f"no function is called '{name}'", f"the vocabulary: {known}")
        if node.keywords:
            self.refuse(node, f"{name} takes no keyword arguments")
        arguments = [self.eval(a) for a in node.args]
        return functions.TABLE[name](*arguments)

    def _piece(self, node: ast.Call, build: Any) -> Any:
        arguments = [self._literal(a) for a in node.args]
        keywords = {k.arg: self._literal(k.value) for k in node.keywords if k.arg}
        return build(*arguments, **keywords)

    def _literal(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str):
            return node.value
        value = self.eval(node)
        return value

    def _row(self, node: ast.Call) -> Value:
        func = node.func
        assert isinstance(func, ast.Attribute)
        if not (isinstance(func.value, ast.Name) and func.value.id == "row"):
            self.refuse(func, "attributes are not part of the language", f"only row.{', row.'.join(_ROW)} have a dot")
        if "row" not in self.env:
            raise unknown_name("row", self.stage, self.env)
        if func.attr not in _ROW:
            self.refuse(func, f"no row reduction is called '{func.attr}'", f"one of: row.{', row.'.join(_ROW)}")
        arguments = [self.value(a) for a in node.args]
        if len(arguments) != (func.attr != "count") or node.keywords:
            self.refuse(node, f"row.{func.attr} takes {int(func.attr != 'count')} argument(s), got {len(node.args)}")
        return getattr(self.env["row"], func.attr)(*arguments)


class _Named:
    """A shipped normalizer, named in the text."""

    def __init__(self, name: str):
        self.name = name


def _describe(node: ast.AST) -> str:
    names = {
        "Attribute": "an attribute",
        "Lambda": "a lambda",
        "ListComp": "a comprehension",
        "Import": "an import",
        "Await": "await",
        "JoinedStr": "an f-string",
        "NamedExpr": "':='",
    }
    return names.get(type(node).__name__, type(node).__name__)
