"""The similarity in each kernel: operands of its matmuls, its row and column terms, and their contributions to the
gradients of q, k and the vector inputs that they read.

Tiles here are [rows, components] of q or k, one chunk of the head dimension at a time: a vector expression is lowered
like any other, with the component in the role of the column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy

from attncc.codegen.chunks import Chunk
from attncc.codegen.components import slope
from attncc.codegen.lower import Leaf, Lowering
from attncc.codegen.plan import Plan
from attncc.ir import symbols as sym
from attncc.ir.levels import Level, level
from attncc.ir.vocabulary import Read
from attncc.passes.calculus import derivative
from attncc.passes.fold import lower_exp
from attncc.passes.similarity import Dot, Loop, Term


@dataclass(frozen=True)
class Side:
    """The query's or the key's side: the names of its tile, vector, row index, length and block size in a kernel."""

    tile: str  # q | k
    vector: sympy.Symbol
    index: str
    length: str
    block: str

    def factor(self, dot: Dot) -> sympy.Expr:
        """This side's operand of a matmul."""
        return dot.left if self.tile == "q" else dot.right


QUERY = Side("q", sym.Q_VEC, "q_idx", "q_len", "BLOCK_M")
KEY = Side("k", sym.K_VEC, "kv_idx", "kv_len", "BLOCK_N")


@dataclass(frozen=True)
class VectorGradient:
    """The gradient of an input that a sum over the head dimension reads; its cotangent is `expr` at each component.

    kind: "row" or "col" if the input has an entry per query or per key, "band" if the sum of `loop` reads it by their
    distance, else "program"; vector: it has an entry per component, too; looped: `expr` is the cotangent at a pair, and
    a loop over the components sums it, else that at a row. For a band that is not looped, `expr` is the factor of the
    input in the sum.
    """

    read: Read
    expr: sympy.Expr
    side: Side
    kind: str
    number: int
    looped: bool = False
    loop: Loop | None = None

    @property
    def name(self) -> str:
        return f"d{self.read.input}_{self.number}"

    @property
    def vector(self) -> bool:
        return sym.COMPONENT in self.read.index


