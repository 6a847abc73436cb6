"""Windows of a Swin: how a map is cut, shifted and masked, and what a point sees through them."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
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
    """A picture a block: the attention of the cell at the point, the mean of the heads, with the borders of the block's
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
    made = style.figure(max(0.66 + across * (wide + gap), 5.2), top + rows * (high + note + gap) + 0.25)
    style.heading(
        made, title, f"from x {point[0]:.0f}, y {point[1]:.0f}; mean of the heads; lines part windows"
    )
    for i, (s, heat) in enumerate(blocks):
        x, y = 0.4 + i % across * (wide + gap), top + i // across * (high + note + gap)
        kind = "SW-MSA" if shifts[i].any() else "W-MSA"
        style.text(made, x, y + note - 0.23, f"{i + 1}  {kind}", 8.5, style.INK)
        size = f"stage {s + 1}, {heat.shape[0]} x {heat.shape[1]} cells"
        style.text(made, x, y + note - 0.08, size, 7.5, style.SOFT)
        ax = style.axes(made, x, y + note, wide, high)
        style.picture(ax, style.overlay(image, on_pixels(heat, (H, W), int(strides[s])), high=1.0))
        mark_windows(ax, (H, W), windows[i], shifts[i], point)
    return made


def gathered(
    image: UInt8[np.ndarray, "H W 3"],
    rollout: Float[np.ndarray, "h w"],
    point_rollout: Float[np.ndarray, "stages h w"],
    point: Float[np.ndarray, " 2"],
    readout: str = "",
    title: str = "Attention rollout",
    below: str = "",
) -> Figure:
    """The picture; what all of it gives to what is read at the end; and what it gives to the point's cell by the end of
    each stage."""
    H, W = image.shape[:2]
    count = len(point_rollout)
    big, gap, top = 2.2, 0.14, 1.2
    high = big * H / W
    made = style.figure(0.8 + (2 + count) * (big + gap), top + high + 0.35)
    style.heading(made, title, below)
    words = [f"into the {readout}" if readout else "into the output"]
    words += [f"into the point's cell, stage {s + 1}" for s in range(count)]
    style.picture(style.axes(made, 0.4, top, big, high), image)
    for i, (name, heat) in enumerate(zip(words, [rollout, *point_rollout], strict=True)):
        x = 0.4 + (i + 1) * (big + gap)
        style.text(made, x, top - 0.1, name, 8.5, style.SOFT)
        ax = style.axes(made, x, top, big, high)
        style.picture(ax, style.overlay(image, heat))
        if i:
            mark_point(ax, (H, W), point)
    return made


def cyclic_shift(
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    sources: Int[np.ndarray, "n m"],
    mask: Float[np.ndarray, "n m m"],
    title: str = "Shifted windows",
) -> Figure:
    """Figures 2 and 4 of the paper on a small map: windows, shifted windows, the rolled map, and the mask.

    Args:
        size: rows and columns of the map, numbered row by row; whole windows.
        sources: the cell that each place of each window of the rolled map shows.
        mask: what is added to each window's attention: 0, or -inf.
    """
    H, W = size
    side, gap, top = 2.3, 0.42, 1.35
    high = side * H / W
    made = style.figure(0.8 + 4 * side + 3 * gap, top + high + 0.75)
    style.heading(
        made, title, f"a map of {H} x {W} cells, windows of {window[0]} x {window[1]}, rolled by {shift}"
    )
    plain, regions = _regions(size, window, (0, 0)), _regions(size, window, shift)
    numbers = np.arange(H * W).reshape(size)
    rolled = _tiled(sources, size, window)
    shown = (
        ("W-MSA", f"{plain.max() + 1} windows", numbers, plain, (0, 0)),
        ("SW-MSA", f"cut anew: {regions.max() + 1} regions", numbers, regions, shift),
        ("cyclic shift", "rolled up and left, cut as before", rolled, regions.ravel()[rolled], (0, 0)),
    )
    for i, (name, words, cells, region, cut) in enumerate(shown):
        x = 0.4 + i * (side + gap)
        style.text(made, x, top - 0.28, name, 10, style.INK)
        style.text(made, x, top - 0.1, words, 8, style.SOFT)
        _cells(style.axes(made, x, top, side, high), cells, region, window, cut)
    x, rows, columns = 0.4 + 3 * (side + gap), H // window[0], W // window[1]
    style.text(made, x, top - 0.28, "mask", 10, style.INK)
    style.text(made, x, top - 0.1, "of each window; dark is -inf", 8, style.SOFT)
    part, tall = (side - (columns - 1) * 0.12) / columns, (high - (rows - 1) * 0.12) / rows
    for n, matrix in enumerate(mask):
        r, c = divmod(n, columns)
        ax = style.axes(made, x + c * (part + 0.12), top + r * (tall + 0.12), part, tall)
        style.picture(ax, np.where(np.isneginf(matrix)[..., None], to_rgb(style.SOFT), 1.0))
    style.text(
        made, 0.4, top + high + 0.3, "A number is a cell, a colour is what may see each other.", 8, style.SOFT
    )
    return made


