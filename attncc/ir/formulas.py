"""From a graph back to the formulas that a user writes: five stages, with sums and row reductions inlined."""

from __future__ import annotations

from typing import Any

import sympy

from attncc.ir import symbols as sym
from attncc.ir.graph import VariantGraph
from attncc.ir.text import formula

#: the formula of a stage that a variant does not give
DEFAULTS = {
    "similarity": "dot(q_vec, k_vec)*scale",
    "score": "score",
    "mask": "True",
    "normalizer": "exp(score - row.max(score))/row.sum(exp(score - row.max(score)))",
    "reduction": "row.sum(v_vec*weight)",
}


def stage_texts(graph: VariantGraph) -> dict[str, str]:
    """similarity, score, mask, normalizer and reduction in the text form; each can be pasted into a spec. A stage that
    differs between branches has an entry per branch, such as `score[1]`. There is an entry "value" if v is part of k,
    and "dead_rows" if fully masked rows do not give 0. A recurrence has the entries state and out."""
    if graph.recurrent:
        return {"state": formula(graph["update"].expr), "out": formula(graph["out"].expr)}
    if graph.branches > 1:
        return _branch_texts(graph)
    rows: dict[Any, Any] = {}
    sums: dict[Any, Any] = {sym.QK: sympy.Symbol("dot(q_vec, k_vec)", real=True)}
    for stage in graph.sums_d:
        sums[sympy.Symbol(stage.name, real=True)] = sympy.Symbol(f"sum_d({formula(stage.expr)})", real=True)
    for stage in (*graph.cols, *graph.rows):
        # a reduction prints as a name, so that whatever it stands in keeps its form
        body = formula(stage.expr.xreplace(rows))
        domain, op, _ = stage.name.split("_")
        text = body if op == "root" else f"{domain}.{op}({body})"
        rows[sympy.Symbol(stage.name, real=True)] = sympy.Symbol(text, real=True)
    return {
        "similarity": formula(graph["raw_score"].expr.xreplace(sums)),
        "score": formula(graph["score"].expr.xreplace({sym.RAW_SCORE: sym.SCORE})),
        "mask": formula(graph["mask"].expr),
        "normalizer": formula(graph["weight"].expr.xreplace(rows)),
        "reduction": f"row.sum({formula(graph['out'].expr.xreplace(rows))})",
        **({} if graph.value is None else {"value": f"k[:{graph.value}]"}),
        **({} if graph.dead_rows == "zero" else {"dead_rows": graph.dead_rows}),
    }


def _branch_texts(graph: VariantGraph) -> dict[str, str]:
    branches = [stage_texts(part) for part in graph.parts]
    found: dict[str, str] = {}
    for stage in ("similarity", "score", "mask", "normalizer"):
        texts = [texts[stage] for texts in branches]
        found |= {stage: texts[0]} if len(set(texts)) == 1 else {f"{stage}[{i}]": t for i, t in enumerate(texts)}
    return {**found, "reduction": f"row.sum({formula(graph['out'].expr)})"}


def own_stages(graph: VariantGraph) -> dict[str, str]:
    """The stages in which a variant differs from plain attention; the normalizer "softmax" if there are none."""
    own = {stage: text for stage, text in stage_texts(graph).items() if text != DEFAULTS.get(stage.split("[")[0])}
    return own or {"normalizer": "softmax"}