class SimilaritySlots:
    """The slots of one plan's similarity, for all kernels. `held`: the text of a chunk of a side's tile in float32, in
    a kernel that has it in registers."""

    def __init__(self, plan: Plan, held: str = "{tile}_{chunk}.to(tl.float32)"):
        self.plan = plan
        self.held = held
        self.found = plan.similarity

    @property
    def plain_dot(self) -> bool:
        """Whether dot(q_vec, k_vec) is its only sum over the head dimension."""
        return self.has_dot and not self.found.dots and not self.found.loops

    @property
    def has_dot(self) -> bool:
        """Whether dot(q_vec, k_vec) is computed. Each of several branches has its own."""
        return self.plan.graph.branches > 1 or self.plan.graph.has_dot

    def terms(self, side: Side) -> tuple[Term, ...]:
        """The row terms (QUERY) or the column terms (KEY)."""
        return self.found.q_terms if side is QUERY else self.found.k_terms

    def loads(self, side: Side) -> bool:
        """Whether a kernel loads this side's tile as it is, for its scores or because v is part of it."""
        if side is KEY and self.plan.graph.value is not None:
            return True
        return self.has_dot or any(side.vector in side.factor(d).free_symbols for d in self.found.dots)

    def wide_reads(self, side: Side) -> set[Read]:
        """The inputs' elements that this side's operands read at each component of each row."""
        index = {sym.COMPONENT.name, side.index}
        reads = {read for dot in self.found.dots for read in side.factor(dot).atoms(Read)}
        return {read for read in reads if index <= {s.name for s in read.free_symbols}}

    def passes_on(self, side: Side) -> bool:
        """Whether the gradient of this side needs the side's own tile again, after the loop."""
        after = [self.vector_expr(side), *(g.expr for g in self.gradients if g.side is side and not g.looped)]
        return any(side.vector in e.free_symbols for e in after)

    def direct(self, side: Side, dot: Dot) -> bool:
        """Whether this side's operand is its vector as it is, so that the operand's cotangent is part of the
        gradient."""
        return side.factor(dot) == side.vector

    @cached_property
    def flowing(self) -> tuple[Dot, ...]:
        """The matmuls whose cotangent is not 0. It is 0 if the weight is a step function of the score."""
        return tuple(d for d in self.found.dots if self._flows(d.name))

    @cached_property
    def flowing_loops(self) -> tuple[Loop, ...]:
        """The loops whose sums have a cotangent that is not 0."""
        return tuple(x for x in self.found.loops if self._flows(x.name))

    def _flows(self, name: str) -> bool:
        if self.plan.has_backward is not None:
            return True
        return all(e != 0 for symbol, e in self.plan.backward.dsums if symbol.name == name)

    def own_accumulators(self, side: Side) -> tuple[Dot, ...]:
        """The matmuls whose operand of this side is a function of its vector: its cotangent must be accumulated, then
        transformed, to be part of the gradient."""
        return tuple(d for d in self.flowing if not self.direct(side, d))

    def _total(self, side: Side) -> sympy.Expr:
        """One component of the expression whose derivative by the side's vector is the vector's gradient."""
        dots = [_accumulated(d) * side.factor(d) for d in self.own_accumulators(side)]
        flowing = {g.read for g in self.plan.gradients}  # the others' cotangents are 0
        return sympy.Add(*dots, *(_cotangent(t) * t.summand for t in self.terms(side) if t.read in flowing))

    def vector_expr(self, side: Side) -> sympy.Expr:
        """The value added, after the loop, to each component of the side's gradient."""
        return derivative(self._total(side), side.vector)

    @cached_property
    def gradients(self) -> tuple[VectorGradient, ...]:
        """The gradients of inputs read inside sums over the head dimension, one per read and side."""
        wanted = {d.name for d in self.plan.graph.inputs if d.grad}
        number = len(self.plan.gradients)
        found: list[VectorGradient] = []
        for side in (QUERY, KEY):
            total = self._total(side)
            for read in sorted(total.atoms(Read), key=str):
                expr = self._slope(side, total, read)
                if read.input in wanted and expr != 0:
                    along = {s.name for s in read.free_symbols}
                    kind = {"q_idx": "row", "kv_idx": "col"}[side.index] if side.index in along else "program"
                    found.append(VectorGradient(read, expr, side, kind, number + len(found)))
        reads = set().union(*(x.summand.atoms(Read) for x in self.flowing_loops))
        for read in sorted((r for r in reads if r.input in wanted and level(r) != Level.PAIR), key=str):
            expr = slope(self.flowing_loops, read)
            side = KEY if level(read) == Level.COL else QUERY
            kind = {Level.COL: "col", Level.ROW: "row"}.get(level(read), "program")
            if expr != 0:
                found.append(VectorGradient(read, expr, side, kind, number + len(found), looped=True))
        return tuple(found)

    def _slope(self, side: Side, total: sympy.Expr, read: Read) -> sympy.Expr:
        """The derivative of `_total` by `read`.

        A factor such as q exp(G) is its own derivative by G. There the derivative uses the matmul's operand, rounded as
        in the matmul. The contributions of q and k to an exponent's gradient cancel, pair by pair, if both lie on one
        side of a token, but only if both contain exactly the same product: with factors that are not rounded, dg of a
        sum of logs is 1.4e-2 off in bfloat16 beside 500 keys, with these 2.8e-3.
        """
        whole = {}
        for dot in self.own_accumulators(side):
            exponent = sympy.powsimp(derivative(side.factor(dot), read) / side.factor(dot))
            if not exponent.has(read, side.vector):
                whole[_accumulated(dot) * side.factor(dot)] = exponent * _accumulated(dot) * _operand(side, dot)
        return derivative(total - sympy.Add(*whole), read) + sympy.Add(*whole.values())

    @cached_property
    def bands(self) -> tuple[VectorGradient, ...]:
        """The gradients of tables of distances, one per table and loop that reads it."""
        wanted = {d.name for d in self.plan.graph.inputs if d.grad}
        number = len(self.plan.gradients) + len(self.gradients)
        found: list[VectorGradient] = []
        for loop in self.flowing_loops:
            for read in sorted((r for r in loop.summand.atoms(Read) if r.input in wanted), key=str):
                factor = loop.factor if read == loop.table else slope((loop,), read)
                if level(read) == Level.PAIR and factor != 0:
                    looped = read != loop.table
                    found.append(VectorGradient(read, factor, QUERY, "band", number + len(found), looped, loop))
        return tuple(found)

    def looped(self, side: Side) -> tuple[VectorGradient, ...]:
        """The gradients of inputs that the loops over components sum in the kernel of this side's gradient."""
        return tuple(g for g in self.gradients if g.looped and g.side is side)

    def leaves(self, side: Side, chunk: Chunk, base: Mapping[str, Leaf]) -> dict[str, Leaf]:
        """The values that a vector expression of this side may use; [rows, components] take the place of pairs."""
        own = {
            sym.COMPONENT.name: Leaf(f"d_qk_{chunk.index}", Level.COL),
            side.vector.name: Leaf(self.held.format(tile=side.tile, chunk=chunk.index), Level.PAIR),
            side.index: Leaf(side.index, Level.ROW),
        }
        for dot in self.own_accumulators(side):
            own[_accumulated(dot).name] = Leaf(f"{accumulator(side, dot)}_{chunk.index}", Level.PAIR)
            own[operand(side, dot)] = Leaf(f"{operand(side, dot)}_{chunk.index}.to(tl.float32)", Level.PAIR)
        sums = {g.read: g.name for g in self.plan.gradients} if self.plan.has_backward is None else {}
        for term in self.terms(side):
            if term.read in sums:
                own[_cotangent(term).name] = Leaf(f"{sums[term.read]}_sum", Level.ROW)
        return {**base, **own}

    def scope(self, side: Side, chunk: Chunk, kernel: Lowering, base: Mapping[str, Leaf]) -> Lowering:
        """A lowering of vector expressions, whose new names differ from those of the kernel's lowering."""
        return Lowering(
            self.plan.core,
            self.leaves(side, chunk, base),
            helpers=kernel.helpers,
            blank=f"tl.zeros([{side.block}, {chunk.width}], tl.float32)",
            _names=kernel._names,
        )

    def operands(self, side: Side, chunks: tuple[Chunk, ...], kernel: Lowering, base: Mapping[str, Leaf]) -> list[str]:
        """Lines that compute the matmuls' operands that are not the loaded tile itself."""
        lines: list[str] = []
        for dot in self.found.dots:
            if self.direct(side, dot):
                continue
            lines += self.made(operand(side, dot), side.factor(dot), side, chunks, kernel, base)
        return lines

    def made(
        self,
        name: str,
        factor: sympy.Expr,
        side: Side,
        chunks: tuple[Chunk, ...],
        kernel: Lowering,
        base: Mapping[str, Leaf],
    ) -> list[str]:
        """Lines that compute one operand of a matmul, a function (`factor`) of a side's vector."""
        lines: list[str] = []
        for chunk in chunks:
            scope = self.scope(side, chunk, kernel, base)
            text = _tile(scope, factor)
            lines += [*scope.outer, *scope.body]
            lines.append(f"{name}_{chunk.index} = {_inside(text, side, chunk, factor)}.to(DOT)")
        return lines

    def dots(self, chunks: tuple[Chunk, ...], rows_first: bool) -> list[str]:
        """Lines of the matmuls besides dot(q, k)."""
        lines = []
        for dot in self.found.dots:
            left, right = (
                f"{side.tile}" if self.direct(side, dot) else operand(side, dot)
                for side in ((QUERY, KEY) if rows_first else (KEY, QUERY))
            )
            for chunk in chunks:
                before = f", {dot.name}" if chunk.index else ""
                c = chunk.index
                product = f"{left}_{c}, tl.trans({right}_{c}){before}, input_precision=PRECISION"
                lines.append(f"{dot.name} = tl.dot({product})")
        return lines

    def accumulate(self, side: Side, chunks: tuple[Chunk, ...]) -> list[str]:
        """Lines that accumulate a tile's contribution to the cotangent of each matmul's operand of `side`."""
        other = KEY if side is QUERY else QUERY
        lines = []
        for dot in self.flowing:
            target = f"d{side.tile}" if self.direct(side, dot) else accumulator(side, dot)
            right = other.tile if self.direct(other, dot) else operand(other, dot)
            for chunk in chunks:
                c = chunk.index
                product = f"d{dot.name}.to(DOT), {right}_{c}, {target}_{c}, input_precision=PRECISION"
                lines.append(f"{target}_{c} = tl.dot({product})")
        return lines

    def accumulators(self, side: Side, chunks: tuple[Chunk, ...]) -> list[str]:
        """Lines that set the accumulators of `accumulate`, and those of the loops over components, to 0."""
        zeros = "tl.zeros([{}], tl.float32)"
        lines = []
        names = [accumulator(side, dot) for dot in self.own_accumulators(side)]
        names += [f"{g.name}_sum" for g in self.looped(side) if g.vector]
        for name in names:
            lines += [f"{name}_{c.index} = {zeros.format(f'{side.block}, {c.width}')}" for c in chunks]
        return lines + [f"{g.name}_rows = {zeros.format(side.block)}" for g in self.looped(side) if not g.vector]

    def epilogue(self, side: Side, chunks: tuple[Chunk, ...], kernel: Lowering, base: Mapping[str, Leaf]) -> list[str]:
        """Lines after the loop: the contributions of terms and transformed operands to the side's gradient, and the
        gradients of the inputs that these read."""
        lines: list[str] = []
        expr = self.vector_expr(side)
        gradients = [g for g in self.gradients if g.side is side]
        for chunk in chunks:
            if expr != 0:
                scope = self.scope(side, chunk, kernel, base)
                text = _tile(scope, expr)
                name = f"d{side.tile}_{chunk.index}"
                lines += [*scope.outer, *scope.body, f"{name} += {text}"]
        for gradient in gradients:
            body: list[str] = []
            for chunk in chunks if gradient.vector or not gradient.looped else ():
                if gradient.looped:
                    body += _gradient_lines(gradient, chunk, f"{gradient.name}_sum_{chunk.index}")
                    continue
                scope = self.scope(side, chunk, kernel, base)
                text = _tile(scope, gradient.expr)
                body += [*scope.outer, *scope.body, *_gradient_lines(gradient, chunk, text)]
            body += _gradient_end(gradient)
            lines += [f"if WANT_{gradient.name.upper()}:", *(f"    {line}" for line in body)]
        return lines


