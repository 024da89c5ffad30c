"""A graph back to the formulas that a user writes: four stages, with the row reductions inside the normalizer."""

from __future__ import annotations

from typing import Any

import sympy

from attncc.ir import symbols as sym
from attncc.ir.graph import VariantGraph
from attncc.ir.text import formula

#: what a variant has where it says nothing
DEFAULTS = {
    "score": "score",
    "mask": "True",
    "normalizer": "exp(-row.max(score) + score)/row.sum(exp(-row.max(score) + score))",
    "reduction": "row.sum(v_vec*weight)",
}


def stage_texts(graph: VariantGraph) -> dict[str, str]:
    """score, mask, normalizer and reduction in the words of the text form; each can be pasted into a spec."""
    rows: dict[Any, Any] = {}
    for stage in graph.rows:
        # a reduction prints as a name, so that whatever it stands in keeps its form
        text = f"row.{stage.op}({formula(stage.expr.xreplace(rows))})"
        rows[sym.row_symbol(*_numbered(stage.name))] = sympy.Symbol(text, real=True)
    return {
        "score": formula(graph["score"].expr.xreplace({sym.RAW_SCORE: sym.SCORE})),
        "mask": formula(graph["mask"].expr),
        "normalizer": formula(graph["weight"].expr.xreplace(rows)),
        "reduction": f"row.sum({formula(graph['out'].expr.xreplace(rows))})",
    }


def own_stages(graph: VariantGraph) -> dict[str, str]:
    """The stages in which a variant differs from plain attention; "softmax" where there are none."""
    own = {stage: text for stage, text in stage_texts(graph).items() if text != DEFAULTS[stage]}
    return own or {"normalizer": "softmax"}


def _numbered(name: str) -> tuple[str, int]:
    """`row_max_0` as ("max", 0)."""
    _, op, number = name.split("_")
    return op, int(number)
