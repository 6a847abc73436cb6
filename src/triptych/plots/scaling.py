"""Cost against the number of pixels, on logarithms of both."""

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
    """p of cost = c pixels^p, printed at the curve's end."""


def scaling(
    sides: Sequence[int], panels: Mapping[str, Mapping[str, Curve]], title: str, below: str = ""
) -> Figure:
    """A panel for each cost, a line for each network, its name and exponent at its end.

    Args:
        sides: of the square images, in pixels, ascending.
        panels: "seconds an image" -> network -> its cost at each side.
    """
    wide, high, left, top = 3.3, 2.9, 0.85, 1.2
    across = wide + 2.0
    made = style.figure(left + len(panels) * across - 0.25, top + high + 0.75)
    style.heading(made, title, below)
    for i, (name, curves) in enumerate(panels.items()):
        x = left + i * across
        ax = style.quiet(style.axes(made, x, top, wide, high))
        style.text(made, x, top - 0.14, name, 10, weight="bold")
        _draw(ax, sides, curves)
    return made


def _draw(ax: Axes, sides: Sequence[int], curves: Mapping[str, Curve]) -> None:
    pixels = [side * side for side in sides]
    ax.set(xscale="log", yscale="log", xlabel="side of the image, pixels")
    last = sorted(curve.values[-1] for curve in curves.values())
    for color, (name, curve) in zip(style.CYCLE, curves.items(), strict=False):
        drawn = [(x, y) for x, y in zip(pixels, curve.values, strict=True) if y > 0]
        if not drawn:
            continue
        ax.plot(*zip(*drawn, strict=True), color=color, linewidth=2, marker="o", markersize=4)
        says = name if curve.exponent is None else f"{name}\npixels$^{{{curve.exponent:.2f}}}$"
        ax.annotate(
            says,
            drawn[-1],
            xytext=(8, 0),
            textcoords="offset points",
            color=color,
            fontsize=9,
            va={last[0]: "top", last[-1]: "bottom"}.get(
                curve.values[-1], "center"
            ),  # curves may end together
            annotation_clip=False,
        )
    ax.xaxis.set_major_locator(FixedLocator(pixels))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value**0.5):d}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
