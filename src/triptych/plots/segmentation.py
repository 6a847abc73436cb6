"""An image and its parse side by side, and what each color stands for."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from triptych.plots import style

MOST = 30  # classes in a legend


class Entry(NamedTuple):
    """A line of a legend."""

    name: str
    color: Sequence[int]
    """Red, green, blue from 0 to 255."""
    share: float
    """Of the image, from 0 to 1."""


def parse_figure(
    image: UInt8[np.ndarray, "H W 3"],
    overlay: UInt8[np.ndarray, "H2 W2 3"],
    entries: Sequence[Entry],
    title: str = "",
) -> Figure:
    """The image, the image under its parse, and a legend of the classes in it, the largest first."""
    H, W = image.shape[:2]
    gap, margin = 0.15, 0.4
    wide = min(max(4.4 * W / H, 2.2), 4.4) if H > W else 4.4
    high = min(max(wide * H / W, 0.4), 6.5)
    width = max(2 * wide + gap, 5.6)
    columns = max(1, int((width + 0.3) / 2.4))
    shown = list(entries[:MOST])
    rest = sum(entry.share for entry in entries[MOST:])
    lines = -(-len(shown) // columns) + bool(rest)
    top = 0.75
    fig = style.figure(width + 2 * margin, top + high + 0.3 + lines * LINE_HEIGHT + 0.35)
    made_of = f"{len(entries)} class{'es' if len(entries) != 1 else ''}"
    style.text(fig, margin, 0.45, style.short(title, int((width - 1.6) / 0.105)), 13, weight="bold")
    style.text(fig, margin + width, 0.45, f"{W} × {H}, {made_of}", 9, style.SOFT, ha="right")
    for pixels, left in ((image, margin), (overlay, margin + wide + gap)):
        style.show_image(style.axes(fig, left, top, wide, high), pixels)
    legend(fig, margin, top + high + 0.3, width, shown, columns)
    if rest:
        words = f"and {len(entries) - MOST} more, {percent(rest)} together"
        style.text(fig, margin, top + high + 0.3 + (lines - 1) * LINE_HEIGHT + 0.16, words, 8.5, style.SOFT)
    return fig


LINE_HEIGHT = 0.235


def legend(
    page: Figure, left: float, top: float, width: float, entries: Sequence[Entry], columns: int = 1
) -> None:
    """Chips of color, names and shares, down each column; in inches from the upper left corner of the page."""
    if not entries:
        return
    gap = 0.3
    step = (width + gap) / columns
    lines = -(-len(entries) // columns)
    ax = style.axes(page, left, top, width, lines * LINE_HEIGHT)
    ax.set(xlim=(0, width), ylim=(lines * LINE_HEIGHT, 0))
    ax.axis("off")
    for i, (name, color, share) in enumerate(entries):
        x, y = i // lines * step, i % lines * LINE_HEIGHT
        ax.add_patch(chip(x, y + 0.05, 0.15, 0.13, color))
        room = step - gap - 0.22 - 0.5
        ax.text(
            x + 0.24,
            y + 0.16,
            style.shorts([name], max(4, int(room / 0.066)))[0],
            fontsize=8.5,
            color=style.INK,
        )
        ax.text(x + step - gap, y + 0.16, percent(share), fontsize=8.5, color=style.SOFT, ha="right")


def chip(x: float, y: float, width: float, height: float, color: Sequence[int]) -> FancyBboxPatch:
    """A rounded square of a class's color."""
    shade = [value / 255 for value in color]
    return FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.03", lw=0, facecolor=shade
    )


def percent(share: float) -> str:
    """As one says it: 34%, 3.4%, <0.1%."""
    if share >= 0.095:
        return f"{share:.0%}"
    return f"{share:.1%}" if share >= 0.001 else "<0.1%"
