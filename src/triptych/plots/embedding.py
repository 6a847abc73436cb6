"""What the input layers learned: filters of the projection, and which positions look alike."""

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from triptych.plots import style


def patch_filters(
    filters: Float[np.ndarray, "n p q c"],
    share: Float[np.ndarray, " n"] | None = None,
    title: str = "Patch filters",
) -> Figure:
    """Principal components of the linear projection of patches, most important first (ViT, Figure 7, left).

    Args:
        filters: components as images of any sign; one or three color channels.
        share: fraction of the variance each explains, to be written below it.
    """
    n = len(filters)
    columns = min(7, n)
    rows = -(-n // columns)
    cell, gap, note = 0.78, 0.08, 0.16 if share is not None else 0.0
    fig = style.figure(max(0.8 + columns * (cell + gap), 5.2), 1.0 + rows * (cell + gap + note) + 0.3)
    style.heading(fig, title, f"first {n} principal components of the filters of the patch embedding")
    for i, component in enumerate(filters):
        x, y = 0.4 + i % columns * (cell + gap), 1.0 + i // columns * (cell + gap + note)
        shown = 0.5 + 0.5 * component / max(float(np.abs(component).max()), 1e-12)
        shown = shown.repeat(3, axis=-1) if shown.shape[-1] == 1 else shown[..., :3]
        style.show_image(style.axes(fig, x, y, cell, cell), shown)
        if share is not None:
            style.text(fig, x + cell / 2, y + cell + 0.13, f"{share[i]:.1%}", 6.5, style.SOFT, ha="center")
    return fig


def position_similarity(
    similarity: Float[np.ndarray, "h w H W"], title: str = "Position similarity"
) -> Figure:
    """A map for each patch: cosine similarity of its position's embedding to every other (ViT, Figure 7,
    center)."""
    h, w, H, W = similarity.shape
    gap = max(1, round(min(H, W) / 8))
    tall, wide = h * (H + gap) - gap, w * (W + gap) - gap
    mosaic = np.full((tall, wide), np.nan)
    for i in range(h):
        for j in range(w):
            top, left = i * (H + gap), j * (W + gap)
            mosaic[top : top + H, left : left + W] = similarity[i, j]
    width = 5.4 if w >= h else 5.4 * w / h
    height = width * h / w
    fig = style.figure(0.75 + width + 1.1, 1.15 + height + 0.55)
    style.heading(fig, title, "cosine similarity of the embedding at (row, column) with every other")
    ax = style.axes(fig, 0.75, 1.05, width, height)
    shown = ax.imshow(mosaic, aspect="auto", cmap=style.SIMILARITY, vmin=-1, vmax=1, interpolation="nearest")
    step = -(-max(h, w) // 16)
    ax.set_xticks(
        [j * (W + gap) + W / 2 - 0.5 for j in range(0, w, step)], [str(j + 1) for j in range(0, w, step)]
    )
    ax.set_yticks(
        [i * (H + gap) + H / 2 - 0.5 for i in range(0, h, step)], [str(i + 1) for i in range(0, h, step)]
    )
    ax.tick_params(colors=style.SOFT, labelsize=8, length=0)
    ax.set_xlabel("column of patches", color=style.SOFT, fontsize=9)
    ax.set_ylabel("row of patches", color=style.SOFT, fontsize=9)
    for spine in ax.spines.values():
        spine.set_visible(False)
    bar = fig.colorbar(shown, cax=style.axes(fig, 0.75 + width + 0.2, 1.05, 0.14, height), ticks=[-1, 0, 1])
    bar.ax.tick_params(colors=style.SOFT, labelsize=8, length=0)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return fig
