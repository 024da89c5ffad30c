"""Problems for the tests of this room: a plain softmax variant at a given size."""

from __future__ import annotations

from math import ceil

from attncc.passes.work import LiveTiles, PairCosts
from attncc.schedule.problem import KernelCosts, Problem

# What codegen counts for plain softmax and a causal mask.
FORWARD = PairCosts(fma=6, sfu=1)
BACKWARD = PairCosts(fma=7, sfu=1)
MASK = PairCosts(fma=1, int=2)


def full_live(q_len: int, kv_len: int):
    """Every tile is visited, none needs the mask."""

    def live(block_m: int, block_n: int) -> LiveTiles:
        tiles = ceil(q_len / block_m) * ceil(kv_len / block_n)
        return LiveTiles(full=tiles, mixed=0, total=tiles)

    return live


def causal_live(q_len: int, kv_len: int):
    """The lower triangle: a tile is full left of the diagonal, mixed on it."""

    def live(block_m: int, block_n: int) -> LiveTiles:
        full = mixed = 0
        for first in range(0, q_len, block_m):
            last = min(first + block_m, q_len) - 1
            below = (first + 1) // block_n
            full += below
            mixed += last // block_n + 1 - below
        return LiveTiles(full, mixed, ceil(q_len / block_m) * ceil(kv_len / block_n))

    return live


def problem(
    dtype="bf16",
    d_qk=128,
    d_v=None,
    *,
    precision="ieee",
    batch=8,
    heads=16,
    kv_heads=None,
    length=4096,
    kv_len=None,
    forward=FORWARD,
    backward=BACKWARD,
    mask=MASK,
    live=causal_live,
    digest="",
) -> Problem:
    """Causal softmax attention, unless told otherwise."""
    kv_len = kv_len or length
    costs = KernelCosts(forward, backward, mask, live(length, kv_len))
    return Problem(
        dtype, precision, batch, heads, kv_heads or heads, length, kv_len, d_qk, d_v or d_qk, costs, digest=digest
    )
