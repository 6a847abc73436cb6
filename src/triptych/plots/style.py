"""One hand for every image: colors, letters, spacing, and how a figure becomes a file.

Figures are `matplotlib.figure.Figure` objects drawn by Agg: no display, no pyplot, no global settings, so
that plots can be drawn from any thread and leave a caller's own matplotlib as it was.
"""

import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

from triptych.atomic_write import write_atomically

INK, SOFT, FAINT, LINE, PAPER = "#16202c", "#5b6775", "#a3adb8", "#e6eaee", "#ffffff"
BLUE, ORANGE, TEAL, VIOLET, RED = "#2563eb", "#f08c1d", "#0f9d8a", "#7c4ddb", "#dc3d43"
CYCLE = (BLUE, ORANGE, TEAL, VIOLET, RED, "#8a6d1f", "#4d7c0f", "#64748b")

# From paper-white to deep blue: for counts and similarities, where nothing must look like nothing.
BLUES = LinearSegmentedColormap.from_list(
    "triptych-blues", ["#ffffff", "#dbe7fd", "#9dbef9", "#4f86f0", BLUE, "#173a9c", "#0b1f5e"]
)
# Warm light over a greyed image: clear where nothing is looked at.
HEAT = LinearSegmentedColormap.from_list(
    "triptych-heat", ["#fff6cf", "#fdd45c", "#f98f2e", "#e2443f", "#b0174f"]
)
# Orange for opposite, white for unrelated, blue for alike.
SIMILARITY = LinearSegmentedColormap.from_list(
    "triptych-similarity", ["#a3480b", ORANGE, "#ffe9cf", "#ffffff", "#d5e3fd", BLUE, "#0b1f5e"]
)

DPI = 160


def figure(width: float, height: float) -> Figure:
    """An empty white figure of `width` x `height` inches at 160 dots an inch."""
    fig = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(fig)
    return fig


def axes(fig: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches from the upper left corner, as a page is laid out."""
    W, H = fig.get_size_inches()
    return fig.add_axes((left / W, 1 - (top + height) / H, width / W, height / H))


def text(
    fig: Figure, x: float, y: float, words: str, size: float = 9, color: str = INK, **more: object
) -> None:
    """Letters with their baseline's left end at (x, y) inches from the upper left corner."""
    W, H = fig.get_size_inches()
    fig.text(x / W, 1 - y / H, _plain(words), fontsize=size, color=color, **more)  # pyright: ignore[reportArgumentType]


def heading(fig: Figure, title: str, below: str = "", left: float = 0.4) -> None:
    """A title in the upper left corner, and a softer line below it, cut at the page's width; takes the first
    0.85 inches."""
    text(fig, left, 0.42, title, size=14, weight="bold")
    if below:
        room = fig.get_size_inches()[0] - 2 * left
        text(fig, left, 0.66, short(below, int(room / 0.075)), size=9, color=SOFT)


def quiet(ax: Axes, grid: str | None = "y") -> Axes:
    """Axes that step back: two thin lines, small gray numbers, faint rules."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(FAINT)
        ax.spines[side].set_linewidth(0.8)
    ax.tick_params(colors=SOFT, labelsize=8, length=3, width=0.8)
    ax.xaxis.label.set(color=SOFT, fontsize=9)
    ax.yaxis.label.set(color=SOFT, fontsize=9)
    if grid:
        ax.grid(axis=grid, color=LINE, linewidth=0.8)  # pyright: ignore[reportArgumentType]
        ax.set_axisbelow(True)
    return ax


def show_image(ax: Axes, pixels: np.ndarray) -> None:
    """An image alone in its axes, with a hairline around it so that white on white has an edge.

    A photograph (uint8) is brought to the size it is printed at by Lanczos, so that small and large ones are
    both smooth; numbers (float, in [0, 1]) keep their squares.
    """
    if pixels.dtype == np.uint8:
        box = ax.get_window_extent()
        size = (max(1, round(box.width)), max(1, round(box.height)))
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    ax.imshow(pixels, aspect="auto", interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set(color=LINE, linewidth=0.8)


def short(name: str, most: int) -> str:
    """A name cut at `most` letters, the cut shown."""
    return name if len(name) <= most else name[: most - 1].rstrip() + "…"


def shorts(names: Sequence[str], most: int) -> list[str]:
    return [_plain(short(name, most)) for name in names]


def enlarge(values: Float[np.ndarray, "h w"], size: tuple[int, int]) -> Float[np.ndarray, "H W"]:
    """Patches to pixels: bicubic, in fp32, kept within the range of the values."""
    grown = Image.fromarray(values.astype(np.float32)).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(grown), values.min(), values.max())


def unit(values: np.ndarray, high: float = 1.0, low: float | None = None) -> np.ndarray:
    """To [0, 1]: `low`, by default the least value, to 0, the `high` quantile (and all above it) to 1; a constant
    becomes 0."""
    low, top = float(values.min()) if low is None else low, float(np.quantile(values, high))
    return (
        np.clip((values - low) / (top - low), 0, 1) if top > low else np.zeros_like(values, dtype=np.float32)
    )


def overlay(
    image: UInt8[np.ndarray, "H W 3"],
    heat: Float[np.ndarray, "h w"],
    high: float = 0.995,
    low: float | None = None,
) -> UInt8[np.ndarray, "bigH bigW 3"]:
    """The image greyed and lightened, with warm light where `heat` is high: fully from its `high` quantile on, and
    none up to `low`, by default its least value.

    The light covers in proportion to the heat, so that what is looked at keeps its place in the image. A
    small image is enlarged first, or the light would show its pixels.
    """
    grow = max(1, round(320 / max(image.shape[:2])))
    if grow > 1:
        size = (image.shape[1] * grow, image.shape[0] * grow)
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    light = unit(enlarge(heat, image.shape[:2]), high, low)[..., None]
    gray = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    base = 0.55 * gray[..., None].repeat(3, axis=2) + 0.45 * 255
    color = HEAT(light[..., 0])[..., :3] * 255
    cover = 0.82 * np.minimum(1, 2 * light)
    return np.clip(base * (1 - cover) + color * cover, 0, 255).astype(np.uint8)


def save(fig: Figure, path: str | os.PathLike[str]) -> None:
    """Write the figure as a PNG, completely or not at all. Raise a `StorageError` if the place cannot be written."""
    write_atomically(path, lambda file: fig.savefig(file, format="png", facecolor=PAPER))


def _plain(words: str) -> str:
    """Dollar signs are letters here, not mathematics."""
    return words.replace("$", r"\$")
