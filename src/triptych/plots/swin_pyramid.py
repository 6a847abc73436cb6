"""The hierarchy of maps: what is alike in each, and how strongly its cells speak."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.figure import Figure

from triptych.plots import style


def feature_pyramid(
    image: UInt8[np.ndarray, "H W 3"],
    colors: Sequence[Float[np.ndarray, "_ _ 3"]],
    norms: Sequence[Float[np.ndarray, "_ _"]],
    share: Float[np.ndarray, "stages 3"],
    strides: Int[np.ndarray, " stages"],
    title: str = "Feature pyramid",
) -> Figure:
    """A column a stage: above the directions of the map's cells as colors, below their lengths.

    Args:
        colors: three principal components of each map, from 0 to 1; cells alike in color are alike in direction. A
            map's colors mean nothing in another map.
        norms: length of each cell; every map is drawn on its own scale.
        share: of the variance, that each component explains.
        strides: pixels of a cell of each map.
    """
    H, W = image.shape[:2]
    wide, gap, left, top = 1.9, 0.14, 0.4, 1.25
    high = wide * H / W
    fig = style.figure(left + (len(colors) + 1) * (wide + gap) + 0.26, top + 2 * high + 0.8)
    style.heading(
        fig, title, "top: first three principal components of the normalized features, as red, green and blue"
    )
    style.show_image(style.axes(fig, left, top, wide, high), image)
    below = top + high + 0.42
    style.text(fig, left, below + 0.15, "bottom: norm of each cell,", 8.5, style.SOFT)
    style.text(fig, left, below + 0.33, "light is smallest", 8.5, style.SOFT)
    for s, (shown, lengths) in enumerate(zip(colors, norms, strict=True)):
        x = left + (s + 1) * (wide + gap)
        h, w = lengths.shape
        style.text(fig, x, top - 0.1, f"stage {s + 1}: {h} x {w} cells of {strides[s]} px", 8.5, style.SOFT)
        style.show_image(style.axes(fig, x, top, wide, high), shown)
        style.text(fig, x, top + high + 0.17, f"{share[s].sum():.0%} of the variance", 8, style.FAINT)
        lit = style.BLUES(style.unit(lengths))[..., :3]
        style.show_image(style.axes(fig, x, below, wide, high), lit)
        words = f"{lengths.min():.3g} to {lengths.max():.3g}"
        style.text(fig, x, below + high + 0.17, words, 8, style.FAINT)
    return fig
