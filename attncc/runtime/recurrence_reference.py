"""The reference of a recurrence: its two formulas, token by token, in plain PyTorch. Differentiable."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attncc.ir.graph import LOOP_DIMS, VariantGraph
from attncc.runtime.evaluate import evaluate
from attncc.runtime.linear_cut import sequence_lengths
from attncc.runtime.shapes import Bound


def recurrence(
    graph: VariantGraph,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bound: Bound,
    number: torch.dtype,
    initial: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, N, Dv) in q's dtype, and the last state of each sequence (sequences, Hq, Dqk, Dv) in `number`, which
    is what the state is kept in."""
    sizes = bound.sizes
    batch, heads, length = sizes["b"], sizes["h"], sizes["kv_idx"]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    env: dict[str, Any] = {"scale": bound.scale, "kv_len": length, "num_heads": heads, **bound.scalars}
    for decl in graph.inputs:
        tensor = bound.tensors[decl.name]
        tensor = tensor.to(torch.promote_types(tensor.dtype, number)) if tensor.is_floating_point() else tensor
        sized = {**sizes, "d": sizes["d_qk"]}
        env[decl.name] = tensor.expand([sized[d] if d in (*LOOP_DIMS, "d") else -1 for d in decl.pattern])
    axes = {"b": (batch, 0), "h": (heads, 1), "d_idx": (sizes["d_qk"], 2)}
    for name, (size, axis) in axes.items():
        env[name] = torch.arange(size, device=q.device).reshape([-1 if a == axis else 1 for a in range(4)])
    env["h_kv"] = env["h"] // (heads // sizes["h_kv"])
    update, out = graph["update"].expr, graph["out"].expr
    ends = [0, length] if cu_seqlens is None else sequence_lengths(cu_seqlens, batch, length)
    outs, states = [], []
    for at, (lo, hi) in enumerate(pairwise(ends)):
        state = torch.zeros((batch, heads, sizes["d_qk"], sizes["d_v"]), dtype=number, device=q.device)
        if initial is not None:
            state = initial.to(number) if cu_seqlens is None else initial[at : at + 1].to(number)
        for t in range(lo, hi):
            vectors = {"q_vec": q[:, :, t, :, None], "k_vec": k[:, :, t, :, None], "v_vec": v[:, :, t, None, :]}
            here = {**env, "kv_idx": t, **{name: x.to(number) for name, x in vectors.items()}}
            state = evaluate(update, {**here, "state": state}, number, q.device).expand(state.shape)
            row = evaluate(out, {**here, "state": state}, number, q.device)
            outs.append(row.expand(batch, heads, 1, sizes["d_v"])[:, :, 0].to(q.dtype))
        states.append(state)
    found = torch.stack(outs, 2) if outs else q.new_zeros((batch, heads, 0, sizes["d_v"]))
    return found, torch.cat(states)
