"""Expressions to lines of Triton: one statement a shared value, each placed at the level (program, row, column, pair)
at which it changes, so that a template only has to say where each level's lines go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy

from attncc.codegen.texts import hinted, is_number, literal, unwrap, wrap
from attncc.errors import UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc
from attncc.ir.graph import VariantGraph
from attncc.ir.levels import Level, join
from attncc.ir.vocabulary import ByDistance, Read, type_of
from attncc.passes.distances import NO_TABLES, Tables
from attncc.passes.fold import LN2, exp2, lower_exp, per_ln2

_INLINE = 48
#: guards of a load that are longer have a name
_LONG_GUARD = 85


@dataclass(frozen=True)
class Leaf:
    """A value that the template has computed: its name in the kernel and its level."""

    name: str
    level: Level


@dataclass(frozen=True)
class Streamed:
    """A value of each index of the loop's axis: its name, its text, whether it is an "int", a "float" or a "bool", and
    the inputs that it reads."""

    name: str
    text: str
    type: str
    inputs: frozenset[str]


#: one-argument functions that print as one call
_CALLS = {
    exp2: "tl.exp2",
    voc.absolute: "tl.abs",
    voc.erf: "tl.erf",
    voc.sin: "tl.sin",
    voc.cos: "tl.cos",
    voc.gelu: "_gelu",
    voc.sign: "_sign",
}


@dataclass
class Lowering:
    """Builds the statements of one kernel.

    leaves: what the template provides; rows_first: pair tiles are [rows, columns] (else transposed, as the dK/dV
    kernel holds them); own_axis: ROW or COL, along which a program's block lies, a tile's first axis if not given;
    running: names of row values that change inside the loop; many_heads: a program visits several query heads; blank: a
    tile of zeros. Statements go to `outer` (before the loop: what is the same for the whole program, or along its own
    axis), to `by_head` (the same for all pairs of one query head, where there are many) or to `body`, each in an order
    in which it can run: `outer` needs neither of the others. Where `streamed` is given, it takes what is read along the
    axis of the loop, and what follows from that alone; `ahead` takes the loads of what is read a pair, which need no
    score. whole: the condition that a tile ends inside the tensors along the axis of the loop, where there is one.
    tables: those that the kernel is given by distance.
    """

    graph: VariantGraph
    leaves: Mapping[str, Leaf]
    rows_first: bool = True
    own_axis: Level | None = None
    running: frozenset[str] = frozenset()
    many_heads: bool = False
    blank: str = "tl.zeros_like(qk)"
    outer: list[str] = field(default_factory=list)
    by_head: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    streamed: list[Streamed] | None = None
    whole: str = ""
    ahead: list[str] | None = None
    tables: Tables = NO_TABLES
    helpers: set[str] = field(default_factory=set)
    _memo: dict[Any, tuple[str, Level]] = field(default_factory=dict)
    _names: Counter[str] = field(default_factory=Counter)
    _uses: Counter[Any] = field(default_factory=Counter)
    _aside: dict[Any, tuple[str, Level]] = field(default_factory=dict)

    def count(self, exprs: Iterable[Any]) -> None:
        """Announce expressions before they are emitted: what occurs twice becomes a named value."""
        for expr in map(self.tables.apart, exprs):
            stack = [expr]
            while stack:
                e = stack.pop()
                self._uses[e] += 1
                if self._uses[e] == 1:
                    stack.extend(e.args)

    def branch(self) -> Lowering:
        """A scope inside the loop whose statements are its own, such as the body of an `if`."""
        return replace(self, body=[], _memo=dict(self._memo))

    def set_aside(self, scope: Lowering) -> None:
        """Let loops behind this one know what a branch hoisted."""
        self._aside.update({e: v for e, v in scope._memo.items() if self._is_outer(e, v[1])})

    def after_loop(self) -> Lowering:
        """The scope behind the loop: only what was computed before the loop still stands."""
        kept = {e: v for e, v in self._memo.items() if self._is_outer(e, v[1])}
        return replace(self, body=[], _memo=kept)

    def next_sweep(self, running: frozenset[str]) -> Lowering:
        """The scope of another loop behind this one, in which other row values change; what it needs is hoisted to
        between the two."""
        after = self.after_loop()
        return replace(after, outer=[], running=running, _memo={**self._aside, **after._memo}, _uses=Counter())

    def emit(self, expr: Any, at: Level | None = None) -> str:
        """The text of an expression, as an operand of level `at` (its own level by default)."""
        text, own = self._visit(self.tables.apart(expr))
        return self._raise(text, own, own if at is None else join(own, at))

    def assign(self, name: str, expr: Any, at: Level) -> None:
        """A statement `name = expr` in the body, and from then on `name` stands for the expression."""
        expr = self.tables.apart(expr)
        text, own = self._memo.get(expr) or (self._text(expr, self.level_of(expr)), self.level_of(expr))
        self.body.append(f"{name} = {unwrap(self._tile(text, own, at))}")
        self._memo[expr] = (name, at)

    def tile(self, expr: Any) -> str:
        """The text of an expression as a whole tile, also where it is the same for every pair."""
        return self._tile(*self._visit(self.tables.apart(expr)), Level.PAIR)

    def _tile(self, text: str, own: Level, at: Level) -> str:
        raised = self._raise(text, own, at)
        return f"{self.blank} + {raised}" if at == Level.PAIR and own != Level.PAIR else raised

    def hoisted(self, expr: Any) -> str:
        """The text of a value that loops must not compute again: a name, or a number."""
        return self._hoist(expr)

    def level_of(self, expr: Any) -> Level:
        """The level of an expression, given what the leaves are."""
        result = Level.PROGRAM
        for s in expr.free_symbols:
            if s.name in self.leaves:
                result = join(result, self.leaves[s.name].level)
        return result

    @property
    def _block_axis(self) -> Level:
        return self.own_axis or (Level.ROW if self.rows_first else Level.COL)

    def _is_outer(self, expr: Any, level: Level) -> bool:
        return level in (Level.PROGRAM, self._block_axis) and not any(s.name in self.running for s in expr.free_symbols)

    def _define(self, name: str, text: str, expr: Any, level: Level, to_float: bool = False) -> None:
        """A statement `name = text`, among those of its level."""
        along = Level.COL if self._block_axis == Level.ROW else Level.ROW
        if self.streamed is not None and any(self.level_of(r) == along for r in expr.atoms(Read)) and level == along:
            inputs = frozenset(str(r.input) for r in expr.atoms(Read))
            self.streamed.append(Streamed(name, text, "float" if to_float else type_of(expr), inputs))
            return
        lines = self.body
        if self._is_outer(expr, level):
            lines = self.by_head if self.many_heads and sym.H in expr.free_symbols else self.outer
        lines.append(f"{name} = {text}")

    def _visit(self, expr: Any) -> tuple[str, Level]:
        if expr in self._memo:
            return self._memo[expr]
        level = self.level_of(expr)
        text = self._text(expr, level)
        atom = text.isidentifier() or is_number(text)
        shared = self._uses[expr] > 1 and not atom
        if (
            shared
            or isinstance(expr, Read | ByDistance)
            or (len(text) > _INLINE and not atom and level != Level.PROGRAM)
        ):
            text = self._name(expr, text, level)
        self._memo[expr] = (text, level)
        return self._memo[expr]

    def _name(self, expr: Any, text: str, level: Level) -> str:
        name = self._fresh(hinted(expr))
        self._define(name, unwrap(text), expr, level)
        return name

    def _fresh(self, hint: str) -> str:
        taken = {leaf.name for leaf in self.leaves.values()}
        while True:
            number = self._names[hint]
            self._names[hint] += 1
            name = hint if number == 0 and hint not in taken else f"{hint}_{number}"
            if name not in taken:
                return name

    def _hoist(self, expr: Any) -> str:
        """A lower-level operand as a named value, so that it is computed once and not inside the loop."""
        if expr in self._memo:
            return self._memo[expr][0]
        level = self.level_of(expr)
        text = self._text(expr, level)
        if not (text.isidentifier() or is_number(text)):
            text = self._name(expr, text, level)
        self._memo[expr] = (text, level)
        return text

    def _operand(self, expr: Any, at: Level, to_float: bool) -> str:
        """An operand of an expression of level `at`; a lower level is hoisted and broadcast."""
        own = self.level_of(expr)
        if to_float and type_of(expr) == "int" and not expr.is_number:
            return self._float(expr, at)
        if own != at and not expr.is_number:
            return self._raise(self._hoist(expr), own, at)
        text, own = self._visit(expr)
        return self._raise(text, own, at)

    def _raise(self, text: str, own: Level, at: Level) -> str:
        if at != Level.PAIR or own not in (Level.ROW, Level.COL):
            return text
        along_first = (own == Level.ROW) == self.rows_first
        suffix = "[:, None]" if along_first else "[None, :]"
        return f"{text}{suffix}" if text.isidentifier() else f"({text}){suffix}"

    def _float(self, expr: Any, at: Level) -> str:
        """An integer expression as a float. Sums are converted term by term, which is exact below 2^24 and costs no
        conversion a pair: a row's and a column's index are converted once each."""
        key = voc.to_float(expr)
        own = self.level_of(expr)
        if key not in self._memo:
            if expr.is_Add:
                text = self._sum(expr, own, to_float=True)
            elif expr.is_Mul and expr.args[0].is_number:
                text = f"{literal(expr.args[0], True)} * {wrap(self._float(sympy.Mul(*expr.args[1:]), own))}"
            elif own == Level.PROGRAM:
                text = f"({self._visit(expr)[0]} * 1.0)"
            else:
                text = f"{wrap(self._visit(expr)[0])}.to(tl.float32)"
            if own != Level.PAIR or isinstance(expr, sympy.Symbol):
                name = self._fresh(f"{hinted(expr)}_f")
                self._define(name, unwrap(text), expr, own, to_float=True)
                text = name
            self._memo[key] = (wrap(text) if own == Level.PAIR else text, own)
        return self._raise(*self._memo[key], at)

    # one method a kind of expression

    def _text(self, expr: Any, level: Level) -> str:
        if expr.is_number:
            return literal(expr, type_of(expr) == "float")
        if isinstance(expr, sympy.Symbol):
            return repr(voc.LN2) if expr == LN2 else self.leaves[expr.name].name
        if expr.is_Add:
            return f"({self._sum(expr, level, type_of(expr) == 'float')})"
        if expr.is_Mul:
            return self._product(expr, level)
        if expr.is_Pow:
            return self._power(expr, level)
        if isinstance(expr, Read):
            return self._read(expr, level)
        if isinstance(expr, sympy.exp):
            return self._text(lower_exp(expr), level)
        if type(expr) in _CALLS:
            call = _CALLS[type(expr)]
            self._helper(call)
            return f"{call}({unwrap(self._operand(expr.args[0], level, type_of(expr) == 'float'))})"
        method = getattr(self, f"_{type(expr).__name__}", None)
        if method is None:
            raise UnsupportedError(f"the Triton backend has no form for {type(expr).__name__}")
        return method(expr, level)

    def _helper(self, call: str) -> None:
        if call.startswith("_"):
            self.helpers.add(call)

    def _groups(self, args: Iterable[Any], level: Level) -> list[list[Any]]:
        """Arguments by level, the expression's own level first; the lower ones are hoisted together."""
        by: dict[Level, list[Any]] = {}
        for a in args:
            by.setdefault(self.level_of(a), []).append(a)
        return [by[lv] for lv in sorted(by, reverse=True)]

    def _sum(self, expr: Any, level: Level, to_float: bool) -> str:
        groups = self._groups(_integers_first(expr) if to_float else expr.args, level)
        parts: list[Any] = []
        for group in groups:
            joined = sympy.Add(*group)
            if len(groups) > 1 and len(group) > 1 and self.level_of(joined) != level:
                parts.append(joined)
            else:
                parts += sorted(group, key=lambda t: t.could_extract_minus_sign())
        # what is subtracted comes behind: Triton negates by a subtraction from 0, which no compiler may leave out
        first = next((i for i, part in enumerate(parts) if not part.could_extract_minus_sign()), 0)
        parts.insert(0, parts.pop(first))
        text = ""
        for part in parts:
            negative = bool(text) and part.could_extract_minus_sign()
            operand = self._operand(-part if negative else part, level, to_float)
            text += (f" - {operand}" if negative else f" + {operand}") if text else operand
        return text

    def _product(self, expr: Any, level: Level) -> str:
        is_float = type_of(expr) == "float"
        number, rest = expr.as_coeff_Mul()
        over = [f for f in sympy.Mul.make_args(rest) if not _is_reciprocal(f)]
        under = [1 / f for f in sympy.Mul.make_args(rest) if _is_reciprocal(f)]
        if under and not is_float:
            raise UnsupportedError("an integer quotient must be written with //")
        # what is the same at a lower level is multiplied there, once
        lower_over = [f for f in over if self.level_of(f) != level]
        lower_under = [f for f in under if self.level_of(f) != level]
        own_over = [f for f in over if self.level_of(f) == level]
        own_under = [f for f in under if self.level_of(f) == level]
        if LN2 in own_under:  # a constant multiplies; it is no division
            own_under.remove(LN2)
            number = sympy.Float(float(number) * voc.LOG2E)
        factors = [self._operand(f, level, is_float) for f in own_over]
        split_levels = sorted({self.level_of(f) for f in (*lower_over, *lower_under)}, reverse=True)
        for i, lv in enumerate(split_levels):
            part = sympy.Mul(
                *(f for f in lower_over if self.level_of(f) == lv),
                *(1 / f for f in lower_under if self.level_of(f) == lv),
            )
            # a sign, too, where every pair would have its own negation, and there is a name that can have it
            apart = number != -1 or (level == Level.PAIR and is_float and part.free_symbols - {LN2})
            if i == len(split_levels) - 1 and number != 1 and apart:
                part, number = sympy.Mul(number, part), sympy.S.One
            factors.append(self._operand(part, level, is_float))
        if number not in (1, -1) or not factors:
            factors.insert(0, literal(number, is_float))
            sign = ""
        else:
            sign = "-" if number == -1 else ""
        text = sign + " * ".join(factors)
        if own_under:
            divisor = self._operand(sympy.Mul(*own_under), level, is_float)
            text = f"{text} / {divisor}"
        return f"({text})"

    def _power(self, expr: Any, level: Level) -> str:
        base, power = expr.base, expr.exp
        if base == LN2 and power == -1:
            return repr(voc.LOG2E)
        if power.is_number:
            value = float(power)
            operand = self._operand(base, level, True)
            if value == 0.5:
                return f"tl.sqrt({unwrap(operand)})"
            if value == -0.5:
                return f"tl.rsqrt({unwrap(operand)})"
            if value == -1:
                return f"(1.0 / {operand})"
            if value.is_integer() and 2 <= abs(value) <= 8:
                name = operand if operand.isidentifier() else self._hoist_own(base, level)
                product = " * ".join([name] * int(abs(value)))
                return f"({product})" if value > 0 else f"(1.0 / ({product}))"
        return f"tl.exp2({wrap(self._operand(power, level, True))} * {self._logarithm('log2', base, level)})"

    def _hoist_own(self, expr: Any, level: Level) -> str:
        text = self._hoist(expr)
        return self._raise(text, self.level_of(expr), level)

    def _tanh(self, expr: Any, level: Level) -> str:
        self.helpers.add("_tanh")
        return f"_tanh({unwrap(self._operand(expr.args[0], level, True))}, FAST_MATH)"

    def _log(self, expr: Any, level: Level) -> str:
        return self._logarithm("log", expr.args[0], level)

    def _logarithm(self, name: str, expr: Any, level: Level) -> str:
        x = unwrap(self._operand(expr, level, True))
        if self.level_of(expr) != Level.PAIR:  # what a row has once may as well be exact
            return f"tl.{name}({x})"
        self.helpers |= {f"_{name}", "_log2"}
        return f"_{name}({x}, FAST_MATH)"

    def _softplus(self, expr: Any, level: Level) -> str:
        self.helpers |= {"_softplus", "_log", "_log2"}
        return f"_softplus({unwrap(self._operand(expr.args[0], level, True))}, FAST_MATH)"

    def _sigmoid(self, expr: Any, level: Level) -> str:
        power = per_ln2(lower_exp(sympy.expand(-expr.args[0])))
        # two elements of a tile share one division; a row's may be a thread's only one
        name = "_logistic_of_pairs" if self.level_of(power) == Level.PAIR else "_logistic"
        self.helpers.add(name)
        return f"{name}({unwrap(self._operand(power, level, True))}, FAST_MATH)"

    def _silu(self, expr: Any, level: Level) -> str:
        x = expr.args[0]
        return self._product_of(x, voc.sigmoid(x), level)

    def _product_of(self, a: Any, b: Any, level: Level) -> str:
        return f"({self._operand(a, level, True)} * {self._operand(b, level, True)})"

    def _relu(self, expr: Any, level: Level) -> str:
        return f"tl.maximum({unwrap(self._operand(expr.args[0], level, True))}, 0.0)"

    def _step(self, expr: Any, level: Level) -> str:
        return f"tl.where({self._operand(expr.args[0], level, True)} > 0.0, 1.0, 0.0)"

    def _maximum(self, expr: Any, level: Level) -> str:
        is_float = type_of(expr) == "float"
        a, b = (self._operand(x, level, is_float) for x in expr.args)
        return f"tl.{type(expr).__name__}({unwrap(a)}, {unwrap(b)})"

    _minimum = _maximum

    def _where(self, expr: Any, level: Level) -> str:
        is_float = type_of(expr) == "float"
        condition = self._operand(expr.args[0], level, False)
        a, b = (self._operand(x, level, is_float) for x in expr.args[1:])
        return f"tl.where({unwrap(condition)}, {unwrap(a)}, {unwrap(b)})"

    def _detach(self, expr: Any, level: Level) -> str:
        return self._operand(expr.args[0], level, type_of(expr) == "float")

    def _floor(self, expr: Any, level: Level) -> str:
        return f"tl.floor({unwrap(self._operand(expr.args[0], level, True))}).to(tl.int32)"

    def _to_int(self, expr: Any, level: Level) -> str:
        return f"{wrap(self._operand(expr.args[0], level, False))}.to(tl.int32)"

    def _to_float(self, expr: Any, level: Level) -> str:
        if type_of(expr.args[0]) == "bool":
            return f"tl.where({self._operand(expr.args[0], level, False)}, 1.0, 0.0)"
        return self._operand(expr.args[0], level, True)

    def _floordiv(self, expr: Any, level: Level) -> str:
        return self._integer("//", "_floor_div", expr, level)

    def _mod(self, expr: Any, level: Level) -> str:
        return self._integer("%", "_floor_mod", expr, level)

    def _bit_and(self, expr: Any, level: Level) -> str:
        return f"({self._operand(expr.args[0], level, False)} & {self._operand(expr.args[1], level, False)})"

    def _bit_or(self, expr: Any, level: Level) -> str:
        return f"({self._operand(expr.args[0], level, False)} | {self._operand(expr.args[1], level, False)})"

    def _bit_xor(self, expr: Any, level: Level) -> str:
        return f"({self._operand(expr.args[0], level, False)} ^ {self._operand(expr.args[1], level, False)})"

    def _integer(self, operator: str, helper: str, expr: Any, level: Level) -> str:
        """Triton's // and % truncate; they are Python's only where nothing is negative."""
        a, b = expr.args
        left, right = self._operand(a, level, False), self._operand(b, level, False)
        if a.is_nonnegative and b.is_positive:
            return f"({left} {operator} {right})"
        self.helpers.add(helper)
        return f"{helper}({left}, {right})"

    def _read(self, expr: Read, level: Level) -> str:
        """A load. Block edges and indices outside the tensor read 0."""
        decl = self.graph.input(expr.input)
        if self.whole and level == Level.PAIR and self._is_map(expr):
            return self._read_map(expr)
        offsets, guards = [], []
        for dim, (pattern, index) in enumerate(zip(decl.pattern, expr.index, strict=True)):
            at = self.level_of(index)
            text = self._operand(index, level, False)
            plain = isinstance(index, sympy.Symbol) and index.name == pattern
            if at == Level.PAIR and not text.isidentifier():  # a pointer and two guards read it
                name = self._fresh(f"{decl.name}_at")
                self._define(name, unwrap(text), index, at)
                text = name
                self._memo[index] = (name, at)
            if index == sym.COMPONENT:
                guards.append(f"({text} < HEAD_DIM_QK)")
            elif plain and pattern in ("q_idx", "kv_idx"):
                guards.append(f"({text} < {'q_len' if pattern == 'q_idx' else 'kv_len'})")
            elif not plain:
                guards.append(f"({text} >= 0) & ({text} < size_{decl.name}_{dim})")
            if at == Level.PROGRAM:
                offsets.append(f"{wrap(text)} * stride_{decl.name}_{dim}")
            else:
                self.helpers.add("_offset")
                offsets.append(f"_offset({text}, stride_{decl.name}_{dim}, WIDE)")
        pointer = " + ".join([decl.name.upper() + "_PTR", *offsets])
        inside = " & ".join(guards)
        if len(inside) > _LONG_GUARD:
            name = self._fresh(f"{decl.name}_inside")
            self._define(name, inside, expr, level)
            inside = name
        mask = f", mask={inside}, other={decl.beyond}" if guards else ""
        load = f"tl.load({pointer}{mask})"
        if decl.dtype == "int":
            self.helpers.add("_integer")
            return f"_integer({load})"
        return f"{load}.to(tl.float32)"

    def _is_map(self, expr: Read) -> bool:
        fixed = [i for i in expr.index if i not in (sym.Q_IDX, sym.KV_IDX)]
        return is_map(expr, self.graph) and all(self.level_of(i) == Level.PROGRAM for i in fixed)

    def _read_map(self, expr: Read) -> str:
        """A load of a tile of a map: a pointer for each place of the block, that of the last one for those past it."""
        decl = self.graph.input(expr.input)
        strides = {i: f"stride_{decl.name}_{d}" for d, i in enumerate(expr.index)}
        lengths = {sym.Q_IDX: "q_len", sym.KV_IDX: "kv_len"}
        along, across = (sym.Q_IDX, sym.KV_IDX) if self.rows_first else (sym.KV_IDX, sym.Q_IDX)
        others = [i for i in expr.index if i not in lengths]
        start = [f"{decl.name.upper()}_PTR", *(f"{self.leaves[i.name].name} * {strides[i]}" for i in others)]
        start.append(f"_wide(tl.minimum({self.leaves[along.name].name}, {lengths[along]} - 1)) * {strides[along]}")
        lines = self._fresh(f"{decl.name}_lines")
        self._define(lines, " + ".join(start), sympy.Tuple(along, *others), self.leaves[along.name].level)
        at = self.leaves[across.name].name
        self.helpers.add("_pairs")
        tile = f"_pairs({lines}, {at}, {strides[across]}, {lengths[across]}, {self.whole})"
        if self.ahead is not None:
            name = self._fresh(f"{decl.name}_tile")
            self.ahead.append(f"{name} = {tile}")
            tile = name
        if decl.dtype == "int":
            self.helpers.add("_integer")
            return f"_integer({tile})"
        return f"{tile}.to(tl.float32)"

    def _ByDistance(self, expr: Any, level: Level) -> str:
        """An entry of a table: a pointer a row, and each of its columns at a constant from there."""
        number, column, row, shift = expr.args
        key = ByDistance(number, *[sympy.S.Zero] * 3)  # where the table has the distance 0
        if key not in self._memo:
            line = "b * heads + h" if self.tables.by_batch else "h" if self.tables.by_head else "0"
            count = len(self.tables.formulas)
            if count > 1:
                line = " + ".join([*([f"{wrap(line)} * {count}"] if line != "0" else []), str(number)])
            name = self._fresh("at_distance")
            self.helpers.add("_by_distance")
            heads = sym.H if self.tables.by_head or self.tables.by_batch else sympy.S.Zero
            self._define(name, f"_by_distance(DISTANCES_PTR, {line}, q_len, kv_len)", heads, Level.PROGRAM)
            self._memo[key] = (name, Level.PROGRAM)
        start = self._memo[key][0]
        q, kv = self.leaves[row.name].name, self.leaves[column.name].name
        moved = None if shift == 0 else self.leaves[shift.name].name
        if self.rows_first:
            row = f"({moved} + _minus({q}))" if moved else f"_minus({q})"
            return f"tl.load(({start} + {row})[:, None] + _wide({kv})[None, :])"
        row = f"({moved} + _wide({kv}))" if moved else f"_wide({kv})"
        return f"tl.load(({start} + {row})[:, None] + _minus({q})[None, :])"

    def _And(self, expr: Any, level: Level) -> str:
        return "(" + " & ".join(self._condition(a, level) for a in sorted(expr.args, key=str)) + ")"

    def _Or(self, expr: Any, level: Level) -> str:
        return "(" + " | ".join(self._condition(a, level) for a in sorted(expr.args, key=str)) + ")"

    def _Not(self, expr: Any, level: Level) -> str:
        return (
            f"(not {self._condition(expr.args[0], level)})"
            if level == Level.PROGRAM
            else f"~{self._condition(expr.args[0], level)}"
        )

    def _condition(self, expr: Any, level: Level) -> str:
        return self._operand(expr, level, False)

    def _relation(self, expr: Any, level: Level) -> str:
        is_float = "float" in (type_of(expr.lhs), type_of(expr.rhs))
        left, right = (self._operand(x, level, is_float) for x in (expr.lhs, expr.rhs))
        return f"({left} {expr.rel_op} {right})"

    _StrictLessThan = _LessThan = _StrictGreaterThan = _GreaterThan = _Equality = _Unequality = _relation

    def _BooleanTrue(self, expr: Any, level: Level) -> str:
        return "True"

    def _BooleanFalse(self, expr: Any, level: Level) -> str:
        return "False"


def is_map(expr: Read, graph: VariantGraph) -> bool:
    """Is an input read at q_idx and kv_idx, and else at the program's own indices?"""
    plain = tuple(str(i) for i in expr.index) == graph.input(expr.input).pattern
    return plain and {sym.Q_IDX, sym.KV_IDX} <= set(expr.index)


def _integers_first(total: Any) -> tuple[Any, ...]:
    """The terms of a sum with its integers in one: they cancel exactly, before a fraction is added to any of them."""
    integers = [t for t in total.args if t.is_integer and not t.is_number]
    rest = [t for t in total.args if t not in integers]
    return (sympy.Add(*integers), *rest) if len(integers) > 1 and rest else total.args


def _is_reciprocal(f: Any) -> bool:
    return bool(f.is_Pow and f.exp.is_number and f.exp.could_extract_minus_sign() and float(f.exp) == -1)
