"""`attncc show`: print a spec's formulas or its IR, and draw its mask."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attncc.cli.options import KvLen, Mask, Normalizer, Score, Set, Similarity, Spec, scalars
from attncc.cli.output import err, out
from attncc.cli.spec import resolve_any
from attncc.errors import InputError
from attncc.ir.graph import VariantGraph
from attncc.ir.hybrid import HybridGraph


def command(
    spec: Spec = None,
    similarity: Similarity = None,
    score: Score = None,
    mask: Mask = None,
    normalizer: Normalizer = None,
    ir: Annotated[
        bool, typer.Option("--ir", help="Print the typed stage graph (IR) instead, for a bug report.")
    ] = False,
    q_len: Annotated[int, typer.Option(min=1, help="Number of queries to draw.")] = 48,
    kv_len: KvLen = None,
    head: Annotated[int, typer.Option(min=0, help="Head to draw.")] = 0,
    heads: Annotated[int, typer.Option(min=1, help="Number of heads.")] = 8,
    settings: Set = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw mask and weights into a PNG file.")] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw mask and weights into an SVG file.")] = None,
) -> None:
    """Show a spec: its formulas, its inputs, and its mask (rows are queries, columns are keys).

    Examples
      attncc show gemma2_local
      attncc show sliding_window --q-len 4096 --set window=512
      attncc show --mask "causal & sliding_window(8) | prefix(3)"
      attncc show my_specs.py:alibi --ir
      attncc show document --svg document.svg
    """
    from attncc import variants
    from attncc.ir.text import to_text

    graph = resolve_any(spec, similarity, score, mask, normalizer).graph
    if isinstance(graph, HybridGraph):
        if png is not None or svg is not None:
            raise InputError(f"'{graph.name}' is a hybrid, whose parts have masks of their own", remedy="draw a part")
        _hybrid(graph, ir, q_len, q_len if kv_len is None else kv_len, head, heads, settings)
        return
    shipped = spec in (*variants.names(), *variants.recurrences())
    if ir:
        out.print(to_text(graph))
        return
    formulas(graph, variants.about(spec)[0] if spec and shipped else "")
    if graph.recurrent:
        if png is not None or svg is not None:
            raise InputError(f"'{graph.name}' is a recurrence: there is no mask to draw")
        return
    given = _given(graph, settings)
    drawing(graph, q_len, q_len if kv_len is None else kv_len, head, heads, given)
    for path in (png, svg):
        if path is not None:
            from attncc.cli.draw import figure

            suffix = ".png" if path is png else ".svg"
            named = path if path.suffix == suffix else path.with_name(path.name + suffix)
            figure(graph, q_len, q_len if kv_len is None else kv_len, head, heads, given, named)
            err.print(f"wrote {named}")


def _given(graph: VariantGraph | HybridGraph, settings: list[str] | None) -> dict[str, int | float]:
    """The scalars that the command line sets."""
    return {name: value for name, value in scalars(graph, settings).items() if _is_set(name, settings)}


def _hybrid(
    graph: HybridGraph, ir: bool, q_len: int, kv_len: int, head: int, heads: int, settings: list[str] | None
) -> None:
    """How the parts combine, then each part."""
    from attncc.ir.text import formula

    if ir:
        out.print(graph.text())
        return
    given = _given(graph, settings)
    out.print(graph.name, style="bold")
    if graph.cites:
        out.print(f"  {graph.cites}", style="dim")
    out.print(f"  combine    = {formula(graph.expr)}")
    declarations(graph.combine)
    for name, part in graph.parts:
        out.print()
        formulas(part.changed(name=name))
        if not part.recurrent:
            own = {s.name for s in part.scalars}
            drawing(part, q_len, kv_len, head, heads, {key: x for key, x in given.items() if key in own})


def _is_set(name: str, settings: list[str] | None) -> bool:
    return any(setting.startswith(f"{name}=") for setting in settings or ())


def formulas(graph: VariantGraph, about: str = "") -> None:
    """Print name, description, citation, stages and declarations of a variant."""
    from attncc.ir.formulas import stage_texts
    from attncc.ir.text import output_text

    out.print(graph.name, style="bold")
    if about:
        out.print(f"  {about}")
    if graph.cites:
        out.print(f"  {graph.cites}", style="dim")
    for stage, text in stage_texts(graph).items():
        out.print(f"  {stage:<10} = {text}")
    for o in graph.outputs:
        out.print(f"  output       {o.name} = {output_text(o)}")
    declarations(graph)


def declarations(graph: VariantGraph) -> None:
    """Inputs and scalars."""
    for d in graph.inputs:
        notes = [d.dtype, *(["gradient"] if d.grad else []), *(["has a default"] if d.default else [])]
        out.print(f"  input        {d.name}[{', '.join(d.pattern)}]  ({', '.join(notes)})")
    for s in graph.scalars:
        out.print(f"  scalar       {s.name} = {s.default}")


def drawing(graph: VariantGraph, q_len: int, kv_len: int, head: int, heads: int, given: dict[str, int | float]) -> None:
    """Print the mask, and the values it was drawn with."""
    from attncc.cli.draw import picture

    drawn = picture(graph, q_len, kv_len, head, heads, given)
    out.print()
    for line in drawn.lines():
        out.print(f"  {line}")
    notes = [f"{q_len} queries x {kv_len} keys, {drawn.visible / drawn.total:.1%} visible"]
    if drawn.step > 1:
        notes.append(f"a dot is {drawn.step} x {drawn.step} pairs, of which any is visible")
    used = graph["mask"].expr.free_symbols
    names = {s.name for s in used}
    defaults = {s.name: s.default for s in graph.scalars}
    for name, value in drawn.scalars.items():
        if name in names:
            own = "" if name in given or value == defaults[name] else f", not {defaults[name]}, to be seen at this size"
            notes.append(f"{name} = {value}{own}")
    sampled = [d.name for d in graph.inputs if d.name in {str(r.args[0]) for r in graph.reads} and d.name in names]
    notes += [f"{', '.join(sampled)}: sample values"] if sampled else []
    out.print(f"  {'; '.join(notes)}", style="dim")
