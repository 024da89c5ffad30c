"""Names of a user's inputs and scalars in generated code, chosen so that they do not clash with the code's own."""

from __future__ import annotations

import functools
import keyword
import re
from dataclasses import replace

from attncc.codegen.plan import Plan
from attncc.ir import symbols as sym
from attncc.ir.graph import Stage, VariantGraph
from attncc.resources import path

_INPUT, _SCALAR = "in_", "num_"
#: names in lines that code generation emits into slots of the templates
_EMITTED = frozenset(
    re.findall(
        r"\w+",
        """
        alpha at_distance by_distance chunk cotangents_kernel cut ddot dk_d dk_dot dp dpair dq_d dq_dot ds exact_delta
        first_full first_live full_begin full_count full_end head_tiles k_d k_desc k_dot k_rows known last_full
        last_live live_begin live_end may mixed must out_desc out_dot_tile own_max own_min p pair q_d q_desc q_dot
        q_rows row_offset share share_X_desc shown swap term tile_hi tile_id tile_lo tile_max tile_min unbroken v_desc
        weight_sum weight_sum_tile
        """,
    )
)


def taken(name: str) -> bool:
    """Whether generated code uses this name for something of its own."""
    numbered = re.sub(r"\d+", "X", name)
    base = numbered.removesuffix("_X")  # a number tells the values of several branches apart
    return bool({name, numbered, base, f"{name.upper()}_PTR"} & _own_names()) or base in _EMITTED


def coded(plan: Plan) -> tuple[Plan, dict[str, str]]:
    """The plan with names of inputs and scalars that do not clash in generated code, and the user's name of each.

    Nearly always this is the plan itself. If one name clashes, all get a prefix, so that their order stays.
    """
    graph = plan.graph
    new = written(graph)
    if all(before == after for before, after in new.items()):
        return plan, new
    symbols = {}
    for d in graph.inputs:
        is_int = d.dtype == "int"
        symbols[sym.input_symbol(d.name, is_int)] = sym.input_symbol(new[d.name], is_int)
    for s in graph.scalars:
        symbols[sym.scalar_symbol(s.name, s.is_int)] = sym.scalar_symbol(new[s.name], s.is_int)
    stages = [Stage(s.name, s.expr.xreplace(symbols), s.op, s.span) for s in graph.stages]
    inputs = [replace(d, name=new[d.name]) for d in graph.inputs]
    scalars = [replace(s, name=new[s.name]) for s in graph.scalars]
    outputs = [o.xreplace(symbols) for o in graph.outputs]
    extra = plan.extra.xreplace(symbols) if plan.extra is not None else None
    changed = graph.changed(stages=stages, inputs=inputs, scalars=scalars, outputs=outputs)
    return Plan(changed, extra=extra), {after: before for before, after in new.items()}


def written(graph: VariantGraph) -> dict[str, str]:
    """The name of each input and scalar in generated code, by the user's name. Names of inputs differ also without
    regard to case, because kernels have their pointers as parameters in upper case."""
    inputs, scalars = [d.name for d in graph.inputs], [s.name for s in graph.scalars]
    by_case = len({name.upper() for name in inputs}) < len(inputs)
    if not by_case and not any(taken(name) for name in (*inputs, *scalars)):
        return {name: name for name in (*inputs, *scalars)}
    new = {name: f"{_INPUT}{i}_{name}" if by_case else _INPUT + name for i, name in enumerate(inputs)}
    return new | {name: _SCALAR + name for name in scalars}


@functools.cache
def _own_names() -> frozenset[str]:
    """Every identifier of the templates in which inputs occur by name; X stands for the text of a slot."""
    found: set[str] = set()
    for template in path("templates").rglob("*.j2"):
        if re.match("linear_|delta_|square", template.name):  # these have no parameters named after inputs
            continue
        text = re.sub(r"\{#.*?#\}|\{%.*?%\}|\"\"\".*?\"\"\"", "", template.read_text(encoding="utf-8"), flags=re.S)
        text = re.sub(r"\{\{.*?\}\}", "X", text)
        text = re.sub(r"\"[^\"\n]*\"|#.*", "", text)
        found |= set(re.findall(r"[A-Za-z_]\w*", text))
    return frozenset(found - set(keyword.kwlist))
