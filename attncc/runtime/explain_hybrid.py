"""What `attncc explain` says of a hybrid, beside what it says of each part: the combination, and what goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attncc.errors import UnsupportedError
from attncc.ir.graph import VariantGraph
from attncc.ir.hybrid import HybridGraph
from attncc.ir.text import formula
from attncc.passes.continuation import continuation
from attncc.passes.linearize import linearize
from attncc.runtime.explain_linear import state_of


def hybrid_facts(graph: HybridGraph, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The combination and what each part keeps of the tokens so far, as plain JSON values."""
    return {
        "name": graph.name,
        "digest": graph.digest,
        "combine": formula(graph.expr),
        "state": {name: kept(part, sizes) for name, part in graph.parts},
    }


def kept(graph: VariantGraph, sizes: Mapping[str, int]) -> str:
    """What a part keeps of the tokens so far, or why it cannot go on from them."""
    rows, columns = sizes["d_qk"], sizes["d_v"]
    if not graph.recurrent:
        try:
            plan = linearize(graph)
        except UnsupportedError:
            return _of_pairs(graph)
        if not plan.causal:
            return _of_pairs(graph)
        rows, columns = state_of(plan, sizes)
    return f"a state of {rows} x {columns} float32 a head"


def _of_pairs(graph: VariantGraph) -> str:
    try:
        found = continuation(graph)
    except UnsupportedError as error:
        return f"nothing: {error.reason}"
    held = ", ".join(["k and v", *found.by_key])
    return f"{held} of all tokens" if found.reach is None else f"{held} of the last {formula(found.reach)} tokens"


def hybrid_text(found: Mapping[str, Any]) -> str:
    """The facts as text."""
    title = f"{found['name']}, a hybrid of {' and '.join(found['state'])}"
    state = [f"  {name}: {what}" for name, what in found["state"].items()]
    sections = [title, f"formula\n  out = {found['combine']}", "\n".join(["kept from call to call", *state])]
    return "\n\n".join(sections)
