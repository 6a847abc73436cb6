"""Images in rows and columns with captions: one result as two settings vary."""

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from triptych.plots import style

_LEFT, TOP, GAP, BELOW = 0.4, 0.85, 0.06, 0.3  # inches


def captioned_grid(
    rows: Sequence[Sequence[UInt8[np.ndarray, "H W 3"]]],
    title: str,
    below: str = "",
    row_words: Sequence[str] = (),
    column_words: Sequence[str] = (),
    marked: Collection[tuple[int, int]] = (),
    side: float = 0.9,
    row_margin: float = 1.3,
) -> Figure:
    """Equally large images.

    Args:
        rows: of images; a row may be shorter than others.
        title, below: above the images.
        row_words: a line to the left of each row; none leaves no room for any.
        column_words: a line above each column.
        marked: (row, column) of images with an orange edge.
        side: of an image, inches.
        row_margin: room for `row_words`, inches.
    """
    left = _LEFT + (row_margin if row_words else 0)
    top = TOP + (0.25 if column_words else 0)
    across = max(len(row) for row in rows)
    width = left + across * (side + GAP) + _LEFT - GAP
    page = style.figure(width, top + len(rows) * (side + GAP) + BELOW)
    style.heading(page, title, below, _LEFT)
    for j, words in enumerate(column_words):
        style.text(
            page, left + j * (side + GAP), top - 0.09, style.short(words, int(side / 0.07)), 8, style.SOFT
        )
    for i, row in enumerate(rows):
        y = top + i * (side + GAP)
        if row_words:
            style.text(
                page, _LEFT, y + side / 2, style.short(row_words[i], int(row_margin / 0.072)), 8.5, style.SOFT
            )
        for j, pixels in enumerate(row):
            ax = style.axes(page, left + j * (side + GAP), y, side, side)
            style.show_image(ax, pixels)
            if (i, j) in marked:
                for spine in ax.spines.values():
                    spine.set(color=style.ORANGE, linewidth=2)
    return page
