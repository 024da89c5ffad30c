"""`attncc explain`: what is derived from a spec, and how it is scheduled."""

from __future__ import annotations

from typing import Annotated

import typer

from attncc.cli.options import (
    Backend,
    Batch,
    Dtype,
    DtypeName,
    HeadDim,
    HeadDimV,
    Heads,
    Json,
    KvHeads,
    KvLen,
    Mask,
    Normalizer,
    QLen,
    Score,
    Set,
    Similarity,
    Spec,
    Target,
    scalars,
)
from attncc.cli.output import out, print_json
from attncc.cli.spec import resolve


def command(
    spec: Spec = None,
    similarity: Similarity = None,
    score: Score = None,
    mask: Mask = None,
    normalizer: Normalizer = None,
    target: Target = None,
    dtype: Dtype = DtypeName.bf16,
    q_len: QLen = 8192,
    kv_len: KvLen = None,
    batch: Batch = 1,
    heads: Heads = 16,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = 128,
    head_dim_v: HeadDimV = None,
    settings: Set = None,
    backend: Backend = None,
    top: Annotated[int, typer.Option(min=1, help="How many candidates of each kernel are shown.")] = 5,
    json: Json = False,
) -> None:
    """Explain a spec: passes over the keys and the proof, the derived backward, live tiles, candidates, the choice.

    Nothing is compiled or measured; it needs no GPU.

    Examples
      attncc explain alibi --target h100
      attncc explain sliding_window --set window=4096 --q-len 32768 --kv-heads 4
      attncc explain spec.toml --target rtx4090 --dtype fp16 --head-dim 64
      attncc explain causal --target h100 --backend gluon
      attncc explain causal --json
    """
    from attncc.codegen.plan import Plan
    from attncc.runtime.explain import explained_device, facts, sizes_of, text_of
    from attncc.schedule.cache import Cache

    graph = resolve(spec, similarity, score, mask, normalizer).graph
    sizes = sizes_of(q_len, kv_len, batch, heads, kv_heads, head_dim, head_dim_v, graph)
    device = explained_device(target)
    found = facts(
        *(Plan(graph), sizes, dtype.value, device, scalars(graph, settings)),
        cache=Cache(),
        shown=top,
        backend=backend.value if backend is not None else None,
    )
    if json:
        print_json(found)
    else:
        out.print(text_of(found))