def _tile(scope: Lowering, expr: sympy.Expr) -> str:
    """A vector expression as a tile; the lines before it are in the scope."""
    lowered = lower_exp(expr)
    scope.count([lowered])
    return scope.tile(lowered)


def operand(side: Side, dot: Dot) -> str:
    """The name of a matmul's operand."""
    return f"{side.tile}_{dot.name}"


def accumulator(side: Side, dot: Dot) -> str:
    """The name of the cotangent of a matmul's operand."""
    return f"d{side.tile}_{dot.name}"


def _operand(side: Side, dot: Dot) -> sympy.Symbol:
    return sympy.Symbol(operand(side, dot), real=True)


def _accumulated(dot: Dot) -> sympy.Symbol:
    return sympy.Symbol(f"d_{dot.name}", real=True)


def _cotangent(term: Term) -> sympy.Symbol:
    return sympy.Symbol(f"d_{term.name}", real=True)


def _inside(text: str, side: Side, chunk: Chunk, factor: sympy.Expr) -> str:
    """The text of a tile, masked to 0 outside of q or k if its function does not map a loaded 0 to 0."""
    guards = []
    if not factor.is_polynomial(side.vector):
        guards.append(f"({side.index} < {side.length})[:, None]")
    if chunk.partial and factor.subs(side.vector, 0) != 0:
        guards.append(f"(d_qk_{chunk.index} < HEAD_DIM_QK)[None, :]")
    return f"tl.where({' & '.join(guards)}, {text}, 0.0)" if guards else f"({text})"


