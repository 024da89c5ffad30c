"""The README's picture: attention weights of variants, each with its formula. `python -m bench.figures.variants`."""

from __future__ import annotations

from pathlib import Path

import torch

import attncc as ac
from attncc.cli.draw import mask_and_weights

FILE = Path(__file__).with_suffix(".png")
LENGTH, HEADS = 48, 4

#: what is drawn: a title, the lines under it, and the variant
PANELS = (
    ("causal", "kv_idx <= q_idx", ac.Variant(mask=ac.causal)),
    ("ALiBi", "score + slopes[h] * (kv_idx - q_idx)", ac.Variant(score=ac.alibi(), mask=ac.causal)),
    (
        "window or prefix",
        "causal & sliding_window(12) | prefix(4)",
        ac.Variant(mask=ac.causal & ac.sliding_window(12) | ac.prefix(4)),
    ),
    ("documents", "doc[b, q_idx] == doc[b, kv_idx]", ac.Variant(mask=ac.causal & ac.document())),
    ("dilated", "(q_idx - kv_idx) % 4 == 0", ac.Variant(mask=ac.causal & ac.dilated(4))),
    ("softcap", "2 * tanh(score / 2)", ac.Variant(score=ac.softcap(2.0), mask=ac.causal)),
    ("sigmoid", "sigmoid(score - log(kv_len))", ac.Variant(normalizer="sigmoid", mask=ac.causal)),
    ("Cog", "sign(s) * exp(abs(s)) / row.sum(exp(abs(s)))", ac.Variant(normalizer=ac.cog, mask=ac.causal)),
)


def draw(path: Path = FILE) -> None:
    """Write the picture, 2 x 4 panels; hidden pairs are grey."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.1), dpi=110, layout="constrained", facecolor="white")
    for axes, (title, text, variant) in zip(figure.subplots(2, 4).flat, PANELS, strict=True):
        mask, weights = mask_and_weights(variant.graph, LENGTH, LENGTH, 0, HEADS, {})
        # rows of a causal mask have ever more keys: relative to the row's largest weight all of them can be seen
        shown = weights / weights.abs().amax(-1, keepdim=True).clamp_min(1e-12)
        signed = bool((weights < 0).any())
        colours = colormaps["RdBu_r" if signed else "viridis"].with_extremes(bad="#e8e8e8")
        image = torch.where(mask, shown, torch.nan).numpy()
        axes.imshow(image, cmap=colours, vmin=-1 if signed else 0, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize=11, fontweight="bold")
        axes.set_xlabel(text, fontsize=7.5, family="monospace")
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    draw()
