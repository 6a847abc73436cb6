"""How a Swin cuts its maps: the hierarchy, shifted windows and their mask, and the bias inside a window."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from triptych.plots import style
from triptych.plots.swin_attention import cuts_along

TINTS = np.array([to_rgb(color) for color in (*style.CYCLE, "#d946a0")])


def hierarchy(
    image: UInt8[np.ndarray, "H W 3"],
    strides: Sequence[int],
    widths: Sequence[int],
    windows: Sequence[tuple[int, int]],
    title: str = "A hierarchy of maps",
) -> Figure:
    """Figure 1 of the paper: the cells of each stage over the image, thin, and its windows, thick.

    Args:
        strides: pixels of a cell of each stage.
        widths: numbers that a cell is made of.
        windows: height and width in cells.
    """
    H, W = image.shape[:2]
    wide, gap, top = 2.2, 0.16, 1.3
    high = wide * H / W
    fig = style.figure(0.8 + len(strides) * (wide + gap) - gap, top + high + 0.3)
    style.heading(fig, title, f"{H} x {W} pixels; thin lines are cells, thick lines are attention windows")
    pale = np.rint(0.6 * image + 0.4 * 255).astype(np.uint8)
    for s, (stride, width, window) in enumerate(zip(strides, widths, windows, strict=True)):
        x = 0.4 + s * (wide + gap)
        rows, columns = -(-H // stride), -(-W // stride)
        count = -(-rows // window[0]) * -(-columns // window[1])
        style.text(fig, x, top - 0.27, f"stage {s + 1}: {rows} x {columns} cells of {width}", 8.5, style.INK)
        words = "window" if count == 1 else "windows"
        style.text(fig, x, top - 0.1, f"{count} {words} of {window[0]} x {window[1]}", 8, style.SOFT)
        ax = style.axes(fig, x, top, wide, high)
        style.show_image(ax, pale)
        sides = ((rows, window[0], H), (columns, window[1], W))
        _rules(ax, [np.arange(1, n) * stride / pixels for n, _, pixels in sides], 0.25)
        _rules(ax, [np.arange(m, n, m) * stride / pixels for n, m, pixels in sides], 1.3)
    return fig


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
        size: rows and columns of the map, numbered row by row. It is shown padded to whole windows; padding has no
            numbers.
        sources: the cell that each place of each window of the rolled map shows; H * W for padding.
        mask: what is added to each window's attention: 0, or -inf.
    """
    rows, columns = (-(-side // w) for side, w in zip(size, window, strict=True))
    H, W = rows * window[0], columns * window[1]
    side, gap, top = 2.3, 0.42, 1.35
    high = side * H / W
    fig = style.figure(0.8 + 4 * side + 3 * gap, top + high + 0.6)
    style.heading(
        fig,
        title,
        f"a map of {size[0]} x {size[1]} cells, windows of {window[0]} x {window[1]}, shifted by {shift[0]} and "
        f"{shift[1]}; numbers are cells; cells of one color attend to each other",
    )
    numbers = np.full((H, W), -1)
    numbers[: size[0], : size[1]] = np.arange(size[0] * size[1]).reshape(size)
    plain, regions = _regions((H, W), window, (0, 0)), _regions((H, W), window, shift)
    rolled = _tiled(np.where(sources < size[0] * size[1], sources, -1), rows, columns, window)
    padded = ", padding has no numbers" if size != (H, W) else ""
    shown = (
        ("W-MSA", f"{rows * columns} windows{padded}", numbers, plain, (0, 0)),
        ("SW-MSA", f"shifted: {regions.max() + 1} regions", numbers, regions, shift),
        (
            "cyclic shift",
            "rolled up and left, same windows",
            rolled,
            np.roll(regions, [-s for s in shift], (0, 1)),
            (0, 0),
        ),
    )
    for i, (name, words, cells, region, cut) in enumerate(shown):
        x = 0.4 + i * (side + gap)
        style.text(fig, x, top - 0.28, name, 10, style.INK)
        style.text(fig, x, top - 0.1, words, 8, style.SOFT)
        ax = style.axes(fig, x, top, side, high)
        _cells(ax, cells, region)
        ends = (cuts_along(H, window[0], cut[0]), cuts_along(W, window[1], cut[1]))
        _rules(ax, [np.array(e[1:-1]) / e[-1] for e in ends], 1.3)
    x = 0.4 + 3 * (side + gap)
    style.text(fig, x, top - 0.28, "mask", 10, style.INK)
    style.text(fig, x, top - 0.1, "one per window; dark is -inf", 8, style.SOFT)
    part, tall = (side - (columns - 1) * 0.12) / columns, (high - (rows - 1) * 0.12) / rows
    for n, matrix in enumerate(mask):
        r, c = divmod(n, columns)
        ax = style.axes(fig, x + c * (part + 0.12), top + r * (tall + 0.12), part, tall)
        style.show_image(ax, np.where(np.isneginf(matrix)[..., None], to_rgb(style.SOFT), 1.0))
    return fig


def position_bias(
    tables: Sequence[Float[np.ndarray, "heads _ _"]],
    names: Sequence[str] | None = None,
    title: str = "Relative position bias",
) -> Figure:
    """A row a block, a square a head: what is added to the attention of a cell to another one, by how far to the right
    and below of it that one is. The center is the cell itself.

    Args:
        tables: the bias by difference of coordinates, for each block; every square is drawn on its own scale.
    """
    names = [f"block {i + 1}" for i in range(len(tables))] if names is None else names
    most = max(len(table) for table in tables)
    cell, gap, left, top = min(0.62, 9.0 / most), 0.07, 1.75, 0.95
    fig = style.figure(max(left + most * (cell + gap) + 0.4, 5.6), top + len(tables) * (cell + gap) + 0.3)
    style.heading(
        fig, title, "by offset from the query cell, in the middle; blue is positive, orange negative"
    )
    for i, (name, table) in enumerate(zip(names, tables, strict=True)):
        y = top + i * (cell + gap)
        style.text(fig, left - 0.14, y + cell / 2 + 0.04, name, 8, style.SOFT, ha="right")
        for head, bias in enumerate(table):
            limit = max(float(np.abs(bias).max()), 1e-12)
            shown = style.SIMILARITY(0.5 + 0.5 * bias / limit)[..., :3]
            style.show_image(style.axes(fig, left + head * (cell + gap), y, cell, cell), shown)
    return fig


def _rules(ax: Axes, at: Sequence[np.ndarray], width: float) -> None:
    """Lines at shares of the height, and of the width."""
    for y in at[0]:
        ax.plot((0, 1), (1 - y, 1 - y), color=style.INK, linewidth=width, transform=ax.transAxes)
    for x in at[1]:
        ax.plot((x, x), (0, 1), color=style.INK, linewidth=width, transform=ax.transAxes)


def _regions(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> Int[np.ndarray, "h w"]:
    """Number of the region that each cell lies in, row by row."""
    cuts = [cuts_along(side, w, s) for side, w, s in zip(size, window, shift, strict=True)]
    y, x = (
        np.searchsorted(ends, np.arange(side), side="right") - 1
        for ends, side in zip(cuts, size, strict=True)
    )
    return y[:, None] * (len(cuts[1]) - 1) + x


def _tiled(cells: Int[np.ndarray, "n m"], rows: int, columns: int, window: tuple[int, int]) -> np.ndarray:
    """Windows of cells put side by side."""
    h, w = window
    return cells.reshape(rows, columns, h, w).transpose(0, 2, 1, 3).reshape(rows * h, columns * w)


def _cells(ax: Axes, numbers: np.ndarray, regions: np.ndarray) -> None:
    """A map whose cells have numbers and a color a region; what has none is padding, and paler."""
    strength = np.where(numbers < 0, 0.1, 0.32)[..., None]
    style.show_image(ax, 1 - strength + strength * TINTS[regions % len(TINTS)])
    for (y, x), n in np.ndenumerate(numbers):
        if n >= 0:
            ax.text(x, y, str(n), fontsize=5.5, color=style.INK, ha="center", va="center")
