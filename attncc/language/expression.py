"""Parse the expressions of the text form: Python's grammar, restricted to a whitelist of nodes. Never executed."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from attncc.errors import AttnccError, Span, SpecError
from attncc.language import functions, masks, mods, normalizers, outputs, reducers
from attncc.language.combinators import Mask, Piece, call_by_name
from attncc.language.places import char_offset
from attncc.language.stages import COL, ROW, unknown_name
from attncc.language.values import Value, constant, constant_power, lift, no_reduction

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
    # refused by a value, in its words
    ast.LShift: lambda a, b: a << b,
    ast.BitXor: lambda a, b: a ^ b,
    ast.MatMult: lambda a, b: a @ b,
}
#: what joins masks, and modifiers of scores; what Python computes of plain numbers
_JOINS = (ast.BitAnd, ast.BitOr, ast.RShift)
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)
_COMPARE: dict[type, Callable[[Value, Any], Value]] = {
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
}
#: shipped pieces that a stage of the text form may name
PIECES: dict[str, Mapping[str, Any]] = {"mask": masks.TABLE, "score": mods.TABLE, "output": outputs.TABLE}
_DOMAINS = ("row", "col", "offset", "block", "pair")


class Source:
    """A text with its place: errors point into the file it came from.

    `line` (1-based) and `col` say where the text starts in that file, `lines` are the file's. Common indentation is
    taken off, so that a text of several lines may be indented as its surroundings are.
    """

    def __init__(self, text: str, file: str, line: int = 1, col: int = 0, lines: list[str] | None = None):
        self.text, self.file, self.line, self.col = text, file, line, col
        own = re.split("\r\n|\r|\n", text)
        self._lines = own if lines is None else lines
        margin = min((_indent(row) for row in own[1:] if row.strip()), default=0)
        self._margins = [_indent(own[0]), *(margin for _ in own[1:])]
        self._rows = [row[cut:] for row, cut in zip(own, self._margins, strict=True)]

    @property
    def code(self) -> str:
        """The text without its common indentation."""
        return "\n".join(self._rows)

    def span(self, line: int, col: int, end_col: int) -> Span:
        """The place of columns `col` to `end_col` of line `line` (from 1) of the code."""
        row = self.line + line - 1
        known = 1 <= line <= len(self._rows)
        shift = (self._margins[line - 1] if known else 0) + (self.col if line == 1 else 0)
        text = self._lines[row - 1] if row <= len(self._lines) else ""
        return Span(self.file, row, col + shift, end_col + shift, text)

    def node_span(self, node: ast.AST) -> Span:
        """The place of a syntax node: its first line."""
        line: int = node.lineno  # type: ignore[attr-defined]
        row = self._rows[line - 1]
        end = char_offset(row, node.end_col_offset) if node.end_lineno == line else len(row)  # type: ignore[attr-defined]
        return self.span(line, char_offset(row, node.col_offset), end)  # type: ignore[attr-defined]

    def whole(self) -> Span:
        """The place of the first line that says something."""
        line = next((n for n, row in enumerate(self._rows, start=1) if row.strip()), 1)
        return self.span(line, 0, max(len(self._rows[line - 1].rstrip()), 1))


def _indent(row: str) -> int:
    return len(row) - len(row.lstrip())


def parse(source: Source, stage: str) -> ast.Module:
    """The syntax tree of a stage, or SpecError at the fault."""
    try:
        return ast.parse(source.code)
    except SyntaxError as error:
        line, col = error.lineno or 1, max((error.offset or 1) - 1, 0)
        same_line = error.end_lineno in (None, line)
        end = max((error.end_offset or 0) - 1, col + 1) if same_line else col + 1
        remedy = "a stage is one expression, after any number of lines 'name = expression'"
        if any(sign in source.code for sign in ("&&", "||", "!")):
            remedy = "conditions are joined by `and`, `or` and `not`"
        raise SpecError(error.msg, stage=stage, span=source.span(line, col, end), remedy=remedy) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise SpecError(f"the text cannot be parsed: {error}", stage=stage, span=source.whole()) from None


def result_span(source: Source, stage: str) -> Span:
    """Where a stage's text says what it is: behind the names that it gives to parts, if any."""
    body = parse(source, stage).body
    return source.node_span(body[-1]) if len(body) > 1 else source.whole()


