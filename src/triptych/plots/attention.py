"""Where a network looks: every head, the rollout of all blocks, and how far the heads reach."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure

from triptych.plots import style


def attention_heads(
    image: UInt8[np.ndarray, "H W 3"],
    heads: Float[np.ndarray, "blocks heads h w"],
    readout: str = "",
    names: Sequence[str] | None = None,
    title: str = "Attention heads",
) -> Figure:
    """One small map a head: a column a block, so that depth goes right, and a row a head.

    Args:
        image: what the network saw, as pixels.
        heads: attention paid to each patch; each map is drawn on its own scale.
        readout: whose attention it is, for the line below the title.
        names: what to write over the columns instead of 1, 2, ...
    """
    blocks, count, *_ = heads.shape
    names = [str(block + 1) for block in range(blocks)] if names is None else names
    H, W = image.shape[:2]
    wide = min(1.05, max(0.45, 11 / blocks))
    high, gap, first, top = (
        wide * H / W,
        0.06,
        2.75,
        1.3,
    )  # the image stands at the left, the maps to its right
    bottom = max(count * (high + gap), 1.6 * H / W)
    fig = style.figure(max(first + blocks * (wide + gap) + 0.4, 7.6), top + bottom + 0.35)
    whose = f"attention of the {readout}" if readout else "attention to each patch"
    style.heading(fig, title, f"{whose}, {count} heads per block; each map has its own scale")
    style.show_image(style.axes(fig, 0.4, top, 1.6, 1.6 * H / W), image)
    style.text(fig, first - 0.12, top - 0.1, "block", 8, style.FAINT, ha="right")
    for block in range(blocks):
        x = first + block * (wide + gap)
        style.text(fig, x + wide / 2, top - 0.1, names[block], 8, style.SOFT, ha="center")
        for head in range(count):
            y = top + head * (high + gap)
            if block == 0:
                style.text(fig, x - 0.12, y + high / 2 + 0.04, f"head {head + 1}", 8, style.SOFT, ha="right")
            style.show_image(style.axes(fig, x, y, wide, high), style.overlay(image, heads[block, head]))
    return fig


def rollout_overlay(
    image: UInt8[np.ndarray, "H W 3"],
    rollout: Float[np.ndarray, "h w"],
    title: str = "Attention rollout",
    below: str = "",
) -> Figure:
    """The image, and the image with the rollout (Abnar and Zuidema 2020) as light over it."""
    H, W = image.shape[:2]
    wide = 3.2 if W >= H else 3.2 * W / H
    high = wide * H / W
    fig = style.figure(max(0.4 + 2 * wide + 0.2 + 0.4, 5.2), 0.95 + high + 0.4)
    style.heading(fig, title, below)
    style.show_image(style.axes(fig, 0.4, 0.95, wide, high), image)
    style.show_image(style.axes(fig, 0.6 + wide, 0.95, wide, high), style.overlay(image, rollout))
    return fig


def attention_distance(
    distances: Float[np.ndarray, "blocks heads"],
    size: tuple[int, int],
    grid: tuple[int, int],
    title: str = "Attention distance",
) -> Figure:
    """Mean attention distance by depth: a dot a head, a line through each block's mean (ViT, Figure 7,
    right).

    Args:
        distances: pixels.
        size: height and width of the image, pixels.
        grid: rows and columns of patches; the distance of attention spread evenly over them is drawn too.
    """
    blocks, heads = distances.shape
    fig = style.figure(6.4, 4.4)
    style.heading(fig, title, "mean distance from a patch to what it attends to; one dot per head")
    ax = style.quiet(style.axes(fig, 0.85, 1.05, 5.15, 2.75))
    depth = np.arange(1, blocks + 1)
    ax.plot(depth, distances.mean(1), color=style.BLUE, linewidth=1.6, zorder=2)
    ax.scatter(
        depth.repeat(heads), distances.ravel(), s=22, color=style.BLUE, alpha=0.45, linewidths=0, zorder=3
    )
    even = distance_of_even_attention(size, grid)
    ax.axhline(even, color=style.ORANGE, linewidth=1, linestyle=(0, (4, 3)))
    ax.annotate(
        "uniform attention", (0, even), (6, 4), textcoords="offset points",
        xycoords=("axes fraction", "data"), fontsize=8, color=style.ORANGE,
    )  # fmt: skip
    ax.set(xlabel="block", ylabel="pixels", xlim=(0.5, blocks + 0.5), ylim=(0, None))
    ax.set_xticks(_some(depth, 24))
    ax.set_ylim(0, max(ax.get_ylim()[1], even * 1.15))
    return fig


def distance_of_even_attention(size: tuple[int, int], grid: tuple[int, int]) -> float:
    """Mean distance, pixels, between the centers of two patches drawn evenly, each pair of them counted once
    by how often its offset occurs."""
    (H, W), (h, w) = size, grid
    dy, dx = np.arange(1 - h, h)[:, None], np.arange(1 - w, w)
    often = (h - np.abs(dy)) * (w - np.abs(dx))
    return float((often * np.hypot(dy * H / h, dx * W / w)).sum() / (h * w) ** 2)


def _some(ticks: np.ndarray, most: int) -> Sequence[int]:
    step = -(-len(ticks) // most)
    return [int(tick) for tick in ticks[::step]]
