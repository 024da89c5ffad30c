"""From a plan and head dimensions to the source of a module: kernels, and the host code that launches them."""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Iterable
from typing import Any, get_args

from attncc.codegen.assembly import Shape, assemble
from attncc.codegen.chunks import Chunk
from attncc.codegen.indices import input_arguments
from attncc.codegen.names import coded
from attncc.codegen.plan import Plan
from attncc.codegen.statements import in_gluon
from attncc.ir.graph import VariantGraph
from attncc.ir.levels import Level, level_of_name
from attncc.ir.text import to_text
from attncc.ir.vocabulary import LOG2E
from attncc.resources import path
from attncc.schedule.problem import Backend, Form
from attncc.version import __version__


@functools.cache
def environment() -> Any:
    """The templates of both backends, a jinja2.Environment."""
    from attncc.codegen.templates import environment_of  # a process that finds its sources in the cache needs no Jinja

    return environment_of([path("templates") / backend for backend in get_args(Backend)])


def render(
    plan: Plan,
    d_qk: int,
    d_v: int,
    backward: bool,
    tma: bool = False,
    forward_in: Form = "triton",
    d_k: int | None = None,
    values: int = 1,
    backward_in: Backend = "triton",
    strips: int = 0,
    deals: bool = False,
    about: str = "",
) -> str:
    """The module's source. Everything that depends on tensors' sizes or the schedule is an argument of its functions.

    - d_qk, d_k, d_v: the last dimensions of q, k and v; d_k differs from d_qk if branches of q share one k;
    - tma: the backward loads tiles through descriptors, for GPUs with a tensor memory accelerator;
    - forward_in: the language of the forward kernel, or "decode" or "gluon_decode" for one that splits the keys;
    - backward_in: the language of the kernel of dK and dV, which in Gluon can also sum dQ. It weighs a tile in `strips`
      (0: all at once), and if it `deals`, it is persistent: a program computes one block of keys after another;
    - values: heads of v for each head of k;
    - about: a sentence for the top of the file.
    """
    users = plan
    plan, called = coded(plan)
    hopper, hopper_backward = "gluon" in forward_in, backward and backward_in == "gluon"
    tma = tma and backward and not plan.similarity.loops  # a loop over components loads single columns, by pointers
    shape = Shape.of(plan, d_qk, d_qk if d_k is None else d_k, d_v, values)
    module = assemble(plan, shape, forward_in, backward, hopper_backward, tma, strips, deals)
    context = {
        **_context(plan, shape, backward),
        "hopper": hopper,
        "hopper_backward": hopper_backward,
        "tma": tma,
        "renamed": {user: own for own, user in called.items() if own != user},
    }
    parts = [render_template("helpers.py.j2", context, helpers=module.helpers)]
    imports = _imports(tma, "_others_may_start" in module.helpers)
    if hopper or hopper_backward:
        imports += "\n" + render_template("gluon_compat.py.j2", context)  # its first lines are imports
        parts.append(render_template("gluon_helpers.py.j2", context))
        parts.append(in_gluon(render_template("helpers.py.j2", context, helpers=module.in_warps)))
    parts += [render_template(template, context, **slots) for template, slots in module.kernels]
    parts.append(render_template("host.py.j2", context, bounds=module.bounds, **module.host))
    code = "\n\n\n".join(p.strip("\n") for p in (imports, *parts))
    return tidy(f"{_header(users, d_qk, d_v, about, base_2=repr(LOG2E) in code)}\n\n{code}\n")


