"""Generated statements as text: which names they read and set, and their translation from Triton to Gluon."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable


def in_gluon(text: str) -> str:
    """Triton statements translated to Gluon: `tl` becomes `gl`, and helpers are called by the names of their Gluon
    copies.

    No layouts are needed: they follow from those of q_idx and kv_idx."""
    text = re.sub(r"\btl\.", "gl.", text).replace("@triton.jit", "@gluon.jit")
    return re.sub(r"(?<![\w.])_(\w+)\(", r"_gl_\1(", text)


def free_names(statements: Iterable[str]) -> tuple[str, ...]:
    """The names, except functions, that the statements read before they set them, in the order of first use."""
    reader = _Reader()
    reader.visit(ast.parse("\n".join(statements)))
    return tuple(reader.free)


def set_names(statements: Iterable[str]) -> frozenset[str]:
    """The names that the statements set."""
    names = ast.walk(ast.parse("\n".join(statements)))
    return frozenset(n.id for n in names if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


class _Reader(ast.NodeVisitor):
    """Walks statements in the order in which they run."""

    def __init__(self) -> None:
        self.free: dict[str, None] = {}
        self.known: set[str] = {"tl", "gl"}

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.known.add(node.id)
        elif node.id not in self.known:
            self.free.setdefault(node.id)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self.visit(target)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.visit(node.value)
        self.visit(ast.Name(node.target.id, ast.Load()) if isinstance(node.target, ast.Name) else node.target)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self.visit(node.target)
        for statement in node.body:
            self.visit(statement)

    def visit_Call(self, node: ast.Call) -> None:
        if not isinstance(node.func, ast.Name):
            self.visit(node.func)
        for argument in (*node.args, *(k.value for k in node.keywords)):
            self.visit(argument)
