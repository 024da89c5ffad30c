"""The README's plots, drawn from committed result files: SVG, transparent, readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.readme import TITLES
from bench.record import load

#: a mid grey that has contrast with white and with near-black
INK = "#7d8590"
COLOURS = {"attncc": "#d9480f", "triton": "#f0a35e", "flex": "#4c8dc9", "cudnn": "#76a832", "fa2": "#a37acc"}
NAMES = {
    "attncc": "attncc",
    "triton": "attncc in Triton",
    "flex": "FlexAttention",
    "cudnn": "cuDNN",
    "fa2": "FlashAttention-2",
}
MODES = ("forward", "backward")


def _style(pyplot: Any) -> None:
    pyplot.rcParams.update(
        {
            "svg.fonttype": "none",  # text stays text: small files, and the reader's own font
            "svg.hashsalt": "attncc",  # the same results give the same bytes
            "font.family": "sans-serif",
            "font.size": 10,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )


def _wrapped(title: str) -> str:
    return title.replace(" + ", "\n+ ").replace(" of ", "\nof ")


def dense(data: dict[str, Any], path: Path) -> None:
    """Bars of TFLOP/s at the longest length, forward above backward: attncc and each peer that can run the case."""
    from matplotlib import pyplot

    _style(pyplot)
    rows = [row for row in data["rows"] if "error" not in row]
    length = max(row["M"] for row in rows)
    figure, axes = pyplot.subplots(2, 1, figsize=(8.5, 5.2), sharex=True, layout="constrained")
    for axis, mode in zip(axes, MODES, strict=True):
        shown = [row for row in rows if row["M"] == length and row["mode"] == mode]
        for place, row in enumerate(shown):
            entries = {"attncc": row["attncc"], **row["peers"]}
            bars = [(name, entries[name]["tflops"]) for name in COLOURS if "tflops" in entries.get(name, {})]
            width = 0.8 / len(COLOURS)
            for slot, (name, tflops) in enumerate(bars):
                x = place + (slot - (len(bars) - 1) / 2) * width
                axis.bar(x, tflops, width * 0.92, color=COLOURS[name])
                axis.text(x, tflops, f"{tflops:.0f}", ha="center", va="bottom", fontsize=7.5)
        axis.set_ylabel(f"{mode}, TFLOP/s")
        axis.set_xticks(range(len(shown)), [_wrapped(TITLES[row["case"]]) for row in shown])
        axis.tick_params(axis="x", length=0)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, [NAMES[n] for n in COLOURS], loc="outside upper center", ncols=len(COLOURS), frameon=False)
    axes[-1].set_xlabel(f"S = {length}, D = 128, H = 16, bf16, exact mask area; {data['gpu']}")
    # Without a date in the file, drawing the same results twice changes nothing in git.
    figure.savefig(path, transparent=True, metadata={"Date": None})
    pyplot.close(figure)


#: suite -> how its results are drawn
PLOTS: dict[str, Callable[[dict[str, Any], Path], None]] = {"dense": dense}


def draw_all(results: Path) -> Iterator[Path]:
    """Draw every plot whose results exist; yields the files written."""
    import matplotlib

    matplotlib.use("Agg")
    for suite, draw in PLOTS.items():
        for source in sorted(results.glob(f"*/{suite}.json")):
            target = source.with_suffix(".svg")
            draw(load(source), target)
            yield target
