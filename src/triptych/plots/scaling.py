"""Cost against the number of pixels, or of anything, on logarithms of both."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from triptych.plots import style


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A network's cost at each size."""

    values: Sequence[float]
    exponent: float | None = None
    """p of cost = c n^p, printed at the curve's end."""


def scaling(
    sides: Sequence[int],
    panels: Mapping[str, Mapping[str, Curve]],
    title: str,
    below: str = "",
    counted: str | None = None,
) -> Figure:
    """A panel for each cost, a line for each network, its name and exponent at its end.

    Args:
        sides: of the square images, in pixels, ascending; or how many there are of what is `counted`.
        panels: "seconds an image" -> network -> its cost at each side.
        counted: what is on the horizontal axis instead of pixels: "images in a batch".
    """
    wide, high, left, top = 3.3, 2.9, 0.85, 1.2
    across = wide + 2.0
    fig = style.figure(left + len(panels) * across - 0.25, top + high + 0.75)
    style.heading(fig, title, below)
    for i, (name, curves) in enumerate(panels.items()):
        x = left + i * across
        ax = style.quiet(style.axes(fig, x, top, wide, high))
        style.text(fig, x, top - 0.14, name, 10, weight="bold")
        _draw(ax, sides, curves, counted)
    return fig


def _draw(ax: Axes, sides: Sequence[int], curves: Mapping[str, Curve], counted: str | None) -> None:
    pixels = [side if counted else side * side for side in sides]
    ax.set(xscale="log", yscale="log", xlabel=counted or "side of the image, pixels")
    ends: list[tuple[float, str, str]] = []
    for color, (name, curve) in zip(style.CYCLE, curves.items(), strict=False):
        drawn = [(x, y) for x, y in zip(pixels, curve.values, strict=True) if y > 0]
        if not drawn:
            continue
        ax.plot(*zip(*drawn, strict=True), color=color, linewidth=2, marker="o", markersize=4)
        of = "n" if counted else "pixels"
        label = name if curve.exponent is None else f"{name}\n{of}$^{{{curve.exponent:.2f}}}$"
        ends.append((drawn[-1][1], label, color))
    low, high = map(math.log, ax.get_ylim())
    heights = [(math.log(end) - low) / (high - low) for end, _, _ in ends]
    for height, (_, label, color) in zip(_apart(heights), ends, strict=True):  # curves may end together
        ax.text(1.02, height, label, color=color, fontsize=9, va="center", transform=ax.transAxes)
    ax.xaxis.set_major_locator(FixedLocator(pixels))
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{round(value if counted else value**0.5):d}")
    )
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _apart(heights: Sequence[float], gap: float = 0.16) -> list[float]:
    """Heights of labels, parts of the axes', as near to those asked for as labels of that height can stand."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    for lower, upper in itertools.pairwise(order):
        placed[upper] = max(placed[upper], placed[lower] + gap)
    over = max((placed[i] - want for i, want in enumerate(heights)), default=0.0)
    return [height - over / 2 for height in placed]
