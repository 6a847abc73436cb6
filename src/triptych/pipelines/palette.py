"""A color for each class: those of known data sets, else colors that are far apart from each other."""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from triptych.data.sources.label_maps import CITYSCAPES
from triptych.errors import ConfigError

GROUND = (58, 66, 77)
"""Color of background classes; overlays do not tint them."""
GROUND_NAMES = frozenset(("background", "unlabeled", "unlabelled", "void", "other", "nothing"))

# Chosen by eye, for sets of a few classes.
CHOSEN_COLORS = (
    *((37, 99, 235), (240, 140, 29), (15, 157, 138), (220, 61, 67), (124, 77, 219), (246, 196, 54)),
    *((233, 92, 171), (96, 165, 40), (56, 189, 248), (146, 84, 36)),
)
STEPS = 18  # values of each channel in the grid from which further colors are chosen


def class_colors(
    classes: Sequence[str], chosen_colors: Sequence[Sequence[int]] | None = None
) -> UInt8[np.ndarray, "classes 3"]:
    """Return the RGB of each class: the chosen colors, Cityscapes' for its classes, else the package's, which depend on
    the index alone. A class named "background" is dark gray.

    Raises:
        ConfigError: not a color of three numbers from 0 to 255 for each class.
    """
    if chosen_colors is None and list(classes) == [name for _, name, _ in CITYSCAPES]:
        chosen_colors = [color for _, _, color in CITYSCAPES]
    if chosen_colors is None:
        ground = [i for i, name in enumerate(classes) if is_ground(name)]
        things = iter(far_apart(max(len(classes) - len(ground), 1)))
        return np.array([GROUND if i in ground else next(things) for i in range(len(classes))], np.uint8)
    rgb = np.asarray(chosen_colors)
    if rgb.shape != (len(classes), 3) or rgb.min(initial=0) < 0 or rgb.max(initial=0) > 255:
        raise ConfigError(
            f"colors are of shape {rgb.shape}; give red, green and blue from 0 to 255 for each of "
            f"{len(classes)} classes"
        )
    return rgb.astype(np.uint8)


def is_ground(name: str) -> bool:
    """Return whether a class is the background."""
    return name.strip().lower() in GROUND_NAMES


@functools.lru_cache(maxsize=8)
def far_apart(count: int) -> UInt8[np.ndarray, "count 3"]:
    """Return `count` colors, each as far as possible from all before it, so that a larger `count` only appends colors.

    The first few were chosen by eye, the others are chosen from a grid by perceptual distance (OKLab, Ottosson 2020).
    Beyond about a thousand the colors repeat, since they could not be distinguished.
    """
    axis = np.linspace(0, 255, STEPS)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3).round()
    seen = oklab(grid)
    grid = grid[(seen[:, 0] > 0.3) & (seen[:, 0] < 0.93)]  # neither black nor white
    seen = oklab(grid)
    chosen = [np.array(color, np.float64) for color in CHOSEN_COLORS[:count]]
    # Distance from black, white and grays, which are frequent in images, and from the colors chosen so far.
    occupied = oklab(np.array([*((v, v, v) for v in (0, 64, 128, 192, 255)), *CHOSEN_COLORS], np.float64))
    near = np.linalg.norm(seen[:, None] - occupied, axis=-1).min(1)
    while len(chosen) < min(count, len(grid) // 3):
        best = int(near.argmax())
        chosen.append(grid[best])
        near = np.minimum(near, np.linalg.norm(seen - seen[best], axis=-1))
    return np.array(chosen)[np.arange(count) % len(chosen)].astype(np.uint8)


def oklab(rgb: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """Convert sRGB in [0, 255] to OKLab: lightness in [0, 1], green to red, blue to yellow."""
    x = rgb / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    to_cones = np.array([
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ])  # fmt: skip
    to_lab = np.array([
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ])  # fmt: skip
    return np.cbrt(linear @ to_cones.T) @ to_lab.T
