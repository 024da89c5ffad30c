"""The delta rule's plan and its head dimensions to the source of a module: kernels of `passes.recur`'s second form.

Within a chunk the tokens' equations are solved (`prepare`), all chunks side by side; from chunk to chunk goes the
state, and with it are known their right sides, and what each token adds (`carry`). Behind that it is attention in
linear time over those values: pairs within a chunk, and the state that it finds (`forward`). Where programs that go
from chunk to chunk fill the device, `carry` makes that too, and no chunk's state is stored; decayed weights of pairs
it has of `prepare`.

For the backward the forward keeps what tokens add, and T, the inverse of a chunk's equations: Dv + chunk numbers a
token. The states that chunks find are sums over what is added, and `carry` makes them again. Backwards the equations
are passed first, all chunks side by side (`prepare_back`): the gradient of their right sides is T' of what is asked,
by a chunk's own queries and, through the state, by those behind it. So it goes with the gradient of the state from
chunk to chunk (`carry_back`), and then all gradients of a chunk are made at once (`gradients`).

The gradient of a decay's step is that of the pairs which it parts: all pairs of the tokens behind it less those within
them, sums of one tile in float32. Of pairs that were rounded apart the difference would be what is left of rounding.
What it is by the state that goes through a chunk, a product of the state and its gradient over all their entries, is
hardly larger than the noise of either: so with a decay and operands of 16 bits the state is summed of what tokens add,
as it reaches the chunk's end, in two terms (`rest` is the second, Dv numbers more a token), and its gradient likewise.
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
    """head: which of the tensor's heads a program's is; own: contiguous, of ours."""

    head: str = "h"
    own: bool = True


class DeltaSlots:
    """What the templates are filled with, for one plan and its head dimensions."""

    def __init__(self, plan: Delta, d_qk: int, d_v: int):
        self.decays = plan.linear.decay != "none"
        #: has a query a factor of its own?
        self.query_row = plan.linear.row != 1
        self.q, self.k = TokenTile("q", d_qk, own=False), TokenTile("k", d_qk, "h_kv", own=False)
        self.v, self.out = TokenTile("v", d_v, "h_kv", own=False), TokenTile("out", d_v, own=False)
        self.do, self.dq = TokenTile("do", d_v, own=False), TokenTile("dq", d_qk, own=False)
        self.dk, self.dv = TokenTile("dk", d_qk, own=False), TokenTile("dv", d_v, own=False)
        #: what the tokens of a chunk add to the state, and what rounding took of what reaches it
        self.added, self.rest = TokenTile("added", d_v), TokenTile("rest", d_v)
        #: the gradient of the right sides of a chunk's equations, and by what keys it depends on that of the state
        self.dright, self.recalled = TokenTile("dright", d_v), TokenTile("recalled", d_qk)


def render_delta(graph: VariantGraph, plan: Delta, d_qk: int, d_v: int) -> str:
    """The module's source. Sizes and schedules are arguments of its functions."""
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
