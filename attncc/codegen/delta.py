"""The delta rule: from a plan (the second form of `passes.recur`) and head dimensions to the source of a module.

Notation, per chunk of tokens: D is the running log decay, T = (I + A)^-1 solves the triangular system of the chunk, and
`added` are the values that its tokens add to the state.

Forward: `prepare` solves the systems of all chunks in parallel. `carry` goes from chunk to chunk with the state, from
which the right-hand sides and `added` follow. The rest is linear attention with the values `added`: `forward` computes
the pairs within a chunk and the read of the state at its start. If programs that go from chunk to chunk fill the
device, `carry` computes that as well, with decayed pair weights from `prepare`, and no chunk's state is stored.

Saved for the backward: `added` and T, that is Dv + chunk numbers per token. `carry` recomputes the states from `added`.

Backward: `prepare_back` passes the equations of all chunks in parallel: the gradient of the right-hand sides is T'
times that of `added`, which comes from the chunk's own queries and, through the state, from later ones. `carry_back`
goes from the last chunk to the first with the gradient of the state. `gradients` then computes all gradients of each
chunk.

Precision: the gradient of a decay step is a sum over the pairs that it separates: all pairs of later tokens minus those
among them, computed as sums of one float32 tile, because the difference of sums that were rounded separately would be
mostly rounding error. Its part through the state is a product of the state and its gradient over all entries, hardly
larger than their rounding errors. So with a decay and 16-bit operands, the state and its gradient are summed from two
terms (`rest` is the second, Dv more numbers per token).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attncc.codegen.chunk_module import Tile, header
from attncc.codegen.render import environment, tidy
from attncc.ir.graph import VariantGraph
from attncc.passes.recur import Delta


@dataclass(frozen=True)
class TokenTile(Tile):
    """head: the name of the index of the tensor's head; own: whether the tensor is one of ours, and contiguous."""

    head: str = "h"
    own: bool = True


class DeltaSlots:
    """The slots of the delta rule's templates, for one plan and its head dimensions."""

    def __init__(self, plan: Delta, d_qk: int, d_v: int):
        self.decays = plan.linear.decay != "none"
        #: whether the output has a factor per query
        self.query_row = plan.linear.row != 1
        self.q, self.k = TokenTile("q", d_qk, own=False), TokenTile("k", d_qk, "h_kv", own=False)
        self.v, self.out = TokenTile("v", d_v, "h_kv", own=False), TokenTile("out", d_v, own=False)
        self.do, self.dq = TokenTile("do", d_v, own=False), TokenTile("dq", d_qk, own=False)
        self.dk, self.dv = TokenTile("dk", d_qk, own=False), TokenTile("dv", d_v, own=False)
        #: the values that the tokens of a chunk add to the state, and their rounding errors
        self.added, self.rest = TokenTile("added", d_v), TokenTile("rest", d_v)
        #: the gradient of the right-hand sides of a chunk's system, and the keys by which it depends on the state's
        #: gradient
        self.dright, self.recalled = TokenTile("dright", d_v), TokenTile("recalled", d_qk)


def render_delta(graph: VariantGraph, plan: Delta, d_qk: int, d_v: int) -> str:
    """The module's source. Sizes and schedules are arguments of the module's functions."""
    slots = DeltaSlots(plan, d_qk, d_v)
    env = environment()
    tiles = {tile.name: tile for tile in (slots.q, slots.k, slots.v, slots.do)}
    context: dict[str, Any] = {"slots": slots, "tma": False, **tiles}

    def text(template: str, **more: Any) -> str:
        return str(env.get_template(template).render({**context, **more}))

    kernels = ("prepare", "carry", "forward", "prepare_back", "carry_back", "gradients", "step")
    parts = [
        header(graph, "The recurrence", "form by chunks", plan.proof, d_qk, d_v),
        text("helpers.py.j2", helpers={"_expm1", "_bounded"} if slots.decays else set()),
        *(text(f"delta_{name}.py.j2") for name in (*kernels, "host")),
    ]
    return tidy("\n\n\n".join(p.strip("\n") for p in parts) + "\n")
