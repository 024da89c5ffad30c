"""Whether two calls gave the same bits, and where they did not."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

#: elements that are shown of a result
_SHOWN = 6


def other_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """A line for each result with other bits than expected, and "" if there is none: how many elements differ and how
    many are NaN, by how much at most, over which indices of each dimension, and the first of them with both values."""
    lines = []
    for name, result in found.items():
        before = expected[name]
        places = (result != before).nonzero()  # NaN differs from NaN
        if not len(places):
            continue
        most = (result.double() - before.double()).abs().nan_to_num(0, 0).max().item()
        lows, highs = places.amin(0).tolist(), places.amax(0).tolist()
        box = ", ".join(f"{low}..{high}" for low, high in zip(lows, highs, strict=True))
        shown = [(tuple(at), result[tuple(at)].item(), before[tuple(at)].item()) for at in places[:_SHOWN].tolist()]
        numbers = f"{len(places)} of {result.numel()} elements, {int(result.isnan().sum())} of them NaN"
        values = "; ".join(f"{at}: {now!r}, before {then!r}" for at, now, then in shown)
        lines.append(f"{name}: {numbers}, by {most:.3g} at most, in [{box}]: {values}")
    return "\n".join(lines)
