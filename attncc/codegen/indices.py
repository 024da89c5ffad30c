"""Index expressions as PyTorch code, for the host part of a gradient: the entry to which a reduced value is added."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sympy
from sympy.printing.str import StrPrinter

from attncc.codegen.plan import InputGradient, Plan
from attncc.codegen.similarity import VectorGradient
from attncc.errors import UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir.graph import LOOP_DIMS, InputDecl, VariantGraph
from attncc.ir.vocabulary import Read


class TorchIndexPrinter(StrPrinter):
    """Prints integer expressions over broadcastable int64 tensors."""

    def __init__(self, graph: VariantGraph):
        super().__init__({"order": None})
        self._graph = graph

    def _print_floordiv(self, expr: Any) -> str:
        return f"(({self._print(expr.args[0])}) // ({self._print(expr.args[1])}))"

    def _print_mod(self, expr: Any) -> str:
        return f"(({self._print(expr.args[0])}) % ({self._print(expr.args[1])}))"

    def _print_bit_and(self, expr: Any) -> str:
        return f"(({self._print(expr.args[0])}) & ({self._print(expr.args[1])}))"

    def _print_bit_or(self, expr: Any) -> str:
        return f"(({self._print(expr.args[0])}) | ({self._print(expr.args[1])}))"

    def _print_bit_xor(self, expr: Any) -> str:
        return f"(({self._print(expr.args[0])}) ^ ({self._print(expr.args[1])}))"

    def _tensor(self, expr: Any) -> str:
        return f"torch.as_tensor({self._print(expr)})"

    def _print_maximum(self, expr: Any) -> str:
        return f"torch.maximum({self._tensor(expr.args[0])}, {self._tensor(expr.args[1])})"

    def _print_minimum(self, expr: Any) -> str:
        return f"torch.minimum({self._tensor(expr.args[0])}, {self._tensor(expr.args[1])})"

    def _print_absolute(self, expr: Any) -> str:
        return f"abs({self._print(expr.args[0])})"

    def _print_relu(self, expr: Any) -> str:
        return f"torch.relu({self._tensor(expr.args[0])})"

    def _print_where(self, expr: Any) -> str:
        condition, a, b = expr.args
        return f"torch.where({self._print(condition)}, {self._tensor(a)}, {self._tensor(b)})"

    def _print_to_int(self, expr: Any) -> str:
        return f"torch.as_tensor({self._print(expr.args[0])}).long()"

    def _print_to_float(self, expr: Any) -> str:
        return f"torch.as_tensor({self._print(expr.args[0])}).double()"

    def _print_floor(self, expr: Any) -> str:
        return f"torch.as_tensor({self._print(expr.args[0])}).floor().long()"

    def _print_log(self, expr: Any) -> str:
        return f"torch.as_tensor({self._print(expr.args[0])}).double().log()"

    def _print_Relational(self, expr: Any) -> str:
        return f"(({self._print(expr.lhs)}) {expr.rel_op} ({self._print(expr.rhs)}))"

    def _print_And(self, expr: Any) -> str:
        return "(" + " & ".join(self._print(a) for a in sorted(expr.args, key=str)) + ")"

    def _print_Or(self, expr: Any) -> str:
        return "(" + " | ".join(self._print(a) for a in sorted(expr.args, key=str)) + ")"

    def _print_Read(self, expr: Any) -> str:
        if not expr.index:
            return str(expr.input)
        index = ", ".join(self._print(i) for i in expr.index)
        return f"_at({expr.input}, ({_loops(self._graph.input(expr.input))},), {index})"

    def emptyPrinter(self, expr: Any) -> str:
        raise UnsupportedError(f"{type(expr).__name__} in an index whose input wants a gradient: not derived yet")

    def _print_Function(self, expr: Any) -> str:
        return self.emptyPrinter(expr)


#: the size of each loop dimension, in a host function
_SIZES = {"b": "q.shape[0]", "h": "q.shape[1]", "h_kv": "k.shape[1]", "q_idx": "q.shape[2]", "kv_idx": "k.shape[2]"}


def _loops(decl: InputDecl) -> str:
    """The sizes of the loop dimensions of an input, as text; 1 for a dimension that is not of the loop."""
    return ", ".join(_SIZES.get(dim, "1") for dim in decl.pattern)


def input_arguments(graph: VariantGraph) -> str:
    """The arguments for inputs and scalars that the host passes to every kernel.

    A kernel that reads a loop dimension at an index other than the loop's own must know its size, because it cannot be
    taken from a broadcast dimension of size 1.
    """
    shifted = {
        read.input
        for read in graph.reads
        for dim, i in zip(graph.input(read.input).pattern, read.index, strict=True)
        if dim in LOOP_DIMS and not (i.is_Symbol and i.name == dim)
    }
    views = [f"*_addressing({d.name}{f', {_loops(d)}' if d.name in shifted else ''}), " for d in graph.inputs]
    return "".join((*views, *(f"{s.name}, " for s in graph.scalars)))


#: dimensions of the reduced values, by the kind of reduction
_DIMS = {
    "program": ("b", "h"),
    "row": ("b", "h", "q_idx"),
    "col": ("b", "h", "kv_idx"),
    "tile": ("b", "h", "q_idx", "kv_idx"),
    "band": ("b", "h", "distance"),
}


def nested_reads(gradients: Iterable[InputGradient | VectorGradient]) -> bool:
    """Whether an input with a gradient is indexed by an element of another input."""
    return any(i.atoms(Read) for g in gradients for i in g.read.index)


def collect_lines(plan: Plan, vectors: Sequence[VectorGradient]) -> list[str]:
    """Host statements that turn each kernel's partial sums into `grad_<input>`; `vectors` are the similarity's."""
    lines = []
    gradients: list[InputGradient | VectorGradient] = [*plan.gradients, *vectors]
    for decl in plan.graph.inputs:
        if not decl.grad:
            continue
        terms = [g for g in gradients if g.read.input == decl.name]
        if not terms:
            lines.append(f"    grad_{decl.name} = torch.zeros_like({decl.name})")
            continue
        lines.append(f"    grad_{decl.name} = None")
        lines.append(f'    if "{decl.name}" in wanted:')
        for i, gradient in enumerate(terms):
            lines += ["    " + line for line in _collect(plan, gradient, first=i == 0)]
    return lines


def _collect(plan: Plan, gradient: InputGradient | VectorGradient, first: bool) -> list[str]:
    name, kind, read = gradient.name, gradient.kind, gradient.read
    dims = _DIMS[kind]
    if sym.COMPONENT in read.index:
        dims = (*dims, sym.COMPONENT.name)
    lines: list[str] = []
    if kind == "program":
        lines.append(f"    {name} = {name}.sum({2 if sym.COMPONENT in read.index else -1})")
    declared = plan.graph.input(read.input).pattern
    names = [_whole(i, dim) for dim, i in zip(declared, read.index, strict=True)]
    moved = _moved(read, declared) if kind == "band" else None
    if moved is not None:  # this dimension runs along the distances, but starts at another distance
        at, offset = moved
        start = TorchIndexPrinter(plan.graph).doprint(offset + 1 - sym.Q_LEN)
        lines.append(f"    {name} = _shifted({name}, {dims.index('distance')}, {start}, {read.input}.shape[{at}])")
        names[at] = "distance"
    direct = all(name in dims for name in names) and len(set(names)) == len(names)
    lines.append(f"    dims = {dims!r}")
    if not direct:
        lines += _index_tensors(read, dims)
    printer = TorchIndexPrinter(plan.graph)
    index_text = ", ".join(printer.doprint(i) for i in read.index)
    comma = "," if len(read.index) == 1 else ""
    index = "None" if direct else f"lambda: ({index_text}{comma})"
    loops = _loops(plan.graph.input(read.input))
    call = f"_collect({name}, dims, {read.input}, {tuple(names)!r}, ({loops + ',' if loops else ''}), {index})"
    target = f"grad_{read.input}"
    lines.append(f"    {target} = {call}" if first else f"    {target} = {target} + {call}")
    return lines


def _moved(read: Any, declared: tuple[str, ...]) -> tuple[int, Any] | None:
    """The dimension of an input that has an entry per distance, and the index of distance 0; None if there is none."""
    offsets = {
        at: sympy.expand(i - sym.KV_IDX + sym.Q_IDX)
        for at, (dim, i) in enumerate(zip(declared, read.index, strict=True))
        if {sym.Q_IDX, sym.KV_IDX} <= i.free_symbols and dim not in LOOP_DIMS
    }
    if len(offsets) != 1:
        return None
    ((at, offset),) = offsets.items()
    return (at, offset) if offset.free_symbols <= {sym.Q_LEN, sym.KV_LEN} else None


def _whole(index: Any, dim: str) -> str | None:
    """The loop dimension that indexes a whole dimension of an input as it is, else None."""
    if index == sym.COMPONENT:
        return str(index.name)
    if not (index.is_Symbol and index.name in LOOP_DIMS) or (dim in LOOP_DIMS and dim != index.name):
        return None
    return str(index.name)


def _index_tensors(read: Any, dims: tuple[str, ...]) -> list[str]:
    """Lines that define b, h, ... as int64 tensors that broadcast over the values."""
    sizes = {"b": "{0}.shape[0]", "h": "{0}.shape[1]", "q_idx": "q_len", "kv_idx": "kv_len"}
    used = {s.name for i in read.index for s in i.free_symbols}
    lines = []
    rank = len(dims)
    for axis, dim in enumerate(dims):
        shape = ", ".join("-1" if a == axis else "1" for a in range(rank))
        if dim == "distance":
            lines.append("    # the index knows q_idx and kv_idx by their difference alone")
            lines.append(f"    kv_idx = torch.arange(1 - q_len, kv_len, device=q.device).view({shape})")
            lines.append("    q_idx = 0")
        elif dim in used or (dim == "h" and "h_kv" in used):
            size = {"b": "batch", "h": "heads", "d_idx": "q.shape[3]"}.get(dim) or sizes[dim]
            lines.append(f"    {dim} = torch.arange({size}, device=q.device).view({shape})")
    if sym.H_KV.name in used:
        lines.append("    h_kv = h // group")
    if sym.NUM_HEADS.name in used:
        lines.append("    num_heads = heads")
    return lines
