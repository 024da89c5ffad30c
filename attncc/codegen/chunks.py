"""A head dimension as tiles: the power-of-two pieces that a kernel holds it in."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.schedule.problem import head_chunks


@dataclass(frozen=True)
class Chunk:
    """A power-of-two piece of a head dimension: columns [start, start + real), held in a tile `width` wide.

    `branch` says whose it is, `key` which piece of k it meets, where branches of q may share one k."""

    index: int
    start: int
    width: int
    real: int
    branch: int
    key: int

    @property
    def partial(self) -> bool:
        return self.real < self.width


def chunks(dim: int, branches: int = 1, shared_key: bool = False) -> tuple[Chunk, ...]:
    """A head dimension as tiles, as the scheduler counts them: those of each branch, one branch after the other."""
    found: list[Chunk] = []
    own = dim // branches
    for branch in range(branches):
        start = 0
        for piece, width in enumerate(head_chunks(own)):
            key = piece if shared_key else len(found)
            found.append(Chunk(len(found), branch * own + start, width, min(width, own - start), branch, key))
            start += width
    return tuple(found)
