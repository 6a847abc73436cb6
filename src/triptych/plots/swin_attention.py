"""What a point of an image sees through the windows of a Swin."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from triptych.plots import style


def point_attention(
    image: UInt8[np.ndarray, "H W 3"],
    attention: Sequence[Float[np.ndarray, "blocks heads _ _"]],
    windows: Float[np.ndarray, "blocks 2"],
    shifts: Float[np.ndarray, "blocks 2"],
    strides: Int[np.ndarray, " stages"],
    point: Float[np.ndarray, " 2"],
    title: str = "What a point attends to",
) -> Figure:
    """An image a block: the attention of the cell at the point, the mean of the heads, with the borders of the block's
    windows; the point's own one is framed.

    Args:
        attention: for each stage, on its map.
        windows: height and width of each block's windows in pixels.
        shifts: pixels by which its map is rolled; what the roll brings together is parted by a border, too.
        strides: pixels of a cell of each stage.
        point: x and y in pixels.
    """
    H, W = image.shape[:2]
    blocks = [(s, heads.mean(0)) for s, maps in enumerate(attention) for heads in maps]
    across = min(len(blocks), 6 if len(blocks) > 10 else 5)
    wide, gap, note, top = 1.75, 0.14, 0.42, 0.85
    high = wide * H / W
    rows = -(-len(blocks) // across)
    fig = style.figure(max(0.66 + across * (wide + gap), 5.2), top + rows * (high + note + gap) + 0.25)
    style.heading(
        fig, title, f"at x {point[0]:.0f}, y {point[1]:.0f}; mean of the heads; lines separate windows"
    )
    for i, (s, heat) in enumerate(blocks):
        x, y = 0.4 + i % across * (wide + gap), top + i // across * (high + note + gap)
        block_type = "SW-MSA" if shifts[i].any() else "W-MSA"
        style.text(fig, x, y + note - 0.23, f"{i + 1}  {block_type}", 8.5, style.INK)
        size = f"stage {s + 1}, {heat.shape[0]} x {heat.shape[1]} cells"
        style.text(fig, x, y + note - 0.08, size, 7.5, style.SOFT)
        ax = style.axes(fig, x, y + note, wide, high)
        style.show_image(
            ax, style.overlay(image, on_pixels(heat, (H, W), int(strides[s])), high=1.0, low=0.0)
        )
        mark_windows(ax, (H, W), windows[i], shifts[i], point)
    return fig


def gathered(
    image: UInt8[np.ndarray, "H W 3"],
    rollout: Float[np.ndarray, "h w"],
    point_rollout: Float[np.ndarray, "stages h w"],
    point: Float[np.ndarray, " 2"],
    readout: str = "",
    title: str = "Attention rollout",
    below: str = "",
) -> Figure:
    """The image; what all of it gives to what is read at the end; and what it gives to the point's cell by the end of
    each stage."""
    H, W = image.shape[:2]
    count = len(point_rollout)
    big, gap, top = 2.2, 0.14, 1.2
    high = big * H / W
    fig = style.figure(0.8 + (2 + count) * (big + gap), top + high + 0.35)
    style.heading(fig, title, below)
    words = [f"into the {readout}" if readout else "into the output"]
    words += [f"into the point's cell, stage {s + 1}" for s in range(count)]
    style.show_image(style.axes(fig, 0.4, top, big, high), image)
    for i, (name, heat) in enumerate(zip(words, [rollout, *point_rollout], strict=True)):
        x = 0.4 + (i + 1) * (big + gap)
        style.text(fig, x, top - 0.1, name, 8.5, style.SOFT)
        ax = style.axes(fig, x, top, big, high)
        style.show_image(ax, style.overlay(image, heat))
        if i:
            mark_point(ax, (H, W), point)
    return fig


def mark_windows(
    ax: Axes,
    size: tuple[int, int],
    window: Float[np.ndarray, " 2"],
    shift: Float[np.ndarray, " 2"],
    point: Float[np.ndarray, " 2"],
) -> None:
    """Lines between the windows over an image of `size` pixels, a frame around the point's own, and the point."""
    cuts = [cuts_along(side, int(w), int(s)) for side, w, s in zip(size, window, shift, strict=True)]
    to_y, to_x = _scales(ax, size)
    for y in cuts[0][1:-1]:
        ax.axhline(to_y(y), color=style.INK, linewidth=0.4, alpha=0.5)
    for x in cuts[1][1:-1]:
        ax.axvline(to_x(x), color=style.INK, linewidth=0.4, alpha=0.5)
    (y0, y1), (x0, x1) = (
        next((a, b) for a, b in pairwise(ends) if a <= at < b)
        for ends, at in zip(cuts, point[::-1], strict=True)
    )
    corner, sides = (to_x(x0), to_y(y0)), (to_x(x1) - to_x(x0), to_y(y1) - to_y(y0))
    ax.add_patch(
        Rectangle(corner, *sides, fill=False, edgecolor=style.BLUE, linewidth=1.2, clip_on=False, zorder=5)
    )
    mark_point(ax, size, point)


def mark_point(ax: Axes, size: tuple[int, int], point: Float[np.ndarray, " 2"]) -> None:
    """A small ring over an image of `size` pixels."""
    to_y, to_x = _scales(ax, size)
    at = to_x(float(point[0])), to_y(float(point[1]))
    ax.plot(
        *at, "o", markersize=4, markerfacecolor=style.BLUE, markeredgecolor=style.PAPER, markeredgewidth=0.9
    )


def on_pixels(heat: Float[np.ndarray, "h w"], size: tuple[int, int], stride: int) -> Float[np.ndarray, "H W"]:
    """Cells as squares of `stride` pixels; the last ones may reach past the image, and are cut off there."""
    return heat.repeat(stride, 0).repeat(stride, 1)[: size[0], : size[1]]


def _scales(ax: Axes, size: tuple[int, int]):
    """From pixels of an image to the coordinates of the axes that show it, however much it was enlarged."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    return (
        lambda y: top + (bottom - top) * y / size[0],
        lambda x: left + (right - left) * x / size[1],
    )


def cuts_along(side: int, window: int, shift: int) -> list[int]:
    """Where an axis is cut: ends, and from the shift on every window."""
    return [0, *range(shift or window, side, window), side]
