"""The suites by name: each a module with a docstring and a function `suite(run)`."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

from bench.run import Suite

NAMES = (
    "dense",
    "sigmoid",
    "shapes",
    "variants",
    "shelf",
    "decode",
    "compile",
    "host",
    "memory",
    "outputs",
    "determinism",
    "linear",
    "sweep",
    "regret",
    "hopper",
)


def load(name: str) -> Suite:
    """The suite called `name`."""
    suite: Suite = import_module(f"bench.suites.{name}").suite
    return suite


def summary(name: str) -> str:
    """The first line of a suite's docstring."""
    source = (Path(__file__).parent / f"{name}.py").read_text()  # not imported: listing suites needs no torch
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