def _gradient_lines(gradient: VectorGradient, chunk: Chunk, text: str) -> list[str]:
    """Lines that store, or add up, one chunk's part of an input's gradient."""
    side, c = gradient.side, chunk.index
    rows = f"({side.index} < {side.length})"
    cols = f"(d_qk_{c} < HEAD_DIM_QK)"
    if not gradient.vector:  # one value for all components
        part = f"tl.sum(tl.where({rows}[:, None] & {cols}[None, :], {text}, 0.0), 1)"
        return [f"{gradient.name}_rows = {part}" if c == 0 else f"{gradient.name}_rows += {part}"]
    at = f"{gradient.name.upper()}_PTR"
    if gradient.kind != "program":
        place = (
            f"{at} + ((b * heads + h) * {side.length} + _wide({side.index}))[:, None] * HEAD_DIM_QK + d_qk_{c}[None, :]"
        )
        return [f"tl.store({place}, {text}, mask={rows}[:, None] & {cols}[None, :])"]
    block = "bh * m_blocks + m_block" if side is QUERY else "(b * heads + h) * n_blocks + n_block"
    value = f"tl.sum(tl.where({rows}[:, None], {text}, 0.0), 0)"
    return [f"tl.store({at} + ({block}) * HEAD_DIM_QK + d_qk_{c}, {value}, mask={cols})"]


