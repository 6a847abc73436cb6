"""How an image came out of noise: what the network estimated in it, step after step."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from triptych.plots import style

_MARGIN, _GAP = 0.4, 0.14  # inches


def denoising_strip(
    frames: Sequence[UInt8[np.ndarray, "H W C"]],
    labels: Sequence[str],
    title: str = "Denoising",
    below: str = "",
    columns: int = 8,
) -> Figure:
    """Images side by side in the order of the steps, a label under each.

    Args:
        frames: what the network estimated, all of one size.
        labels: one each, such as "step 4".
        below: a line under the title, for example the prompt.
        columns: at most, before a new row begins.
    """
    height, width = frames[0].shape[:2]
    across = min(columns, len(frames))
    side = 1.45 * min(1.6, max(0.7, math.sqrt(width / height)))  # inches across
    tall = side * height / width
    rows = -(-len(frames) // across)
    page = style.figure(
        max(2 * _MARGIN + across * side + (across - 1) * _GAP, 5.2), 0.85 + rows * (tall + 0.32) + 0.25
    )
    style.heading(page, title, below, left=_MARGIN)
    for i, (frame, label) in enumerate(zip(frames, labels, strict=True)):
        x, y = _MARGIN + i % across * (side + _GAP), 0.85 + i // across * (tall + 0.32)
        style.show_image(style.axes(page, x, y, side, tall), frame)
        style.text(page, x, y + tall + 0.17, label, 8, style.SOFT)
    return page