def mark_windows(
    ax: Axes,
    size: tuple[int, int],
    window: Float[np.ndarray, " 2"],
    shift: Float[np.ndarray, " 2"],
    point: Float[np.ndarray, " 2"],
) -> None:
    """Lines between the windows over a picture of `size` pixels, a frame around the point's own, and the point."""
    cuts = [_cuts(side, int(w), int(s)) for side, w, s in zip(size, window, shift, strict=True)]
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
    """A small ring over a picture of `size` pixels."""
    to_y, to_x = _scales(ax, size)
    at = to_x(float(point[0])), to_y(float(point[1]))
    ax.plot(
        *at, "o", markersize=4, markerfacecolor=style.BLUE, markeredgecolor=style.PAPER, markeredgewidth=0.9
    )


def on_pixels(heat: Float[np.ndarray, "h w"], size: tuple[int, int], stride: int) -> Float[np.ndarray, "H W"]:
    """Cells as squares of `stride` pixels; the last ones may reach past the picture, and are cut off there."""
    return heat.repeat(stride, 0).repeat(stride, 1)[: size[0], : size[1]]


def _scales(ax: Axes, size: tuple[int, int]):
    """From pixels of a picture to the coordinates of the axes that show it, however much it was enlarged."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    return (
        lambda y: top + (bottom - top) * y / size[0],
        lambda x: left + (right - left) * x / size[1],
    )


def _cuts(side: int, window: int, shift: int) -> list[int]:
    """Where an axis is cut: ends, and from the shift on every window."""
    return [0, *range(shift or window, side, window), side]


def _regions(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> Int[np.ndarray, "h w"]:
    """Number of the region that each cell lies in, row by row."""
    cuts = [_cuts(side, w, s) for side, w, s in zip(size, window, shift, strict=True)]
    y, x = (
        np.searchsorted(ends, np.arange(side), side="right") - 1
        for ends, side in zip(cuts, size, strict=True)
    )
    return y[:, None] * (len(cuts[1]) - 1) + x


def _tiled(sources: Int[np.ndarray, "n m"], size: tuple[int, int], window: tuple[int, int]) -> np.ndarray:
    """Windows of cells put side by side."""
    (h, w), (rows, columns) = window, (size[0] // window[0], size[1] // window[1])
    return sources.reshape(rows, columns, h, w).transpose(0, 2, 1, 3).reshape(size)


def _cells(
    ax: Axes, numbers: np.ndarray, regions: np.ndarray, window: tuple[int, int], shift: tuple[int, int]
) -> None:
    """A map whose cells have numbers, a colour a region, and lines where it is cut."""
    H, W = numbers.shape
    tints = np.array([to_rgb(color) for color in (*style.CYCLE, "#d946a0")])
    style.picture(ax, 0.7 + 0.3 * tints[regions % len(tints)])
    for (y, x), n in np.ndenumerate(numbers):
        ax.text(x, y, str(n), fontsize=5.5, color=style.INK, ha="center", va="center")
    for y in _cuts(H, window[0], shift[0])[1:-1]:
        ax.axhline(y - 0.5, color=style.INK, linewidth=1.2)
    for x in _cuts(W, window[1], shift[1])[1:-1]:
        ax.axvline(x - 0.5, color=style.INK, linewidth=1.2)
