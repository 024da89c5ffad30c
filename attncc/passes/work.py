"""The work of a variant, as values that the cost model reads and that are cached on disk."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class LiveTiles:
    """How a mask divides the tiles of one (batch, head) pair, all row blocks together.

    `full` tiles need no mask arithmetic, `mixed` tiles pay it; the remaining `total - full - mixed` are never visited.
    """

    full: int
    mixed: int
    total: int

    @property
    def live(self) -> int:
        """The tiles that a kernel visits."""
        return self.full + self.mixed


@dataclass(frozen=True)
class PairCosts:
    """The operations of a variant's stages for one (query, key) pair, besides the matmuls.

    fma: float32 adds, multiplies, fused multiply-adds, comparisons, selects; sfu: exp2, log2, tanh, rcp, sqrt, sin
    (the special-function unit); int: 32-bit integer and boolean operations; loads: elements read from inputs that are
    indexed by both the query and the key (a dense bias), which no row or column vector can serve; tables: entries
    that Triton's kernels read from tables by distance; their time is included in int.
    The conversion of a weight to the matmul's dtype is included; the rescaling of the accumulator is not.
    """

    fma: float = 0.0
    sfu: float = 0.0
    int: float = 0.0
    loads: float = 0.0
    tables: float = 0.0

    def plus(self, other: PairCosts, times: float) -> PairCosts:
        """The sum of these costs and `times` the others."""
        mine, theirs = astuple(self), astuple(other)
        return PairCosts(*(a + times * b for a, b in zip(mine, theirs, strict=True)))
