"""`attncc check`: report errors and likely mistakes in a spec, without compiling it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from attncc.cli.options import Json, Mask, Normalizer, Score, Similarity, Spec
from attncc.cli.output import FAILED, out, print_json, report
from attncc.cli.spec import resolve_any
from attncc.errors import SpecError, UnsupportedError
from attncc.ir.graph import VariantGraph
from attncc.ir.hybrid import HybridGraph
from attncc.passes.lint import Finding

_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "dim"}


def command(
    spec: Spec = None,
    similarity: Similarity = None,
    score: Score = None,
    mask: Mask = None,
    normalizer: Normalizer = None,
    strict: Annotated[bool, typer.Option("--strict", help="Treat warnings as errors.")] = False,
    json: Json = False,
) -> None:
    """Check a spec for fully masked rows, overflow, division by zero, indices out of range, and a missing backward.

    The exit code is 1 if there are errors, or, with --strict, warnings.

    Examples
      attncc check my_variant.toml
      attncc check --strict --mask "kv_idx < q_idx"
      attncc check --normalizer "relu(score) / row.sum(relu(score))"
    """
    from attncc.passes.lint import lint

    try:
        graph = resolve_any(spec, similarity, score, mask, normalizer).graph
    except SpecError as error:
        if error.span is None and error.stage is None:
            raise  # there is no spec to check
        report(error)
        raise typer.Exit(FAILED) from None
    parts = [part for _, part in graph.parts] if isinstance(graph, HybridGraph) else [graph]
    findings = [finding for part in parts for finding in (*lint(part), *_undone_gradients(part))]
    if json:
        shown = [{"level": f.level, "stage": f.stage, "reason": f.reason, "remedy": f.remedy} for f in findings]
        print_json({"name": graph.name, "findings": shown})
    else:
        for finding in findings:
            out.console.print(
                Text.assemble((finding.level, _STYLES[finding.level]), ": ", str(finding)), soft_wrap=True
            )
        numbers = {level: sum(f.level == level for f in findings) for level in _STYLES}
        counts = ", ".join(f"{n} {level if n == 1 else level + 's'}" for level, n in numbers.items())
        out.print(f"{graph.name}: {counts}")
    if any(f.level == "error" or (strict and f.level == "warning") for f in findings):
        raise typer.Exit(FAILED)


def _undone_gradients(graph: VariantGraph) -> list[Finding]:
    """A warning if the backward can be derived but no kernel can accumulate one of its gradients."""
    from attncc.codegen.plan import Plan

    if graph.recurrent:
        return []  # a recurrence has all gradients, or is refused as a whole
    plan = Plan(graph)
    try:
        plan.backward  # noqa: B018
    except UnsupportedError:
        return []  # no backward can be derived: lint has reported that
    error = plan.has_backward
    if error is None:
        return []
    return [Finding("warning", f"there is no backward: {error.reason}", error.stage, error.span, error.remedy)]