def _gradient_end(gradient: VectorGradient) -> list[str]:
    """Lines that store a gradient that has no entry per component, after all chunks."""
    if gradient.vector:
        return []
    side, at, rows = gradient.side, f"{gradient.name.upper()}_PTR", f"{gradient.name}_rows"
    if gradient.looped and gradient.kind == "program":
        rows = f"tl.where({side.index} < {side.length}, {rows}, 0.0)"
    if gradient.kind != "program":
        mask = f"mask={side.index} < {side.length}"
        return [f"tl.store({at} + (b * heads + h) * {side.length} + {side.index}, {rows}, {mask})"]
    block = "bh * m_blocks + m_block" if side is QUERY else "(b * heads + h) * n_blocks + n_block"
    return [f"tl.store({at} + {block}, tl.sum({rows}, 0))"]


def term_slots(
    slots: SimilaritySlots, side: Side, chunks: tuple[Chunk, ...], base: Mapping[str, Leaf]
) -> dict[str, Any]:
    """Slots of terms.py.j2: the kernel that computes the row terms, or the column terms."""
    kernel = Lowering(slots.plan.graph, base)
    terms = slots.terms(side)
    lines: list[str] = []
    for term in terms:
        for chunk in chunks:
            scope = slots.scope(side, chunk, kernel, base)
            text = _tile(scope, term.summand)
            lines += [*scope.outer, *scope.body]
            if chunk.partial and term.summand.subs(side.vector, 0) != 0:
                text = f"tl.where((d_qk_{chunk.index} < HEAD_DIM_QK)[None, :], {text}, 0.0)"
            lines.append(f"{term.name} {'+=' if chunk.index else '='} tl.sum({text}, 1)")
    return {
        "name": f"{side.tile}_terms_kernel",
        "side": side,
        "terms": terms,
        "lines": lines,
        "by_head": terms[0].read.index[1] == sym.H,
        "helpers": kernel.helpers,
    }
