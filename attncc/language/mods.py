"""The shipped score modifiers. They compose with `>>`, and apply from left to right."""

from __future__ import annotations

import math
from typing import Any

from attncc.ir.graph import InputDecl, ScalarDecl
from attncc.language import functions as fn
from attncc.language.combinators import ScoreMod
from attncc.language.values import fail


def alibi_slopes(heads: int) -> list[float]:
    """The published slopes 2^(-8 (h+1) / H); the paper's interpolation if H is no power of two (arXiv:2108.12409)."""

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    power = 2 ** math.floor(math.log2(heads))
    return geometric(power) + geometric(2 * power)[0::2][: heads - power]


def default_slopes(sizes: dict[str, int]) -> list[float]:
    """ALiBi's slopes for as many heads as the query has."""
    return alibi_slopes(sizes["h"])


def alibi(slopes: str = "slopes") -> ScoreMod:
    """Subtract slope * distance. `slopes` names an input `[h]`, with the published slopes as its default."""
    decl = InputDecl(slopes, ("h",), "float", grad=True, default=default_slopes)

    def run(e: Any) -> Any:
        return e["score"] + e[slopes][e["h"]] * (e["kv_idx"] - (e["q_idx"] + (e["kv_len"] - e["q_len"])))

    return ScoreMod(run, {slopes: decl}, label="alibi")


def softcap(cap: float | str = 50.0) -> ScoreMod:
    """cap * tanh(score / cap). `cap` is a number, or the name of a scalar bound at call time."""
    if isinstance(cap, int | float) and cap == 0:
        fail(f"softcap({cap}): division by zero", "0 for no cap, as elsewhere, is here no modifier: leave it out")
    if isinstance(cap, str):
        decl = ScalarDecl(cap, 50.0)
        return ScoreMod(lambda e: e[cap] * fn.tanh(e["score"] / e[cap]), scalars={cap: decl}, label=f"softcap({cap})")
    return ScoreMod(lambda e: cap * fn.tanh(e["score"] / cap), label=f"softcap({cap})")


def bias(name: str = "bias") -> ScoreMod:
    """Add a dense bias `[b, h, q_idx, kv_idx]`; a dimension of size 1 is broadcast. It receives a gradient."""
    decl = InputDecl(name, ("b", "h", "q_idx", "kv_idx"), "float", grad=True)
    return ScoreMod(
        lambda e: e["score"] + e[name][e["b"], e["h"], e["q_idx"], e["kv_idx"]], {name: decl}, label=f"bias({name})"
    )


def decay(rates: str = "rates", default: Any = None) -> ScoreMod:
    """Multiply by exp(rate * distance): each head forgets at its own rate.

    `rates` names an input `[h]`, the log of what a token leaves of the state, below 0. It receives a gradient.
    """
    decl = InputDecl(rates, ("h",), "float", grad=True, default=default)

    def run(e: Any) -> Any:
        return e["score"] * fn.exp(e[rates][e["h"]] * (e["q_idx"] + (e["kv_len"] - e["q_len"]) - e["kv_idx"]))

    return ScoreMod(run, {rates: decl}, label=f"decay({rates})")


def gate(name: str = "g") -> ScoreMod:
    """Multiply by exp of the sum of `g` over the tokens behind the key, up to the query: a decay that tokens choose.

    `name` is an input `[b, h, kv_idx]`, the log of what each token leaves of the state, below 0, such as
    logsigmoid(...). It receives a gradient.
    """
    decl = InputDecl(name, ("b", "h", "kv_idx"), "float", grad=True)

    def run(e: Any) -> Any:
        g, b, h = e[name], e["b"], e["h"]
        position = e["q_idx"] + (e["kv_len"] - e["q_len"])
        return e["score"] * fn.exp(fn.cumsum(g[b, h, position]) - fn.cumsum(g[b, h, e["kv_idx"]]))

    return ScoreMod(run, {name: decl}, label=f"gate({name})")


#: by the name they have in the text form
TABLE: dict[str, Any] = {"alibi": alibi, "softcap": softcap, "bias": bias, "decay": decay, "gate": gate}