def stage_function(source: Source, stage: str) -> Callable[[dict[str, Any]], Any]:
    """A stage's text as a function from the names it sees to its value."""
    tree = parse(source, stage)
    if not tree.body:
        raise SpecError("the stage is empty", stage=stage, span=source.whole())

    def run(env: dict[str, Any]) -> Any:
        try:
            return _Reader(source, stage, env).module(tree)
        except RecursionError:
            raise SpecError("the text is nested too deeply", stage=stage, span=source.whole()) from None

    return run


class _Reader:
    """Evaluates whitelisted syntax to Values. What is not listed is refused, by name and place."""

    def __init__(self, source: Source, stage: str, env: dict[str, Any]):
        self.source, self.stage, self.env = source, stage, dict(env)
        self.pieces = PIECES.get(stage.split()[0], {})

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
            if name in self.env or name in functions.TABLE or name in self.pieces:
                self.refuse(statement.targets[0], f"'{name}' already has a meaning here", "choose another name")
            self.env[name] = self.eval(statement.value)
        if not isinstance(last, ast.Expr):
            if isinstance(last, ast.Assign):
                self.refuse(last, "the stage must end with an expression, its result", "to compare, write ==")
            self.refuse(last, f"{_describe(last)} is not part of the language")
        if self.stage == "normalizer" and isinstance(last.value, ast.Name) and last.value.id in normalizers.TABLE:
            return call_by_name(normalizers.TABLE[last.value.id], self.env, self.stage)
        return self._run(self.eval(last.value))

    def _run(self, value: Any) -> Any:
        """The value of a shipped piece here; any other value unchanged."""
        return value.run(self.env) if isinstance(value, Piece) else value

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
        except (TypeError, ValueError, ArithmeticError) as error:
            raise SpecError(str(error), stage=self.stage, span=self.source.node_span(node)) from None

    def refuse(self, node: ast.AST, reason: str, remedy: str | None = None) -> NoReturn:
        raise SpecError(reason, stage=self.stage, span=self.source.node_span(node), remedy=remedy)

    def value(self, node: ast.AST) -> Value:
        return lift(self._run(self.eval(node)))

    def _Constant(self, node: ast.Constant) -> Any:
        if isinstance(node.value, bool):
            return lift(node.value)
        if isinstance(node.value, int | float):
            return node.value
        self.refuse(node, f"{type(node.value).__name__} is not part of the language", "numbers and names are")

    def _Name(self, node: ast.Name) -> Any:
        if node.id in self.env:
            if node.id in _DOMAINS and not isinstance(self.env[node.id], Value):
                methods = f", {node.id}.".join(self._methods(node.id))
                self.refuse(node, f"'{node.id}' must be followed by a reduction", f"one of: {node.id}.{methods}")
            return self.env[node.id]
        if node.id in self.pieces:
            if isinstance(self.pieces[node.id], Piece):
                return self.pieces[node.id]
            remedy = "or declare an input of that name, if it is one of yours"
            self.refuse(node, f"'{node.id}' needs arguments: {node.id}(...)", remedy)
        if node.id in functions.TABLE:
            self.refuse(node, f"'{node.id}' is a function", f"write {node.id}(...)")
        if self.stage == "normalizer" and node.id in normalizers.TABLE:
            self.refuse(node, f"the normalizer '{node.id}' stands alone", "write its formula to build on it")
        shipped = normalizers.TABLE if self.stage == "normalizer" else {}
        raise unknown_name(node.id, self.stage, self.env, [*functions.TABLE, *self.pieces, *shipped])

    def _BinOp(self, node: ast.BinOp) -> Any:
        left, right = self.eval(node.left), self.eval(node.right)
        joins = isinstance(node.op, _JOINS) and not isinstance(left, outputs.OutputSpec)
        if isinstance(left, Piece) != isinstance(right, Piece) or not joins:
            left, right = self._run(left), self._run(right)
        if constant(left) and constant(right):
            if isinstance(node.op, ast.Pow):
                return constant_power(left, right)
            if not isinstance(node.op, _ARITHMETIC):
                left = lift(left)
        return _BINARY[type(node.op)](left, right)

    def _UnaryOp(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, ast.Not | ast.Invert):
            operand = self.eval(node.operand)
            return ~operand if isinstance(operand, Mask) else ~lift(self._run(operand))
        operand = self._run(self.eval(node.operand))
        return -operand if isinstance(node.op, ast.USub) else +operand

    def _BoolOp(self, node: ast.BoolOp) -> Value:
        result = self.value(node.values[0])
        for other in node.values[1:]:
            result = result & self.value(other) if isinstance(node.op, ast.And) else result | self.value(other)
        return result

    def _Compare(self, node: ast.Compare) -> Value:
        result: Value | None = None
        left = self._compared(node.left)
        for op, comparator in zip(node.ops, node.comparators, strict=True):
            compare = _COMPARE.get(type(op))
            if compare is None:
                remedy = "write x == 1 or x == 2" if isinstance(op, ast.In | ast.NotIn) else "write == or !="
                self.refuse(node, f"the comparison {type(op).__name__} is not part of the language", remedy)
            right = self._compared(comparator)
            term = compare(left, right)
            result, left = term if result is None else result & term, right
        assert result is not None
        return result

    def _compared(self, node: ast.expr) -> Value:
        """A side of a comparison, in which & and | are nearly always a mistake about what they join."""
        try:
            return self.value(node)
        except SpecError as error:
            if isinstance(node, ast.BinOp) and error.reason.startswith("expected a boolean"):
                sign, word = {ast.BitAnd: ("&", "and"), ast.BitOr: ("|", "or")}.get(type(node.op), ("", ""))
                if sign:
                    remedy = f"write `{word}`, or put each comparison in parentheses"
                    self.refuse(node, f"{sign} joins its neighbours before they are compared", remedy)
            raise

    def _IfExp(self, node: ast.IfExp) -> Value:
        return functions.where(self.value(node.test), self.value(node.body), self.value(node.orelse))

    def _Subscript(self, node: ast.Subscript) -> Any:
        if not isinstance(node.value, ast.Name):
            self.refuse(node, "only inputs are indexed", "write name[i, j]")
        indices = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if any(isinstance(i, ast.Slice) for i in indices):
            self.refuse(node, "slices are not part of the language", "a formula reads one element: name[i, j]")
        target = self.eval(node.value)
        if isinstance(target, int | float):
            self.refuse(node, f"'{node.value.id}' is not a tensor", "only inputs are indexed")
        return target[tuple(self.value(i) for i in indices)]

    def _Call(self, node: ast.Call) -> Any:
        if isinstance(node.func, ast.Attribute):
            return self._reduction(node)
        if not isinstance(node.func, ast.Name):
            self.refuse(node, "only functions of the vocabulary can be called")
        name = node.func.id
        if name in self.pieces:
            return self._piece(node, self.pieces[name])
        if name not in functions.TABLE:
            known = [*functions.TABLE, *self.pieces]
            remedy = functions.instead(name, known) or f"the vocabulary: {', '.join(known)}"
            self.refuse(node.func, f"no function is called '{name}'", remedy)
        if node.keywords:
            self.refuse(node, f"{name} takes no keyword arguments")
        return functions.TABLE[name](*(self._run(self.eval(a)) for a in node.args))

    def _piece(self, node: ast.Call, build: Any) -> Any:
        arguments = [self._literal(a) for a in node.args]
        keywords = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                self.refuse(node, "** is not part of the language")
            keywords[keyword.arg] = self._literal(keyword.value)
        return build(*arguments, **keywords)

    def _literal(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str):
            return node.value
        return self.eval(node)

    def _reduction(self, node: ast.Call) -> Value:
        """`row.sum(...)`, and in an output also `col.sum(...)`, `block(64, 64).sum(...)` and their like."""
        func = node.func
        assert isinstance(func, ast.Attribute)
        domain, name = self._domain(func)
        methods = self._methods(name)
        if func.attr not in methods:
            self.refuse(func, *no_reduction(name, func.attr, methods))
        if func.attr == "root":
            return self._root(node)
        arguments = [self.value(a) for a in node.args]
        least = int(func.attr != "count")
        most = least + (self.stage.split()[0] == "output")
        if not least <= len(arguments) <= most or node.keywords:
            expected = f"{least}" if least == most else f"{least} or {most}"
            self.refuse(node, f"{name}.{func.attr} takes {expected} argument(s), got {len(node.args)}")
        return getattr(domain, func.attr)(*arguments)

    def _domain(self, func: ast.Attribute) -> tuple[Any, str]:
        """The text before the dot: a domain's name, or in an output its call with sizes."""
        target = func.value
        called = isinstance(target, ast.Call) and isinstance(target.func, ast.Name)
        named = target.func if called else target  # type: ignore[attr-defined]
        if not isinstance(named, ast.Name) or named.id not in _DOMAINS:
            known = func.attr in functions.TABLE
            remedy = f"write {func.attr}(...)" if known else f"only row.{', row.'.join(ROW)} have a dot"
            self.refuse(func, "attributes are not part of the language", remedy)
        if named.id not in self.env:
            raise unknown_name(named.id, self.stage, self.env)
        domain = self.env[named.id]
        if called:
            assert isinstance(target, ast.Call)
            if not callable(domain):
                self.refuse(target, f"'{named.id}' takes no arguments", f"write {named.id}.sum(...)")
            domain = self._piece(target, domain)
        elif not hasattr(domain, "sum"):
            self.refuse(func, f"'{named.id}' needs its sizes", f"write {named.id}(64, 64).{func.attr}(...)")
        return domain, named.id

    def _methods(self, name: str) -> tuple[str, ...]:
        if self.stage.split()[0] == "output":
            return reducers.METHODS
        return COL if name == "col" else ROW

    def _root(self, node: ast.Call) -> Value:
        """`row.root(lambda t: equation, lo, hi)`: the only place of a lambda."""
        remedy = "write row.root(lambda t: row.sum(...) - 1, lo, hi)"
        if len(node.args) != 3 or node.keywords:
            self.refuse(node, f"row.root takes 3 argument(s), got {len(node.args)}", remedy)
        function = node.args[0]
        if not isinstance(function, ast.Lambda):
            self.refuse(function, "row.root solves an equation: its first argument is a lambda", remedy)
        taken = function.args
        if len(taken.args) != 1 or taken.defaults or ast.unparse(taken) != taken.args[0].arg:
            self.refuse(function, "the lambda of row.root has one argument", remedy)
        name = taken.args[0].arg
        if name in self.env or name in functions.TABLE:
            self.refuse(taken.args[0], f"'{name}' already has a meaning here", "choose another name")
        lo, hi = (self.value(a) for a in node.args[1:])

        def equation(unknown: Value) -> Value:
            self.env[name] = unknown
            try:
                return self.value(function.body)
            finally:
                del self.env[name]

        result: Value = self.env["row"].root(equation, lo, hi)
        return result


def _describe(node: ast.AST) -> str:
    names = {
        "Attribute": "an attribute",
        "Lambda": "a lambda",
        "ListComp": "a comprehension",
        "GeneratorExp": "a comprehension",
        "SetComp": "a comprehension",
        "DictComp": "a comprehension",
        "Import": "an import",
        "ImportFrom": "an import",
        "FunctionDef": "def",
        "ClassDef": "class",
        "Await": "await",
        "JoinedStr": "an f-string",
        "NamedExpr": "':='",
    }
    return names.get(type(node).__name__, type(node).__name__)
