"""Draw a mask as characters, or mask and weights as an image, by evaluating the stages on sample inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attncc.errors import AttnccError, InputError
from attncc.ir.graph import LOOP_DIMS, VariantGraph
from attncc.runtime.evaluate import evaluate
from attncc.runtime.reference import dense
from attncc.runtime.samples import Sample, Shape, sample_inputs
from attncc.runtime.shapes import REFERENCE_DTYPES, bind, value_of

#: most pairs evaluated at once, which bounds the memory
CHUNK = 1 << 22
#: longest sequence drawn: longer ones take minutes
MAX_LENGTH = 32768
_BLOCKS = {(False, False): "·", (True, False): "▀", (False, True): "▄", (True, True): "█"}


@dataclass(frozen=True)
class Picture:
    """A mask reduced to boolean `pixels` (rows, columns). A pixel is set if any of its `step` x `step` pairs is
    visible.

    `visible` counts the visible pairs of `total`; `scalars` are the values it was drawn with.
    """

    pixels: Tensor
    step: int
    visible: int
    total: int
    scalars: dict[str, Any]

    def lines(self) -> list[str]:
        """The picture as text, two rows of pixels per line."""
        rows = self.pixels.tolist()
        if len(rows) % 2:
            rows.append([False] * len(rows[0]))
        pairs = zip(rows[0::2], rows[1::2], strict=True)
        return ["".join(_BLOCKS[upper, lower] for upper, lower in zip(*pair, strict=True)) for pair in pairs]


def picture(
    graph: VariantGraph, q_len: int, kv_len: int, head: int, heads: int, scalars: Mapping[str, Any], columns: int = 64
) -> Picture:
    """The mask of the first sequence and of `head`, at most `columns` pixels wide and high. InputError if too long.

    `scalars` are values that the caller insists on; the others, and all inputs, are those of `sample_inputs`.
    """
    if max(q_len, kv_len) > MAX_LENGTH:
        raise InputError(f"a mask of {q_len} x {kv_len} is too large to draw", remedy=f"at most {MAX_LENGTH} each way")
    if head >= heads:
        raise InputError(f"there is no head {head} of {heads}")
    sample = _sample(graph, heads, q_len, kv_len, scalars)
    sizes = Shape(1, heads, heads, q_len, kv_len, 16, 16).sizes
    env: dict[str, Any] = {"b": 0, "h": head, "h_kv": head, "q_len": q_len, "kv_len": kv_len, "num_heads": heads}
    for decl in graph.inputs:
        env[decl.name] = sample.inputs[decl.name].expand([sizes[d] if d in LOOP_DIMS else -1 for d in decl.pattern])
    used = {s.name: sample.inputs[s.name] for s in graph.scalars}
    step = -(-max(q_len, kv_len) // columns)
    env |= {**used, "kv_idx": torch.arange(kv_len)[None, :]}
    # whole pixels at a time
    rows_at_once = max(CHUNK // kv_len // step, 1) * step
    strips, visible = [], 0
    for first in range(0, q_len, rows_at_once):
        rows = torch.arange(first, min(first + rows_at_once, q_len))[:, None]
        shown = evaluate(graph["mask"].expr, {**env, "q_idx": rows}, torch.float32).expand(len(rows), kv_len)
        visible += int(shown.sum())
        strips.append(_any(shown, step))
    return Picture(torch.cat(strips), step, visible, q_len * kv_len, used)


def _any(shown: Tensor, step: int) -> Tensor:
    """Whether any pair of each `step` x `step` block is visible; blocks at the edges may be smaller."""
    rows, columns = shown.shape
    pad = (0, -columns % step, 0, -rows % step)
    padded = torch.nn.functional.pad(shown, pad)
    return padded.reshape(padded.shape[0] // step, step, padded.shape[1] // step, step).any(3).any(1)


def figure(
    graph: VariantGraph, q_len: int, kv_len: int, head: int, heads: int, scalars: Mapping[str, Any], path: Path
) -> None:
    """Write mask and weights, side by side, as the image that `path`'s suffix names. AttnccError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise AttnccError(
            "drawing an image needs matplotlib, which is not installed", remedy="pip install 'attncc[plot]'"
        ) from None
    mask, weights = mask_and_weights(graph, q_len, kv_len, head, heads, scalars)
    drawn = Figure(figsize=(8, 3.8), layout="constrained")
    left, right = drawn.subplots(1, 2)
    left.imshow(mask.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    left.set_title(f"{graph.name}: mask")
    largest = float(weights.abs().max()) or 1.0
    signed = bool((weights < 0).any())
    shown = torch.where(mask, weights, torch.nan).numpy()
    image = right.imshow(
        shown,
        cmap="RdBu_r" if signed else "viridis",
        vmin=-largest if signed else 0.0,
        vmax=largest,
        interpolation="nearest",
    )
    right.set_title("weights, random q and k")
    drawn.colorbar(image, ax=right)
    for axes in (left, right):
        axes.set_xlabel("kv_idx")
        axes.set_ylabel("q_idx")
    try:
        drawn.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputError(f"{path} cannot be written: {reason}") from error


def mask_and_weights(
    graph: VariantGraph, q_len: int, kv_len: int, head: int, heads: int, scalars: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """(M, N) mask and weights of one head, for random q and k; a masked pair has weight 0. InputError: too large."""
    if q_len * kv_len * heads > CHUNK:
        raise InputError(
            f"an image of {heads} heads at {q_len} x {kv_len} is too large", remedy="use shorter sequences"
        )
    sample = _sample(graph, heads, q_len, kv_len, scalars)
    v = value_of(graph, sample.k, sample.v)
    bound = bind(graph, sample.q, sample.k, v, None, sample.inputs, REFERENCE_DTYPES)
    weights = torch.zeros(heads * q_len * kv_len)
    mask = torch.zeros(heads * q_len * kv_len, dtype=torch.bool)
    for part in dense(graph, sample.q, sample.k, v, bound, torch.float32).parts:
        weights[part.visible] += part.factor().float() if graph.branches > 1 else part.pairs["weight"].float()
        mask[part.visible] = True
    return mask.reshape(heads, q_len, kv_len)[head], weights.reshape(heads, q_len, kv_len)[head]


def _sample(graph: VariantGraph, heads: int, q_len: int, kv_len: int, scalars: Mapping[str, Any]) -> Sample:
    sample = sample_inputs(graph, Shape(1, heads, heads, q_len, kv_len, 16, 16), torch.float32)
    return Sample(sample.q, sample.k, sample.v, {**sample.inputs, **scalars})
