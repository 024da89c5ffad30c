"""The IR as text, for bug reports, `attncc show --ir`, and the digest of a variant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter

from attncc.ir.graph import Stage, VariantGraph
from attncc.ir.levels import Level, level
from attncc.ir.outputs import Output, Reduction
from attncc.ir.symbols import COMPONENT, K_VEC, Q_VEC, STATE, UNKNOWN

_VECTORS = {Q_VEC, K_VEC, STATE}


class FormulaPrinter(StrPrinter):
    """Prints expressions in the text form, so that the result can be pasted into a spec."""

    def _print_Read(self, expr: Any) -> str:
        index = ", ".join(self._print(i) for i in expr.index if i != COMPONENT)
        return f"{expr.input}[{index}]" if index else expr.input

    def _print_absolute(self, expr: Any) -> str:
        return f"abs({self._print(expr.args[0])})"

    def _print_to_int(self, expr: Any) -> str:
        return f"int({self._print(expr.args[0])})"

    def _print_to_float(self, expr: Any) -> str:
        return f"float({self._print(expr.args[0])})"

    def _print_sum_d(self, expr: Any) -> str:
        factors = sympy.Mul.make_args(expr.args[0])
        if len(factors) == 2 and all(f in _VECTORS for f in factors):
            return f"dot({self._print(factors[0])}, {self._print(factors[1])})"
        return f"sum_d({self._print(expr.args[0])})"

    def _print_floordiv(self, expr: Any) -> str:
        return self._infix(expr, "//")

    def _print_mod(self, expr: Any) -> str:
        return self._infix(expr, "%")

    def _infix(self, expr: Any, operator: str) -> str:
        left, right = (self.parenthesize(a, PRECEDENCE["Mul"], strict=False) for a in expr.args)
        return f"{left} {operator} {right}"

    def _print_And(self, expr: Any) -> str:
        return " and ".join(self._nested(a) for a in sorted(expr.args, key=str))

    def _print_Or(self, expr: Any) -> str:
        return " or ".join(self._nested(a) for a in sorted(expr.args, key=str))

    def _print_Not(self, expr: Any) -> str:
        return f"not {self._nested(expr.args[0])}"

    def _nested(self, expr: Any) -> str:
        text = self._print(expr)
        return f"({text})" if isinstance(expr, sympy.And | sympy.Or) else text

    def _print_Root(self, expr: Any) -> str:
        names = {s.name for a in expr.args for s in a.free_symbols}
        shown = next(n for n in ("t", "tau", "row_unknown") if n not in names or n == UNKNOWN.name)
        term, rest, lo, hi = (a.xreplace({UNKNOWN: sympy.Symbol(shown, real=True)}) for a in expr.args)
        total = sympy.Symbol(f"row.sum({self._print(term)})", real=True) + rest
        return f"row.root(lambda {shown}: {self._print(total)}, {self._print(lo)}, {self._print(hi)})"

    def _print_Relational(self, expr: Any) -> str:
        return f"{self._print(expr.lhs)} {expr.rel_op} {self._print(expr.rhs)}"

    def _print_Float(self, expr: Any) -> str:
        return repr(float(expr))

    def _print_BooleanTrue(self, expr: Any) -> str:
        return "True"

    def _print_BooleanFalse(self, expr: Any) -> str:
        return "False"


class ReadablePrinter(FormulaPrinter):
    """The same with positive terms of sums first, as people write them: `score - row.max(score)`."""

    def _as_ordered_terms(self, expr: Any, order: str | None = None) -> list[Any]:
        terms: list[Any] = super()._as_ordered_terms(expr, order=order)
        return sorted(terms, key=lambda term: term.could_extract_minus_sign())


_ordered, _readable = FormulaPrinter({"order": None}), ReadablePrinter({"order": None})


def ordered_text(expr: Any) -> str:
    """One expression in sympy's own order, for digests and for sorting stages."""
    return _ordered.doprint(expr)


def formula(expr: Any) -> str:
    """One expression in the text form, for people."""
    return _readable.doprint(expr)


def _definition(stage: Stage, text: Callable[[Any], str]) -> str:
    body = text(stage.expr)
    if stage.op in ("scan", "read", "combine"):
        return f"{stage.op}({body})"
    if stage.op == "sum_d":
        return f"sum_d({body})"
    if stage.op in ("col_max", "col_sum"):
        return f"{stage.op.replace('_', '.')}({body})"
    return f"row.{stage.op}({body})" if stage.op in ("max", "sum") else body


def _each(stage: Stage) -> str:
    """The unit that a stage has one value of: token, pair, row or column."""
    if stage.op in ("scan", "read"):
        return "token"
    if stage.op == "sum_d":
        return {Level.PAIR: "pair", Level.COL: "column"}.get(level(stage.expr), "row")
    if stage.op in ("col_max", "col_sum"):
        return "column"
    return "row" if stage.op else "pair"


def output_text(output: Output, text: Callable[[Any], str] = formula) -> str:
    """An auxiliary output's definition in the text form."""
    texts = {r.symbol: sympy.Symbol(_reduction(output, r, text), real=True) for r in output.reductions}
    return text(output.expr.xreplace(texts))


def _reduction(output: Output, reduction: Reduction, text: Callable[[Any], str]) -> str:
    arguments = [] if reduction.op == "count" else [text(reduction.expr)]
    if reduction.when is not sympy.true:
        arguments.append(text(reduction.when))
    return f"{output.domain}.{reduction.op}({', '.join(arguments)})"


def to_text(graph: VariantGraph, header: bool = True) -> str:
    """The whole graph, one definition per line, in topological order; without the header, the text that is digested."""
    text = formula if header else ordered_text
    lines = [f'variant "{graph.name}"  # digest {graph.digest}'] if header else []
    for d in graph.inputs:
        lines.append(f"  input  {d.name}[{', '.join(d.pattern)}] : {d.dtype}{' grad' if d.grad else ''}")
    for scalar in graph.scalars:
        # the default is a convenience of calls, not part of the mathematics
        shown = f" = {scalar.default!r}" if header else ""
        lines.append(f"  scalar {scalar.name} : {'int' if scalar.is_int else 'float'}{shown}")
    for i in range(graph.branches if graph["out"].op == "sum" else 0):  # others have no pairs
        at = f"[{i}]" if graph.branches > 1 else ""
        if graph.parts[i].has_dot:
            lines.append(f"  input  qk{at} = dot(q_vec{at}, k_vec{at}) : float")
    if graph.value is not None:
        lines.append(f"  input  v_vec = k_vec[:{graph.value}] : vector")
    if graph.dead_rows != "zero":
        lines.append(f"  rows   that see no key: {graph.dead_rows}")
    width = max(len(s.name) for s in graph.stages)
    for s in graph.stages:
        lines.append(f"  {s.name:<{width}} = {_definition(s, text)}  : {s.type}, a {_each(s)}")
    for o in graph.outputs:
        lines.append(f"  output {o.name}[{', '.join(('b', 'h', *o.domain.dims))}] = {output_text(o, text)}  : {o.type}")
    return "\n".join(lines)
