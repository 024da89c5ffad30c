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

#: longer expressions get a name
_INLINE = 48


#: the indices that a warp can know which does not compute
_INDICES = {"q_idx", "kv_idx"}
#: functions that take tens of instructions, for which the loading warp has time
_SLOW = (sympy.log,)


@dataclass(frozen=True)
class Leaf:
    """A value that the template has computed: its name in the kernel and its level."""

    name: str
    level: Level


@dataclass(frozen=True)
class Streamed:
    """A value per index of the loop's axis: its name, its text, its type ("int", "float" or "bool"), and the inputs
    that it reads."""

    name: str
    text: str
    type: str
    inputs: frozenset[str]


@dataclass
class Lowering:
    """Builds the statements of one kernel.

    What the kernel has:

    - leaves: values that the template provides;
    - rows_first: tiles of pairs are [rows, columns]; else transposed, as in the kernel of dK and dV;
    - own_axis: ROW or COL, the axis of a program's block; by default a tile's first axis;
    - running: names of row values that change inside the loop;
    - many_heads: a program visits several query heads;
    - blank: the text of a tile of zeros;
    - whole: the condition that a tile lies inside the tensors along the axis of the loop; "" if there is none;
    - tables: functions of the distance that the kernel reads from tables;
    - fragments: tiles have the layout of a wgmma's result.

    Where statements go, in an order in which they can run (`outer` needs no other list):

    - outer: before the loop; values of the whole program, or per index of its own axis;
    - by_head: values per query head, if a program visits several;
    - body: inside the loop;
    - streamed, if not None: values read along the axis of the loop, and values that depend on these alone;
    - ahead, if not None: loads per pair, which need no score;
    - maps, if not None: loads of tiles that a bulk copy could fetch.
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
        """Announce expressions before they are emitted: a subexpression that occurs twice becomes a named value."""
        for expr in map(self.tables.apart, exprs):
            stack = [expr]
            while stack:
                e = stack.pop()
                self._uses[e] += 1
                if self._uses[e] == 1:
                    stack.extend(e.args)

    def branch(self) -> Lowering:
        """A scope inside the loop with a body of its own, such as that of an `if`."""
        return replace(self, body=[], _memo=dict(self._memo))

    def set_aside(self, scope: Lowering) -> None:
        """Make the values that a branch hoisted before the loop known to later loops."""
        self._aside.update({e: v for e, v in scope._memo.items() if self._is_outer(e, v[1])})

    def after_loop(self) -> Lowering:
        """The scope after the loop: only values computed before the loop are still known."""
        kept = {e: v for e, v in self._memo.items() if self._is_outer(e, v[1])}
        return replace(self, body=[], _memo=kept)

    def next_sweep(self, running: frozenset[str]) -> Lowering:
        """The scope of a later loop, in which other row values change. Its hoisted lines run between the two loops."""
        after = self.after_loop()
        return replace(after, outer=[], running=running, _memo={**self._aside, **after._memo}, _uses=Counter())

    def emit(self, expr: Any, at: Level | None = None) -> str:
        """The text of an expression, as an operand of level `at` (its own level by default)."""
        text, own = self.value(self.tables.apart(expr))
        return self.raised(text, own, own if at is None else join(own, at))

    def assign(self, name: str, expr: Any, at: Level) -> None:
        """Add a statement `name = expr` to the body. From then on `name` stands for the expression, if it has level
        `at` itself: an expression of a lower level may also be needed before the loop."""
        expr = self.tables.apart(expr)
        text, own = self._memo.get(expr) or (spell(self, expr, self.level_of(expr)), self.level_of(expr))
        self.body.append(f"{name} = {unwrap(self._tile(text, own, at))}")
        if own == at:
            self._memo[expr] = (name, at)

    def tile(self, expr: Any) -> str:
        """The text of an expression as a whole tile, even if it is the same for every pair."""
        return self._tile(*self.value(self.tables.apart(expr)), Level.PAIR)

    def _tile(self, text: str, own: Level, at: Level) -> str:
        raised = self.raised(text, own, at)
        return f"{self.blank} + {raised}" if at == Level.PAIR and own != Level.PAIR else raised

    def level_of(self, expr: Any) -> Level:
        """The level of an expression, given the levels of the leaves."""
        result = Level.PROGRAM
        for s in expr.free_symbols:
            if s.name in self.leaves:
                result = join(result, self.leaves[s.name].level)
        return result

    def known(self, expr: Any) -> str | None:
        """The name that already stands for an expression, else None."""
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
        """Add a statement `name = text` to the list of its level."""
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
        """The names of the leaves of this level that an expression depends on."""
        return {s.name for s in expr.free_symbols if s.name in self.leaves and self.leaves[s.name].level == level}

    def value(self, expr: Any) -> tuple[str, Level]:
        """The text of an expression and its level; a shared, loaded or long expression gets a name."""
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
        """Forget values that were computed from these names, so that later uses compute them again: they are in another
        function, which does not see the names."""
        for expr in [e for e, (text, _) in self._memo.items() if names & {*free_names([text])}]:
            del self._memo[expr]

    def forget_rows(self, names: Set[str]) -> None:
        """Forget row values that were computed from these names, so that later uses compute them again."""
        gone = [e for e, (text, level) in self._memo.items() if level == Level.ROW and names & {*free_names([text])}]
        for expr in gone:
            del self._memo[expr]

    def fresh(self, hint: str) -> str:
        """A new name, made from `hint`."""
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
        """A value per row or column, broadcast if it is an operand at level PAIR."""
        if at != Level.PAIR or own not in (Level.ROW, Level.COL):
            return text
        along_first = (own == Level.ROW) == self.rows_first
        suffix = "[:, None]" if along_first else "[None, :]"
        return f"{text}{suffix}" if text.isidentifier() else f"({text}){suffix}"

    def as_float(self, expr: Any, at: Level) -> str:
        """An integer expression as a float. Sums are converted term by term, which is exact below 2^24 and needs no
        conversion per pair: the indices of rows and columns are converted once each."""
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
