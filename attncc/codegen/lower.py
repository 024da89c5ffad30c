"""Lower expressions to lines of Triton. Each shared value is one statement, placed at the level (program, row, column,
pair) at which it varies; a template only decides where the lines of each level go.

This file has scopes, names and placement; `codegen.spelling` has the syntax of each kind of expression, `codegen.loads`
that of loads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

import sympy

from attncc.codegen.loads import MapTile
from attncc.codegen.spelling import spell, sum_text
from attncc.codegen.statements import free_names
from attncc.codegen.texts import hinted, is_number, literal, unwrap, wrap
from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc
from attncc.ir.graph import VariantGraph
from attncc.ir.levels import Level, join
from attncc.ir.vocabulary import ByDistance, Read, type_of
from attncc.passes.distances import NO_TABLES, Tables

#: longer texts have a name
_INLINE = 48


#: what another warp than those that compute knows of a query and of a key
_INDICES = {"q_idx", "kv_idx"}
#: what takes tens of instructions, which a warp that loads has time for
_SLOW = (sympy.log,)


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
    score, and `maps` those of tiles that a copy could fetch. whole: the condition that a tile ends inside the tensors
    along the axis of the loop, where there is one.
    tables: those that the kernel is given by distance; fragments: a thread has of a tile what a warp group's matmul
    gives it.
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
    maps: list[MapTile] | None = None
    tables: Tables = NO_TABLES
    fragments: bool = False
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
        text, own = self.value(self.tables.apart(expr))
        return self.raised(text, own, own if at is None else join(own, at))

    def assign(self, name: str, expr: Any, at: Level) -> None:
        """A statement `name = expr` in the body, and from then on `name` stands for the expression, if that is of level
        `at` itself: what is the same for a row, or for all, is asked for before the loop, too."""
        expr = self.tables.apart(expr)
        text, own = self._memo.get(expr) or (spell(self, expr, self.level_of(expr)), self.level_of(expr))
        self.body.append(f"{name} = {unwrap(self._tile(text, own, at))}")
        if own == at:
            self._memo[expr] = (name, at)

    def tile(self, expr: Any) -> str:
        """The text of an expression as a whole tile, also where it is the same for every pair."""
        return self._tile(*self.value(self.tables.apart(expr)), Level.PAIR)

    def _tile(self, text: str, own: Level, at: Level) -> str:
        raised = self.raised(text, own, at)
        return f"{self.blank} + {raised}" if at == Level.PAIR and own != Level.PAIR else raised

    def level_of(self, expr: Any) -> Level:
        """The level of an expression, given what the leaves are."""
        result = Level.PROGRAM
        for s in expr.free_symbols:
            if s.name in self.leaves:
                result = join(result, self.leaves[s.name].level)
        return result

    def known(self, expr: Any) -> str | None:
        """The name that already stands for an expression."""
        return self._memo[expr][0] if expr in self._memo else None

    def remember(self, expr: Any, name: str, level: Level) -> None:
        """From now on `name` stands for the expression."""
        self._memo[expr] = (name, level)

    @property
    def _block_axis(self) -> Level:
        return self.own_axis or (Level.ROW if self.rows_first else Level.COL)

    def _is_outer(self, expr: Any, level: Level) -> bool:
        return level in (Level.PROGRAM, self._block_axis) and not any(s.name in self.running for s in expr.free_symbols)

    def define(self, name: str, text: str, expr: Any, level: Level, to_float: bool = False) -> None:
        """A statement `name = text`, among those of its level."""
        along = Level.COL if self._block_axis == Level.ROW else Level.ROW
        slow = any(self.level_of(e) == along for e in expr.atoms(Read, *_SLOW))
        if self.streamed is not None and level == along and slow and self._varies_by(expr, along) <= _INDICES:
            inputs = frozenset(str(r.input) for r in expr.atoms(Read))
            self.streamed.append(Streamed(name, text, "float" if to_float else type_of(expr), inputs))
            return
        lines = self.body
        if self._is_outer(expr, level):
            lines = self.by_head if self.many_heads and sym.H in expr.free_symbols else self.outer
        lines.append(f"{name} = {text}")

    def _varies_by(self, expr: Any, level: Level) -> set[str]:
        """What of a level an expression is made of, of all that the template provides."""
        return {s.name for s in expr.free_symbols if s.name in self.leaves and self.leaves[s.name].level == level}

    def value(self, expr: Any) -> tuple[str, Level]:
        """The text of an expression and its level; what is shared, loaded or long has a name."""
        if expr in self._memo:
            return self._memo[expr]
        level = self.level_of(expr)
        text = spell(self, expr, level)
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
        name = self.fresh(hinted(expr))
        self.define(name, unwrap(text), expr, level)
        return name

    def forget(self, names: Set[str]) -> None:
        """What statements made that set these names is computed anew where it is asked for again: in another function,
        which does not see them."""
        for expr in [e for e, (text, _) in self._memo.items() if names & {*free_names([text])}]:
            del self._memo[expr]

    def forget_rows(self, names: Set[str]) -> None:
        """Rows' values of statements that set these names are computed anew where they are asked for again."""
        gone = [e for e, (text, level) in self._memo.items() if level == Level.ROW and names & {*free_names([text])}]
        for expr in gone:
            del self._memo[expr]

    def fresh(self, hint: str) -> str:
        """A name that nothing else has."""
        taken = {leaf.name for leaf in self.leaves.values()}
        while True:
            number = self._names[hint]
            self._names[hint] += 1
            name = hint if number == 0 and hint not in taken else f"{hint}_{number}"
            if name not in taken:
                return name

    def hoisted(self, expr: Any) -> str:
        """A lower-level operand as a named value, so that it is computed once and not inside the loop."""
        if expr in self._memo:
            return self._memo[expr][0]
        level = self.level_of(expr)
        text = spell(self, expr, level)
        if not (text.isidentifier() or is_number(text)):
            text = self._name(expr, text, level)
        self._memo[expr] = (text, level)
        return text

    def operand(self, expr: Any, at: Level, to_float: bool) -> str:
        """An operand of an expression of level `at`; a lower level is hoisted and broadcast."""
        own = self.level_of(expr)
        if to_float and type_of(expr) == "int" and not expr.is_number:
            return self.as_float(expr, at)
        if own != at and not expr.is_number:
            return self.raised(self.hoisted(expr), own, at)
        text, own = self.value(expr)
        return self.raised(text, own, at)

    def raised(self, text: str, own: Level, at: Level) -> str:
        """A row's or a column's value as an operand of a pair's."""
        if at != Level.PAIR or own not in (Level.ROW, Level.COL):
            return text
        along_first = (own == Level.ROW) == self.rows_first
        suffix = "[:, None]" if along_first else "[None, :]"
        return f"{text}{suffix}" if text.isidentifier() else f"({text}){suffix}"

    def as_float(self, expr: Any, at: Level) -> str:
        """An integer expression as a float. Sums are converted term by term, which is exact below 2^24 and costs no
        conversion a pair: a row's and a column's index are converted once each."""
        key = voc.to_float(expr)
        own = self.level_of(expr)
        if key not in self._memo:
            if expr.is_Add:
                text = sum_text(self, expr, own, to_float=True)
            elif expr.is_Mul and expr.args[0].is_number:
                text = f"{literal(expr.args[0], True)} * {wrap(self.as_float(sympy.Mul(*expr.args[1:]), own))}"
            elif own == Level.PROGRAM:
                text = f"({self.value(expr)[0]} * 1.0)"
            else:
                text = f"{wrap(self.value(expr)[0])}.to(tl.float32)"
            if own != Level.PAIR or isinstance(expr, sympy.Symbol):
                name = self.fresh(f"{hinted(expr)}_f")
                self.define(name, unwrap(text), expr, own, to_float=True)
                text = name
            self._memo[key] = (wrap(text) if own == Level.PAIR else text, own)
        return self.raised(*self._memo[key], at)
