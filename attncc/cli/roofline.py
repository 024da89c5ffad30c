"""Print or draw kernels as points under the roofline of a device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attncc.errors import InputError

if TYPE_CHECKING:
    from attncc.schedule.device import Device
    from attncc.schedule.problem import Problem
    from attncc.schedule.roofline import Point

#: a mid grey that has contrast with white and with near-black
INK = "#7d8590"
COLOURS = {"forward": "#d9480f", "dkdv": "#4c8dc9", "dq": "#76a832", "pair": "#a37acc", "backward": "#4c8dc9"}
WIDTH = 40


def lines(points: Sequence[Point]) -> list[str]:
    """One line per point: its rate, a bar for the share of the roof that it reaches, and the ceilings of single
    units."""
    found = []
    for p in points:
        filled = min(round(p.share * WIDTH), WIDTH)
        bar = "█" * filled + "·" * (WIDTH - filled)
        # the unit with the lowest ceiling first
        units = ", ".join(f"{unit} {rate:.0f}" for unit, rate in sorted(p.ceilings.items(), key=lambda e: e[1]))
        found.append(
            f"{p.name:<9}{p.source:<10}{p.tflops:>7.1f} TFLOP/s {p.tbps:>6.2f} TB/s  {bar} {p.share:>4.0%} of "
            f"{p.roof:.0f}" + (f"; ceilings of units: {units}" if units else "")
        )
    return found


def draw(points: Sequence[Point], problem: Problem, device: Device, title: str, path: Path) -> None:
    """Write the figure to `path`, in the format of its suffix. InputError: it cannot be drawn or written."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("drawing needs matplotlib", remedy="pip install 'attncc[plot]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "attncc", "font.size": 10, "text.color": INK}):
        figure, axis = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
        _roof(axis, points, problem, device)
        for p in points:
            _mark(axis, p)
        axis.set(xscale="log", yscale="log")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("matmul operations per byte of memory", color=INK)
        axis.set_ylabel("TFLOP/s", color=INK)
        axis.tick_params(colors=INK, which="both")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(_few_numbers(axis.get_ylim()))
        for name, spine in axis.spines.items():
            spine.set(color=INK, visible=name in ("left", "bottom"))
        axis.legend(frameon=False, fontsize=9)
        try:
            figure.savefig(path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be written: {error}") from error
        finally:
            pyplot.close(figure)


def _roof(axis: Any, points: Sequence[Point], problem: Problem, device: Device) -> None:
    """Draw the roof, memory bandwidth and matmul peak, over the range of the points."""
    from attncc.schedule.roofline import roof_at

    peak = device.matmul_tflops(problem.dtype, problem.precision)
    corner = peak / (device.dram_gbps / 1e3)
    low = min([corner, *(p.intensity for p in points)]) / 4
    high = max([corner, *(p.intensity for p in points)]) * 4
    xs = [low, corner, high]
    axis.plot(xs, [roof_at(x, problem, device) for x in xs], color=INK, linewidth=1.5)
    axis.annotate(f"{peak:.0f} TFLOP/s, {problem.dtype}", (high, peak), ha="right", va="bottom", fontsize=9)
    middle = (low * corner) ** 0.5
    slope, at = f"{device.dram_gbps / 1e3:.2f} TB/s", (middle, roof_at(middle, problem, device))
    axis.annotate(slope, at, xytext=(8, -4), textcoords="offset points", ha="left", va="top", fontsize=9)


def _few_numbers(limits: tuple[float, float]) -> Any:
    """A formatter that labels 2 and 5 between powers of ten if the axis spans few powers."""

    def text(value: float, _: int) -> str:
        return f"{value:g}" if limits[1] < 20 * limits[0] and f"{value:.0e}"[0] in "25" else ""

    return text


def _mark(axis: Any, p: Point) -> None:
    """Draw a point, its distance to the roof, and the unit ceilings below the roof."""
    colour, filled = COLOURS.get(p.name, INK), p.source == "measured"
    label = f"{p.name}, {p.source}: {p.tflops:.0f} TFLOP/s, {p.share:.0%} of its roof"
    face = colour if filled else "none"
    axis.plot([p.intensity], [p.tflops], "o", markeredgecolor=colour, markerfacecolor=face, label=label)
    axis.plot([p.intensity] * 2, [p.tflops, p.roof], ":", color=colour, linewidth=1)
    for unit, rate in p.ceilings.items():
        if unit in ("sfu", "alu") and rate < p.roof:
            axis.plot([p.intensity / 1.3, p.intensity * 1.3], [rate] * 2, color=colour, linewidth=1)
            axis.annotate(unit, (p.intensity / 1.35, rate), fontsize=8, ha="right", va="center", color=colour)
