"""The delta rule's plan and its head dimensions to the source of a module: kernels of `passes.recur`'s second form.

Within a chunk the tokens' equations are solved (`prepare`), all chunks side by side; from chunk to chunk goes the
state, and with it is known what each token adds (`carry`). Behind that it is attention in linear time over those
values: pairs within a chunk, and the state that it finds (`forward`). Backwards the same: what queries ask of the
values of their own chunk (`dadded`), the gradient of the state from chunk to chunk (`carry_back`), the gradients of q
and k that linear attention has (`dq`, `dk`), and what passes through the equations of a chunk (`solve_back`).

The gradient of a decay's step is summed by where a pair lies, before and behind it: a difference of sums over all
tokens would be what is left of rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from attncc.codegen.chunk_module import Tile, header
from attncc.codegen.render import environment, tidy
from attncc.ir.graph import VariantGraph
from attncc.passes.recur import Delta


@dataclass(frozen=True)
class TokenTile(Tile):
    """head: which of the tensor's heads a program's is; own: contiguous, of ours."""

    head: str = "h"
    own: bool = True


@dataclass(frozen=True)
class Scan:
    """sum over the tokens j of the chunk that i sees of (a_i . b_j) s_ij c_j, plus s_i a_i state, with s the decay.

    reverse: i sees what is behind it; asks: whose factor the query's is, that of a_i, of b_j, or the last; state: is
    there one; own: whose gradient it is, in which the columns of the state are features.
    """

    name: str
    doc: str
    a: TokenTile
    b: TokenTile
    c: TokenTile
    out: TokenTile
    asks: Literal["row", "column", "last"]
    reverse: bool = False
    state: bool = True
    own: TokenTile | None = None
    product: bool = False


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
        #: what the tokens of a chunk erase and write, solved; what they add to the state, with its gradient
        self.erased, self.written = TokenTile("erased", d_qk), TokenTile("written", d_v)
        self.added, self.dadded = TokenTile("added", d_v), TokenTile("dadded", d_v)
        #: what is left of keys where the chunk ends, what queries ask of the state where it begins: with one factor for
        #: all of them that is themselves, and their rounding is spared
        self.left = TokenTile("left", d_qk)
        self.asked = TokenTile("asked", d_qk) if self.decays or self.query_row else self.q
        self.dk_sum = TokenTile("dk_sum", d_qk)

    @property
    def scans(self) -> dict[str, Scan]:
        """The uses of the scan."""
        q, k, do, added = self.q, self.k, self.do, self.added
        found = (
            Scan("forward", "out, by chunks of tokens and the state that each finds.", q, k, added, self.out, "row"),
            Scan(
                "dadded",
                "What the queries of a chunk ask of what its tokens add.",
                *(k, q, do, self.dadded),
                asks="column",
                reverse=True,
                state=False,
            ),
            Scan(
                "dq",
                "The gradient of q: the forward's sum over k, with dout.added as the weights.",
                *(do, added, k, self.dq),
                asks="last",
                own=q,
                product=self.query_row,
            ),
            Scan(
                "dk",
                "The gradient of k as far as its token adds to the state: a sum over the queries behind it.",
                *(added, do, q, self.dk_sum),
                asks="column",
                reverse=True,
                own=k,
            ),
        )
        return {scan.name: scan for scan in found}


def render_delta(graph: VariantGraph, plan: Delta, d_qk: int, d_v: int) -> str:
    """The module's source. Sizes and schedules are arguments of its functions."""
    slots = DeltaSlots(plan, d_qk, d_v)
    env = environment()
    tiles = {tile.name: tile for tile in (slots.q, slots.k, slots.v, slots.do)}
    context: dict[str, Any] = {"slots": slots, "scans": slots.scans, "tma": False, **tiles}

    def text(template: str, **more: Any) -> str:
        return str(env.get_template(template).render({**context, **more}))

    scans = [text("delta_scan.py.j2", s=scan) for scan in slots.scans.values()]
    parts = [
        header(graph, "The recurrence", "form by chunks", plan.proof, d_qk, d_v),
        text("helpers.py.j2", helpers={"_expm1"} if slots.decays else set()),
        *(text(f"delta_{name}.py.j2") for name in ("prepare", "carry")),
        *scans,
        *(text(f"delta_{name}.py.j2") for name in ("carry_back", "solve_back", "step", "host")),
    ]
    return tidy("\n\n\n".join(p.strip("\n") for p in parts) + "\n")