def _context(plan: Plan, shape: Shape, backward: bool) -> dict[str, Any]:
    """The variables of every template: sizes, names of results, and the inputs as parameters and arguments."""
    graph, values = plan.graph, shape.values
    names = "".join(f"{name}, " for name in (*(d.name for d in graph.inputs), *(s.name for s in graph.scalars)))
    return {
        "graph": plan.core,
        "d_qk": shape.d_qk,
        "d_k": shape.d_k,
        "d_v": shape.d_v,
        "qk_chunks": shape.qk_chunks,
        "k_chunks": tuple(c for c in shape.qk_chunks if c.key == c.index),
        "v_chunks": shape.v_chunks,
        "values": values,
        "value_of_key": graph.value is not None,
        "v_head": "h_kv" if values == 1 else f"(h_kv * {values})",
        "out_head": "h" if values == 1 else f"(h * {values})",
        "v_heads": "Hkv" if values == 1 else f"{values} * Hkv",
        "out_heads": "H" if values == 1 else f"{values} * H",
        "stored": plan.stored,
        "results": plan.results if backward else tuple(name for name, _ in plan.stored),
        "shares": plan.shares if backward else (),
        "deltas": tuple(part.own("delta") for part in plan.parts) if backward and plan.needs_delta else (),
        "backward": backward,
        "staging": staging(plan),
        "widths_qk": widths(shape.qk_chunks),
        "widths_v": widths(shape.v_chunks),
        "scalar_names": "".join(f', "{s.name}"' for s in graph.scalars),
        "call_params": names,
        "call_args": names,
        "input_args": input_arguments(plan.core),
        "wide": any_wide(plan.core),
        "user_args": input_arguments(graph),
        "user_wide": any_wide(graph),
        "takes_inputs": bool(plan.core.inputs),
    }


def any_wide(graph: VariantGraph) -> str:
    """Host code of the condition that any input is too large for 32-bit offsets."""
    return f"_is_wide({', '.join(d.name for d in graph.inputs)})" if graph.inputs else "False"


def staging(plan: Plan) -> str:
    """The num_stages argument of the loops over tiles; "" if the launch decides.

    A load whose index depends on the score must wait for a matmul. Triton's pipeliner would try to prefetch it like the
    tiles, and fails on Hopper, where it cannot predicate the matmul before it.
    """
    places = (symbol.name for read in plan.core.reads for place in read.index for symbol in place.free_symbols)
    return ", num_stages=1" if any(level_of_name(name) == Level.PAIR for name in places) else ""


def render_template(template: str, context: dict[str, Any], **slots: Any) -> str:
    """A template's text; `slots` are variables besides the module's context."""
    return environment().get_template(template).render({**context, **slots})


def widths(pieces: Iterable[Chunk]) -> str:
    """The widths of chunks, each once: a descriptor serves all chunks of one width."""
    return repr(tuple(dict.fromkeys(c.width for c in pieces)))


def _header(plan: Plan, d_qk: int, d_v: int, about: str, base_2: bool) -> str:
    """The module's docstring: the formula, and the online form derived from it."""
    body = textwrap.indent(to_text(plan.graph), "    ")
    proof = "\n\n".join("\n".join(f"    {line}" for line in part.online.proof) for part in plan.parts)
    quotes = '"""'
    paragraphs = [
        f"{quotes}Attention kernels for '{plan.graph.name}', head dimensions {d_qk} and {d_v}. "
        f"Generated by attncc {__version__}.",
        *([about] if about else []),
        body,
        "The online form, as derived:",
        proof,
    ]
    if base_2:
        paragraphs.append(f"Exponentials are of base 2: {LOG2E} is log2(e), {1 / LOG2E} is log(2).")
    return "\n\n".join(paragraphs) + f"\n{quotes}"


def _imports(tma: bool, overlaps: bool) -> str:
    return (
        "import torch\nimport triton\nimport triton.language as tl"
        + ("\nfrom triton.language.extra.cuda import gdc_launch_dependents, gdc_wait" if overlaps else "")
        + ("\nfrom triton.tools.tensor_descriptor import TensorDescriptor" if tma else "")
    )


def tidy(source: str) -> str:
    """No trailing blanks, and a blank line in a function only before a comment that opens a step."""
    lines = [line.rstrip() for line in source.split("\n")]
    kept: list[str] = []
    in_docstring = True
    for i, line in enumerate(lines):
        if not line and not in_docstring:
            following = next((x for x in lines[i + 1 :] if x), "")
            opens_step = following.startswith(("    #", "    meta =", "    keep_b"))
            if (following.startswith(" ") and not opens_step) or (opens_step and not kept[-1]):
                continue
        if in_docstring and line == "import torch":
            in_docstring = False
        kept.append(line)
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(kept))
