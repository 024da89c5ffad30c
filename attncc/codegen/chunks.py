"""A head dimension as tiles: the power-of-two pieces that a kernel holds it in."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attncc.schedule.problem import MAX_CHUNK, head_chunks


@dataclass(frozen=True)
class Chunk:
    """A power-of-two piece of a head dimension: columns [start, start + real), held in a tile `width` wide.

    `branch`: the branch that it belongs to; `key`: the piece of k that it is multiplied with, since branches of q may
    share one k; `head`: which of the heads of v that share a weight; `end`: the first column after it, or None at the
    end of the tensor.
    """

    index: int
    start: int
    width: int
    real: int
    branch: int
    key: int
    head: int
    end: int | None

    @property
    def partial(self) -> bool:
        return self.real < self.width


def chunks(
    dim: int, branches: int = 1, shared_key: bool = False, value: int | None = None, widest: int = MAX_CHUNK
) -> tuple[Chunk, ...]:
    """The last dimension of q or k as tiles, as the scheduler counts them, one branch after the other. `value`: if v is
    the first part of k, the column where that part ends; no tile crosses it. No tile is wider than `widest`."""
    spans = [(branch, dim // branches) for branch in range(branches)]
    if value is not None and value < dim:
        spans = [(0, value), (0, dim - value)]
    found: list[Chunk] = []
    first = 0
    for branch, own in spans:
        start = 0
        for piece, width in enumerate(head_chunks(own, widest)):
            key = piece if shared_key else len(found)
            real = min(width, own - start)
            end = None if first + start + real == dim else first + start + real
            found.append(Chunk(len(found), first + start, width, real, branch, key, 0, end))
            start += width
        first += own
    return tuple(found)


def value_chunks(dim: int, heads: int = 1) -> tuple[Chunk, ...]:
    """The last dimension of v as tiles, for all heads of v that share a weight, one head after the other."""
    found: list[Chunk] = []
    for head in range(heads):
        found += [replace(c, index=len(found) + c.index, key=len(found) + c.index, head=head) for c in chunks(dim)]
    return tuple(found)
